"""The Triton kernels as `benchmarks.tune` sees them: what to vary, and how to run each."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import make_inputs
from benchmarks.shapes import Shape
from benchmarks.tune_search import TunedKernel
from pallas_kernels.contract import ArrayPair
from pallas_kernels.operands import Operands, Options
from pallas_kernels.triton_gpu import calls, tiles

Arrays = tuple[jax.Array, ...]


@functools.lru_cache(maxsize=1)
def _arguments(shape: Shape) -> tuple[Arrays, jax.Array, jax.Array]:
    """The operands, do, and float32 rows: lse and delta of a plausible size."""
    arrays, d_out = make_inputs(shape)
    rows = jnp.full(d_out.shape[:3], np.log(shape.tokens), jnp.float32)
    return arrays, d_out, rows


def _with(
    call: Callable[..., Any], shape: Shape, config: Any, *, depth: bool, backward: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, arguments): `call` on the sequence or on the depth slots."""
    (query, key, value, *slots), d_out, rows = _arguments(shape)
    bounds = jnp.asarray([0, shape.slots], jnp.int32)
    scale = shape.head_dim**-0.5

    def run(query: jax.Array, pair: Arrays, *rest: jax.Array) -> Any:
        both = (None, None, *pair) if depth else (*pair, None, None)
        part = calls.KernelCall(Operands(query, *both), Options(scale), scale)
        given = [calls.QueryRows(query, rest[0], rest[1], rest[1])] if backward else []
        return call(part, *given, *([bounds] if depth else []), config=config)

    pair = tuple(slots) if depth else (key, value)
    return run, (query, pair, *((d_out, rows) if backward else ()))


def _forward_after_slots(part: calls.KernelCall, config: tiles.TileConfig) -> ArrayPair:
    """The sequence's forward, going on from a softmax over slots, as in calls that have them."""
    shape = part.operands.query.shape
    partial = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:3], jnp.float32)
    return calls.sequence_forward(part, partial, config)


def _dq_after_slots(
    part: calls.KernelCall, rows: calls.QueryRows, config: tiles.TileConfig
) -> jax.Array:
    """The sequence's dq, added to the slots'."""
    partial_dq = jnp.zeros(part.operands.query.shape, jnp.float32)
    return calls.sequence_dq(part, rows, partial_dq, config)


def kernels() -> dict[str, TunedKernel]:
    """By the name that the table's keys use."""
    rows: dict[str, Any] = {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
    tokens = rows | {"rows": (64, 128), "keys": (32, 64, 128)}
    slots = {
        "rows": (16, 32, 64),
        "keys": (32, 64, 128),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (1, 2, 3, 4),
    }

    def kernel(name: str, call: Any, grid: Any, *, depth: bool, backward: bool) -> TunedKernel:
        def default(shape: Shape) -> tiles.TileConfig:
            return tiles.choose(
                name, head_dim=shape.head_dim, group=shape.group, is_causal=True, dtype=jnp.bfloat16
            )

        def run(shape: Shape, config: Any) -> Any:
            return _with(call, shape, config, depth=depth, backward=backward)

        return TunedKernel(default, grid, run)

    return {
        "sequence_forward": kernel(
            "sequence_forward", _forward_after_slots, tokens, depth=False, backward=False
        ),
        "sequence_dkv": kernel(
            "sequence_dkv",
            calls.sequence_dkv,
            tokens | {"rows": (32, 64, 128), "num_stages": (1, 2, 3, 4)},
            depth=False,
            backward=True,
        ),
        "sequence_dq": kernel("sequence_dq", _dq_after_slots, tokens, depth=False, backward=True),
        "depth_forward": kernel(
            "depth_forward",
            functools.partial(calls.depth_forward, out_dtype=jnp.float32),
            slots,
            depth=True,
            backward=False,
        ),
        "depth_backward": kernel(
            "depth_backward",
            functools.partial(
                calls.depth_backward, dq_dtype=jnp.float32, depth_grads=None, want_depth=True
            ),
            slots,
            depth=True,
            backward=True,
        ),
    }
