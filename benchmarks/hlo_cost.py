"""FLOPs and bytes of a compiled program, loops counted as often as they run.

What `cost_analysis()` says, with three differences: a loop's body counts once per iteration, bytes
are those of HBM alone (a TPU program keeps many intermediates in VMEM) with the padding of their
tiles, and a kernel (custom call) counts as its caller says, since the compiler cannot see into it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np

from benchmarks.hlo_text import Array, Computation, Instruction, Module, parse, trip_count

_FREE = frozenset(
    (
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "iota",
    )
)
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
_NO_TRAFFIC = frozenset(("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one call of a custom kernel costs."""

    flops: float
    hbm_bytes: float


@dataclasses.dataclass
class Cost:
    """Of one execution on one device."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collective_bytes: float = 0.0
    """Results of collectives: what arrives over the links, about (an all-reduce takes twice)."""
    kernel_calls: dict[str, float] = dataclasses.field(default_factory=dict)
    """Executions of every custom kernel by name."""
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    """Loops whose number of iterations the text does not tell."""
    parts: list[tuple[float, float, float, str]] = dataclasses.field(default_factory=list)
    """(executions, bytes, FLOPs, what) of every instruction: where the sums come from."""

    def largest(self, count: int, by: str = "bytes") -> list[tuple[float, float, float, str]]:
        """The `count` instructions with the most bytes or FLOPs in all their executions."""

        def total(part: tuple[float, float, float, str]) -> float:
            return part[0] * (part[1] if by == "bytes" else part[2])

        return sorted(self.parts, key=total, reverse=True)[:count]

    def lines(self, count: int, by: str = "bytes") -> list[str]:
        """`largest` in words."""
        return [
            f"{times:8.0f} x {nbytes / 1e6:10.2f} MB {flops / 1e9:10.2f} GFLOP  {what}"
            for times, nbytes, flops, what in self.largest(count, by)
        ]


KernelCost = Callable[[Instruction], Kernel | None]


def count(
    text: str,
    *,
    kernel: KernelCost | None = None,
    loops: bool = True,
    unknown_trips: float = 1.0,
) -> Cost:
    """Counts a program from its HLO text.

    Args:
        text: `compiled.as_text()`.
        kernel: cost of a custom call; None, or where it returns None: its operands and results.
        loops: False counts a loop's body once, as `cost_analysis()` does.
        unknown_trips: iterations of a loop whose text does not tell them.
    """
    module = parse(text)
    cost = Cost()
    _visit(_Context(module, kernel, loops, unknown_trips, cost), module.entry, 1.0)
    return cost


@dataclasses.dataclass(frozen=True)
class _Context:
    module: Module
    kernel: KernelCost | None
    loops: bool
    unknown_trips: float
    cost: Cost


def _visit(context: _Context, name: str, times: float) -> None:
    module, cost = context.module, context.cost
    computation = module.computations[name]
    channels: set[str] = set()
    for instruction in computation.instructions.values():
        cost.collective_bytes += times * _collective_bytes(module, instruction, channels)
        opcode = instruction.opcode
        if opcode == "while":
            known = trip_count(module, instruction)
            if known is None:
                cost.unknown_loops.append(instruction.op_name or instruction.name)
            trips = context.unknown_trips if known is None else known
            each = times * trips if context.loops else times
            _visit(context, str(instruction.called("body")), each)
        elif opcode == "conditional":
            branches = _branches(instruction)
            for branch in branches:  # one of them runs, unknown which: the mean
                _visit(context, branch, times / len(branches))
        elif opcode == "call":
            _visit(context, str(instruction.called("to_apply")), times)
        elif opcode not in _FREE and not opcode.endswith("-done"):
            _add(context, computation, instruction, times)


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed is not None:
        return [name.strip().lstrip("%") for name in listed.group(1).split(",")]
    names = (instruction.called(f"{side}_computation") for side in ("true", "false"))
    return [name for name in names if name is not None]


def _add(context: _Context, where: Computation, instruction: Instruction, times: float) -> None:
    module, cost = context.module, context.cost
    flops = _flops(module, where, instruction)
    nbytes = _bytes(module, where, instruction)
    if instruction.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        if target is not None and target.group(1) in _NO_TRAFFIC:
            return
        name = kernel_name(instruction)
        if name is not None:
            cost.kernel_calls[name] = cost.kernel_calls.get(name, 0.0) + times
        known = context.kernel(instruction) if context.kernel is not None else None
        if known is not None:
            flops, nbytes = known.flops, known.hbm_bytes
    cost.flops += times * flops
    cost.hbm_bytes += times * nbytes
    cost.parts.append((times, nbytes, flops, f"{instruction.name} {instruction.op_name}"))


def _collective_bytes(module: Module, instruction: Instruction, channels: set[str]) -> float:
    """Results of a collective, and of those that a fusion overlaps with its own work.

    Such a one stands, with the same channel, in every fusion that it overlaps with; `channels` are
    those that have been counted.
    """
    if not instruction.opcode.startswith(_COLLECTIVES):
        if instruction.opcode != "fusion":
            return 0.0
        inner = module.computations[str(instruction.called("calls"))]
        return sum(_collective_bytes(module, x, channels) for x in inner.instructions.values())
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    if instruction.opcode.endswith("-done") or (channel and channel.group(1) in channels):
        return 0.0
    channels.update(channel.groups() if channel else ())
    if instruction.opcode == "collective-permute-start":  # (operand, result, contexts)
        return instruction.arrays[1].nbytes
    if instruction.opcode == "all-gather-start":
        return instruction.arrays[-1].nbytes
    return sum(array.nbytes for array in instruction.arrays)


def kernel_name(instruction: Instruction) -> str | None:
    """Of a Pallas TPU kernel; None for other instructions."""
    if 'custom_call_target="tpu_custom_call"' not in instruction.attributes:
        return None
    found = re.search(r'kernel_name = "([^"]*)"', instruction.attributes)
    return found.group(1) if found is not None else instruction.name.split(".")[0]


def _hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.nbytes for array in arrays if array.in_hbm)


def _bytes(module: Module, where: Computation, instruction: Instruction) -> float:
    """HBM bytes that one execution reads and writes."""
    opcode = instruction.opcode
    sources = [where.instructions[name] for name in instruction.operands]
    if opcode in ("dynamic-slice", "slice", "gather"):
        read = instruction.arrays[0].nbytes if sources[0].arrays[0].in_hbm else 0
        return read + _hbm(instruction.arrays)
    if opcode == "dynamic-update-slice":
        update = sources[1].arrays[0]
        into = update.nbytes if instruction.arrays[0].in_hbm else 0
        return _hbm((update,)) + into
    if opcode == "copy-start":  # (to, from, context)
        return _hbm(instruction.arrays[:2])
    inner = module.computations.get(str(instruction.called("calls")))
    if inner is not None:
        used = sum(
            _read(module, inner, index, _hbm(source.arrays)) for index, source in enumerate(sources)
        )
        if opcode == "fusion":
            return used + _written(inner, instruction)
        return used + _hbm(inner.instructions[inner.root].arrays)  # an async start's tuple is more
    if opcode.endswith("-start"):  # (operands, results, context): the results are new
        return _hbm(tuple(a for source in sources for a in source.arrays)) + _hbm(
            instruction.arrays[1:2]
        )
    return sum(_hbm(source.arrays) for source in sources) + _hbm(instruction.arrays)


def _parameter(computation: Computation, index: int) -> str:
    wanted = str(index)
    return next(
        x.name
        for x in computation.instructions.values()
        if x.opcode == "parameter" and x.argument == wanted
    )


def _read(module: Module, inner: Computation, index: int, whole: int) -> float:
    """HBM bytes that a fusion reads of its operand `index`, of `whole` bytes."""
    return min(whole, _used(module, inner, _parameter(inner, index), whole)) if whole else 0


def _used(module: Module, inner: Computation, name: str, whole: int) -> float:
    total = 0.0
    for user in inner.users(name):
        position = user.operands.index(name)
        if user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
            total += user.arrays[0].nbytes
        elif user.opcode == "dynamic-update-slice" and position == 0:
            total += 0  # in place
        elif user.opcode == "bitcast":
            total += _used(module, inner, user.name, whole)
        elif user.opcode == "fusion":
            nested = module.computations[str(user.called("calls"))]
            total += _used(module, nested, _parameter(nested, position), whole)
        else:
            return whole
    return total


def _written(inner: Computation, instruction: Instruction) -> float:
    """HBM bytes that a fusion writes: an update in place writes the update alone."""
    root = inner.instructions[inner.root]
    names = root.operands if root.opcode == "tuple" else (root.name,)
    if len(names) != len(instruction.arrays):
        return _hbm(instruction.arrays)
    total = 0.0
    for name, array in zip(names, instruction.arrays, strict=True):
        source = inner.instructions[name]
        while source.opcode == "bitcast":
            source = inner.instructions[source.operands[0]]
        nbytes = array.nbytes
        if source.opcode == "dynamic-update-slice":
            nbytes = min(nbytes, inner.instructions[source.operands[1]].arrays[0].nbytes)
        total += nbytes if array.in_hbm and source.opcode != "parameter" else 0
    return total


def _flops(module: Module, where: Computation, instruction: Instruction) -> float:
    """2 per multiply and add of the products, those inside of fusions too."""
    if instruction.opcode == "dot":
        return _dot_flops(where, instruction)
    if instruction.opcode == "convolution":
        return _convolution_flops(where, instruction)
    inner = module.computations.get(str(instruction.called("calls")))
    if inner is None:
        return 0.0
    return sum(_flops(module, inner, x) for x in inner.instructions.values())


def _dot_flops(where: Computation, instruction: Instruction) -> float:
    left = where.instructions[instruction.operands[0]].arrays[0].dims
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = [left[int(x)] for x in axes.group(1).split(",") if x] if axes else []
    return 2.0 * float(np.prod(instruction.arrays[0].dims)) * float(np.prod(contracted))


def _convolution_flops(where: Computation, instruction: Instruction) -> float:
    """TPU programs write products as convolutions: spatial axes play batch and contracted ones."""
    left, right = (where.instructions[name].arrays[0].dims for name in instruction.operands)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    lhs, rhs, out = labels.groups()
    sizes = instruction.arrays[0].dims
    total = 2.0 * sizes[out.index("b")] * sizes[out.index("f")] * right[rhs.index("i")]
    window = _window(instruction.attributes)
    for axis in (label for label in out if label.isdigit()):
        fields = {
            name: values[int(axis)] for name, values in window.items() if int(axis) < len(values)
        }
        total *= _valid_positions(
            left[lhs.index(axis)],
            sizes[out.index(axis)],
            right[rhs.index(axis)],
            _int(fields.get("stride")),
            _int(fields.get("pad", "0_0").split("_")[0], 0),
            _int(fields.get("lhs_dilate")),
            _int(fields.get("rhs_dilate")),
        )
    return total


def _int(text: str | None, default: int = 1) -> int:
    return default if text is None else int(text)


def _window(attributes: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    if found is None:
        return {}
    fields = (field.split("=") for field in found.group(1).split())
    return {name: values.split("x") for name, values in fields}


@functools.cache
def _valid_positions(
    lhs: int, out: int, kernel: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs (output, kernel position) that meet an element and not padding or a dilation's hole."""
    where = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilate - low
    inside = (where >= 0) & (where <= (lhs - 1) * lhs_dilate) & (where % lhs_dilate == 0)
    return int(inside.sum())
