"""Instructions of a compiled program, read from its HLO text (`compiled.as_text()`).

The compiler's own account (`cost_analysis()`) counts the body of a loop once, whatever the number
of its iterations, so a scanned layer stack looks like one layer. `hlo_cost` counts again with trip
counts; this module gives it the instructions, their shapes as they lie in memory, and the loops.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")
_TRIPS = re.compile(r'"?known_trip_count"?:\{"n":"(\d+)"\}')


class Array(NamedTuple):
    """One array of a type: logical dimensions, bytes as laid out, whether it lies in HBM."""

    dtype: str
    dims: tuple[int, ...]
    nbytes: int
    """With the padding of its tiles: [4096, 64] with 64 in the lanes takes twice its elements."""
    in_hbm: bool
    """Default memory; on a TPU other spaces are VMEM (1), semaphores (2) and SMEM (4, 6)."""


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    """Of its result; several for a tuple."""
    opcode: str
    operands: tuple[str, ...]
    argument: str
    """What stands between the parentheses: a constant's value, a parameter's number."""
    attributes: str

    def called(self, attribute: str) -> str | None:
        """Name of the computation in `attribute` (calls, body, condition)."""
        found = re.search(rf"\b{attribute}=%?([^,\s}}]+)", self.attributes)
        return None if found is None else found.group(1)

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return "" if found is None else found.group(1)


class Computation(NamedTuple):
    """Instructions by name, in order, and the root's name."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def users(self, name: str) -> list[Instruction]:
        """The instructions that take `name` as an operand."""
        return [x for x in self.instructions.values() if name in x.operands]


class Module(NamedTuple):
    """All computations by name, and the entry's name."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Raises ValueError if `text` has no entry computation."""
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    body: dict[str, Instruction] = {}
    for line in _logical_lines(text):
        if line.startswith(("%", "ENTRY")):
            head = line.removeprefix("ENTRY").strip()
            name, body, root = head.split(" ", 1)[0].lstrip("%"), {}, ""
            entry = name if line.startswith("ENTRY") else entry
        elif line == "}" and name:
            computations[name] = Computation(name, body, root)
            name = ""
        elif name and " = " in line:
            instruction, is_root = _instruction(line.strip())
            body[instruction.name] = instruction
            root = instruction.name if is_root else root
    if not entry:
        raise ValueError("text: expected HLO with an ENTRY computation, found none")
    return Module(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """Lines with what follows a line break inside of an attribute's string put back."""
    line = ""
    for part in text.splitlines():
        if part.startswith((" ", "%", "ENTRY", "HloModule")) or part.strip() in ("", "}"):
            yield line
            line = part
        else:
            line += part
    yield line


def _instruction(line: str) -> tuple[Instruction, bool]:
    is_root = line.startswith("ROOT ")
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, rest = rest.split("(", 1)
    close = _closing("(" + rest) - 1
    argument, attributes = rest[: close - 1], rest[close:]
    operands = tuple(re.findall(r"%([^\s,()]+)", argument)) if opcode != "constant" else ()
    result = Instruction(
        name.lstrip("%"), tuple(arrays(shape)), opcode, operands, argument, attributes
    )
    return result, is_root


def _closing(text: str) -> int:
    """Index behind the parenthesis that closes the one at the start."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return index + 1
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def arrays(shape: str) -> Iterator[Array]:
    """The arrays of an HLO type; tokens and other types without a size are left out."""
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = _BITS.get(dtype)
        if bits is None:
            digits = re.search(r"\d+", dtype)
            if digits is None:
                continue
            bits = int(digits.group())
        sizes = tuple(int(x.strip("<= ")) for x in dims.split(",") if x.strip())
        space = re.search(r"S\((\d+)\)", layout)
        padded = _padded(sizes, layout)
        yield Array(dtype, sizes, math.ceil(padded * bits / 8), space is None)


def _padded(sizes: tuple[int, ...], layout: str) -> int:
    """Elements with the minor dimensions rounded up to the first tile of the layout."""
    order, _, tiles = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiles)
    if tile is None or not order:
        return math.prod(sizes)
    minor_first = [int(x) for x in order.split(",")]
    tile_sizes = [int(x) for x in tile.group(1).split(",")][::-1]
    if len(tile_sizes) > len(minor_first):
        return math.prod(sizes)
    rounded = list(sizes)
    for axis, size in zip(minor_first, tile_sizes, strict=False):
        rounded[axis] = -(-rounded[axis] // size) * size
    return math.prod(rounded)


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Iterations of a `while` that counts from 0 to a constant; None if its text does not tell."""
    known = _TRIPS.search(loop.attributes)
    if known is not None:
        return int(known.group(1))
    condition = module.computations[str(loop.called("condition"))]
    body = module.computations[str(loop.called("body"))]
    compare = condition.instructions[condition.root]
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    index, stop = (_resolve(condition, name) for name in compare.operands)
    step = _step(body, index)
    if not isinstance(index, str) or not isinstance(stop, int) or not step:
        return None
    return -(-stop // step)


def _resolve(computation: Computation, name: str) -> int | str | None:
    """A constant's value, "index=i" for an element of the loop's state, else None."""
    instruction = computation.instructions[name]
    if instruction.opcode == "constant":
        return int(instruction.argument) if re.fullmatch(r"-?\d+", instruction.argument) else None
    if instruction.opcode in ("bitcast", "copy"):
        return _resolve(computation, instruction.operands[0])
    if instruction.opcode != "get-tuple-element":
        return None
    source = computation.instructions[instruction.operands[0]]
    found = re.search(r"index=\d+", instruction.attributes)
    return found.group() if found is not None and source.opcode == "parameter" else None


def _step(body: Computation, index: int | str | None) -> int | None:
    """By how much the body advances element `index` of its state, if by a constant."""
    root = body.instructions[body.root]
    if not isinstance(index, str) or root.opcode != "tuple":
        return None
    step, name = 0, root.operands[int(index.removeprefix("index="))]
    while True:
        found = _resolve(body, name)
        if found == index:
            return step
        instruction = body.instructions[name]
        if instruction.opcode != "add":
            return None
        sides = {x: _resolve(body, x) for x in instruction.operands}
        constants = [x for x, value in sides.items() if isinstance(value, int)]
        if len(constants) != 1 or len(sides) != 2:
            return None
        step += int(sides[constants[0]])  # type: ignore[arg-type]
        name = next(x for x in sides if x != constants[0])
