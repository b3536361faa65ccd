"""What the TPU kernels share: launching, layouts, and the scalars that say which slots are visible.

Pallas's interface differs between JAX versions: what moved is looked up here.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platforms
from pallas_kernels.mosaic_tpu.schedule import Work

VMEM_LIMIT = 16 * 2**20
"""Bytes a kernel may use, the compiler's own spills included: all that a TPU v4 core has."""

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

_launches: contextvars.ContextVar[list[tuple[str, Work]] | None] = contextvars.ContextVar(
    "launches", default=None
)
_simulate: contextvars.ContextVar[bool] = contextvars.ContextVar("simulate", default=False)


@contextlib.contextmanager
def record_launches() -> Iterator[list[tuple[str, Work]]]:
    """Name and work of every kernel that is traced inside, for cost models."""
    launches: list[tuple[str, Work]] = []
    token = _launches.set(launches)
    try:
        yield launches
    finally:
        _launches.reset(token)


@dataclasses.dataclass(frozen=True)
class Blocked:
    """An operand cut into blocks; None in a block's shape drops that axis."""

    array: Any
    """jax.Array of an input, jax.ShapeDtypeStruct of an output; None: the call has none."""
    block: tuple[int | None, ...] | None
    """None: stays where it is, for an input that only gives its memory to an output."""
    index: Callable[..., tuple[Any, ...]] | None
    """(*grid indices, scalars) -> block indices."""


def launch(
    body: Callable[[Any], None],
    *,
    name: str,
    grid: tuple[int, ...],
    parallel: int,
    scalars: Mapping[str, jax.Array],
    inputs: Mapping[str, Blocked],
    outputs: Mapping[str, Blocked],
    scratch: Mapping[str, tuple[int, ...]],
    work: Work,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, jax.Array]:
    """`pl.pallas_call`, compiled or interpreted, with operands by name; returns the outputs.

    body gets a namespace of all refs; those of absent operands are None. The first `parallel` axes
    of the grid may run in any order, and on both cores of a chip that has two. scratch: float32.
    """
    if (launches := _launches.get()) is not None:
        launches.append((name, work))
    aliases = aliases or {}
    lanes = {key: x.array.shape[-1] for key, x in outputs.items() if x.array is not None}
    if platforms.interpreted():
        inputs, outputs = _with_whole_blocks(inputs, outputs, aliases)
    present = {key: x for key, x in inputs.items() if x.array is not None}
    wanted = {key: x for key, x in outputs.items() if x.array is not None}
    names = [*scalars, *present, *wanted, *scratch]
    absent = dict.fromkeys([*inputs, *outputs])

    def kernel(*refs):
        body(SimpleNamespace(**absent | dict(zip(names, refs, strict=True))))

    def spec(operand: Blocked):
        if operand.block is None:
            return pl.BlockSpec(memory_space=pl.ANY)

        def index_map(*args):
            ids, refs = args[: len(grid)], args[len(grid) :]
            return operand.index(*ids, SimpleNamespace(**dict(zip(scalars, refs, strict=True))))

        return pl.BlockSpec(operand.block, index_map)

    order_in, order_out = [*scalars, *present], list(wanted)
    semantics: Any = ("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
    flat = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[spec(x) for x in present.values()],
            out_specs=[spec(x) for x in wanted.values()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        ),
        out_shape=[x.array for x in wanted.values()],
        input_output_aliases={
            order_in.index(source): order_out.index(target) for source, target in aliases.items()
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=work.mxu_flops + work.vpu_ops,
            transcendentals=work.exps,
            bytes_accessed=work.bytes_read + work.bytes_written,
        ),
        interpret=interpreter(),
        name=name,
    )(*scalars.values(), *(x.array for x in present.values()))
    return {key: x[..., : lanes[key]] for key, x in zip(order_out, flat, strict=True)}


def _with_whole_blocks(inputs, outputs, aliases) -> tuple[dict[str, Blocked], dict[str, Blocked]]:
    """Pads aliased operands to whole blocks of tokens; the interpreter forgets to cut its own.

    What it returns for such an output has the padded shape, whatever was declared.
    """
    inputs, outputs = dict(inputs), dict(outputs)
    for source, target in aliases.items():
        operand = inputs[source]
        if operand.block is None:
            continue
        array = operand.array
        padding = [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % operand.block[-1])]
        padded = jnp.pad(array, padding)
        inputs[source] = dataclasses.replace(operand, array=padded)
        outputs[target] = dataclasses.replace(
            outputs[target], array=jax.ShapeDtypeStruct(padded.shape, padded.dtype)
        )
    return inputs, outputs


@contextlib.contextmanager
def simulated_memory() -> Iterator[None]:
    """Interpreted kernels traced inside run with simulated HBM, VMEM, copies and semaphores.

    Races and reads of uninitialized memory show there. It takes about a hundred times as long as
    Pallas's plain interpreter, which only replays the grid.
    """
    token = _simulate.set(True)
    try:
        yield
    finally:
        _simulate.reset(token)


def interpreter() -> Any:
    """How kernels run on the CPU; False: they are compiled."""
    if not platforms.interpreted():
        return False
    if not _simulate.get():
        return True
    return pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="uninitialized", num_cores_or_threads=2
    )


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two matrices over axis contract[0] of x and contract[1] of y, in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


# --- layouts --------------------------------------------------------------------------------------


def to_lanes(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, K·G, H] -> [B, K, G, H, T], or without H: [B, T, K·G] -> [B, K, G, T]."""
    batch, length, heads = x.shape[:3]
    grouped = x.reshape(batch, length, kv_heads, heads // kv_heads, *x.shape[3:])
    return jnp.moveaxis(grouped, 1, -1)


def from_lanes(x: jax.Array) -> jax.Array:
    """The inverse of `to_lanes`."""
    tokens = jnp.moveaxis(x, -1, 1)
    return tokens.reshape(*tokens.shape[:2], -1, *tokens.shape[4:])


def keys_to_lanes(x: jax.Array) -> jax.Array:
    """[..., T, K, H] -> [..., K, H, T]."""
    return jnp.moveaxis(x, -3, -1)


def keys_from_lanes(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, -3)


# --- visible slots --------------------------------------------------------------------------------


def slot_scalars(ranges: list[tuple[Any, Any]]) -> jax.Array:
    """[3] int32 of `operands.visible_slots`: slots [0, a) and [b, c) are visible."""
    (_, stop), (start, end) = ranges if len(ranges) == 2 else [*ranges, (0, 0)]
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in (stop, start, end)])


def count_slots(slots: Any) -> Any:
    return slots[0] + jnp.maximum(slots[2] - slots[1], 0)


def slot_index(step: Any, slots: Any) -> Any:
    """The step-th visible slot; later steps stay at the last one, so that nothing is fetched."""
    step = jnp.clip(step, 0, jnp.maximum(count_slots(slots) - 1, 0))
    return jnp.where(step < slots[0], step, step - slots[0] + slots[1])
