"""What the TPU attention kernels of a call move and compute, and their roofline on a chip.

The numbers are the kernels' own: a call is traced for a TPU, and every launch in it hands over the
`Work` that its block schedule (`pallas_kernels.mosaic_tpu.schedule`) gives it, which is also what
the compiler is told. There is no second model of the kernels here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.hlo_cost import Kernel
from benchmarks.tpu_chips import GRID_STEP_SECONDS, Chip
from moda_jax.config import Config
from moda_jax.depth import make_mechanism
from moda_jax.ops import attention
from pallas_kernels import mosaic_tpu, platforms
from pallas_kernels.mosaic_tpu import common
from pallas_kernels.mosaic_tpu.schedule import Work


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of causal attention on one device; symbols as in `moda_attention`."""

    tokens: int
    slots: int
    """Visible ones; 0: attention over the sequence alone."""
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    segments: bool = False
    grads_dtype: str | None = None
    """Of the running gradient cache that the backward adds into; None: it writes its own."""

    def arrays(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """query, key, value, depth_key, depth_value; bfloat16."""
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        key = shape((self.batch, self.tokens, self.kv_heads, self.head_dim))
        depth = shape((self.slots, *key.shape)) if self.slots else None
        query = shape((self.batch, self.tokens, self.heads, self.head_dim))
        return query, key, key, depth, depth


class Launch(NamedTuple):
    """One kernel of a call."""

    name: str
    work: Work


@functools.cache
def launches(call: Call) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    """The kernels of the forward and those of the backward, as the operator launches them."""
    segments = jax.ShapeDtypeStruct((call.batch, call.tokens), jnp.int32) if call.segments else None

    def forward(arrays, segments):
        return mosaic_tpu.forward(*attention.check(*arrays, segment_ids=segments))

    def backward(arrays, segments, out, lse, grads):
        operands, options = attention.check(*arrays, segment_ids=segments)
        return mosaic_tpu.backward(operands, options, out, lse, out, None, grads)

    arrays = call.arrays()
    grads = None
    if call.grads_dtype is not None and call.slots:
        assert arrays[3] is not None
        grads = (jax.ShapeDtypeStruct(arrays[3].shape, call.grads_dtype),) * 2
    assert arrays[0] is not None
    lse = jax.ShapeDtypeStruct(arrays[0].shape[:3], jnp.float32)
    return traced(forward, arrays, segments), traced(
        backward, arrays, segments, arrays[0], lse, grads
    )


def traced(function: Callable[..., Any], *arrays: Any) -> tuple[Launch, ...]:
    """The kernels that a function launches on a TPU, as often as it does."""
    with platforms.compiling_for("tpu"), common.record_launches() as found:
        jaxpr = jax.make_jaxpr(function)(*arrays)
    # A loop's body is traced once; what it launches is known by what it tells the compiler.
    by_cost = {_told(work): Launch(name, work) for name, work in found}
    return tuple(by_cost[cost] for cost in _executed(jaxpr.jaxpr))


def _told(work: Work) -> tuple[int, int, int]:
    flops, nbytes = work.mxu_flops + work.vpu_ops, work.bytes_read + work.bytes_written
    return flops, work.exps, nbytes


def _executed(jaxpr: Any) -> Iterator[tuple[int, int, int]]:
    """The cost estimates of all kernels, those in loops as often as they run."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            cost = equation.params["cost_estimate"]
            yield cost.flops, cost.transcendentals, cost.bytes_accessed
            continue
        inner = [x for value in equation.params.values() for x in _jaxprs(value)]
        assert equation.primitive.name != "while" or not any(list(_executed(x)) for x in inner)
        for _ in range(equation.params["length"] if equation.primitive.name == "scan" else 1):
            for x in inner:
                yield from _executed(x)


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [x for item in value for x in _jaxprs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one launch on a chip, were each unit alone; the largest is the bound."""

    mxu: float
    vpu: float
    exps: float
    hbm: float
    steps: float
    """Overhead of the grid's steps; not in the bound, some of it overlaps."""

    @property
    def bound(self) -> float:
        return max(self.mxu, self.vpu, self.exps, self.hbm)

    @property
    def limit(self) -> str:
        """The unit that bounds."""
        return max(("mxu", "vpu", "exps", "hbm"), key=lambda unit: getattr(self, unit))


def roofline(work: Work, chip: Chip, head_dim: int) -> Roofline:
    """A head smaller than the systolic array leaves the rest of it idle, in every product."""
    idle = max(1.0, chip.mxu_size / head_dim)
    return Roofline(
        mxu=idle * work.mxu_flops / chip.mxu_flops,
        vpu=work.vpu_ops / chip.vpu_ops,
        exps=work.exps / chip.exps,
        hbm=(work.bytes_read + work.bytes_written) / chip.hbm_bandwidth,
        steps=work.steps * GRID_STEP_SECONDS / chip.cores,
    )


def bound(kernels: Iterable[Launch], chip: Chip, head_dim: int) -> float:
    """Seconds of kernels that run one after the other."""
    return sum(roofline(kernel.work, chip, head_dim).bound for kernel in kernels)


def overlapped(kernels: Iterable[Launch], chip: Chip, head_dim: int) -> float:
    """Seconds if all kernels were one, in which every unit works while the others do."""
    each = [roofline(kernel.work, chip, head_dim) for kernel in kernels]
    return max(sum(getattr(x, unit) for x in each) for unit in ("mxu", "vpu", "exps", "hbm"))


@dataclasses.dataclass(frozen=True)
class KernelCost(Kernel):
    """Cost of one launch of a kernel, averaged over the layers of a model."""

    seconds: float


def layer_call(config: Config, slots: int) -> Call:
    """What one device of the config's mesh computes in a layer that sees `slots` slots."""
    model, mesh, dtype = config.model, config.mesh, config.execution.slot_gradient_dtype
    return Call(
        tokens=config.data.seq_len,
        slots=slots,
        heads=model.num_heads // mesh.tensor,
        kv_heads=model.num_kv_heads // mesh.tensor,
        head_dim=model.head_dim,
        batch=config.batch_size // (mesh.fsdp * mesh.data * config.accumulation_steps),
        segments=True,
        grads_dtype="float32" if dtype == "auto" else dtype,
    )


def mean_kernels(config: Config, chip: Chip) -> dict[str, KernelCost]:
    """By name: FLOPs, bytes and roofline seconds of a launch, the mean over a training step.

    Empty for another attention implementation than this one.
    """
    if config.execution.attention != "mosaic_tpu":
        return {}
    found: dict[str, list[tuple[float, Work]]] = {}
    for weight, (name, work) in _launches_of_step(config):
        found.setdefault(name, []).append((weight, work))
    return {name: _mean(works, chip, config.model.head_dim) for name, works in found.items()}


def _launches_of_step(config: Config) -> Iterator[tuple[float, Launch]]:
    """(how often, kernel) of a step. What a kernel moves is linear in its number of slots, so that
    the mean number stands for all layers.
    """
    layers, slots = config.model.num_layers, make_mechanism(config.model).visible_slots()
    mean = sum(slots) / layers
    for count, weight in ((math.floor(mean), 1 - mean % 1), (math.ceil(mean), mean % 1)):
        forward, backward = launches(layer_call(config, count)) if weight else ((), ())
        for kernel in (*forward, *backward):
            yield layers * weight, kernel


def _mean(works: list[tuple[float, Work]], chip: Chip, head_dim: int) -> KernelCost:
    total = sum(weight for weight, _ in works)
    return KernelCost(
        flops=sum(w * x.mxu_flops for w, x in works) / total,
        hbm_bytes=sum(w * (x.bytes_read + x.bytes_written) for w, x in works) / total,
        seconds=sum(w * roofline(x, chip, head_dim).bound for w, x in works) / total,
    )
