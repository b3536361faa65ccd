"""The mosaic_gpu kernels as `benchmarks.tune` sees them: what to vary, and how to run each."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import make_inputs
from benchmarks.shapes import Shape
from benchmarks.tune_search import TunedKernel
from pallas_kernels.mosaic_gpu.depth.backward import depth_backward
from pallas_kernels.mosaic_gpu.depth.forward import depth_forward
from pallas_kernels.mosaic_gpu.depth.tiles import DepthConfig
from pallas_kernels.mosaic_gpu.fused_forward.attend import attend
from pallas_kernels.mosaic_gpu.row_tiles import forward_config
from pallas_kernels.mosaic_gpu.sequence_backward.backward import (
    DepthPart,
    fuses,
    sequence_backward,
)
from pallas_kernels.mosaic_gpu.sequence_backward.tiles import sequence_backward_config


def _slots(shape: Shape) -> np.ndarray:
    return np.asarray([0, shape.slots, shape.slots, shape.slots], np.int32)


def _scaled(function: Callable[..., Any], shape: Shape, config: Any, **settings: Any):
    return functools.partial(function, scale=shape.head_dim**-0.5, config=config, **settings)


def _rows(shape: Shape) -> tuple[jax.Array, jax.Array]:
    """lse and delta of a plausible size; their values do not change the time."""
    sizes = (shape.batch, shape.tokens, shape.heads)
    return jnp.full(sizes, np.log(shape.tokens), jnp.float32), jnp.zeros(sizes, jnp.float32)


def _run_forward(shape: Shape, config: Any):
    arrays, _ = make_inputs(shape)
    return _scaled(attend, shape, config, is_causal=True), (*arrays, jnp.asarray(_slots(shape)))


def _run_sequence_backward(shape: Shape, config: Any):
    (query, key, value, *depth), d_out = make_inputs(shape)

    def backward(query, key, value, d_out, lse, delta, depth_key, depth_value):
        part = DepthPart(depth_key, depth_value, _slots(shape))
        fused = fuses(query, key, part, is_causal=True, config=config)
        function = _scaled(
            sequence_backward,
            shape,
            config,
            is_causal=True,
            dq_dtype=query.dtype,
            depth=part if fused else None,
        )
        grads = function(query, key, value, d_out, lse, delta)
        if fused:
            return grads
        dq, new = _scaled(depth_backward, shape, None, slots=_slots(shape), is_prefix=True)(
            query, d_out, lse, delta, depth_key, depth_value, d_query=grads.query
        )
        return grads._replace(query=dq, slots=new)

    return backward, (query, key, value, d_out, *_rows(shape), *depth)


def _run_depth_forward(shape: Shape, config: Any):
    (query, _, _, *depth), _ = make_inputs(shape)
    function = _scaled(
        depth_forward, shape, config, slots=_slots(shape), is_prefix=True, valid=None
    )
    return function, (query, *depth)


def _run_depth_backward(shape: Shape, config: Any):
    (query, _, _, *depth), d_out = make_inputs(shape)
    function = _scaled(depth_backward, shape, config, slots=_slots(shape), is_prefix=True)
    return function, (query, d_out, *_rows(shape), *depth)


def kernels() -> dict[str, TunedKernel]:
    """By the name that `benchmarks.tune --kernels` takes."""
    depth = {"columns": (32, 64, 128), "stages": (2, 3, 4), "tokens_first": (False, True)}
    return {
        "forward": TunedKernel(
            lambda shape: forward_config(shape.head_dim),
            {
                "block_kv": (64, 128, 192),
                "stages": (2, 3, 4),
                "warpgroups": (2, 3),
                "persistent": (False, True),
                "turns": (False, True),
                "depth_parts": (1, 2, 4),
                "alternate": (False, True),
                "piles": (1, 2, 4),
            },
            _run_forward,
        ),
        "sequence_backward": TunedKernel(
            lambda shape: sequence_backward_config(shape.head_dim),
            {
                "dq_block_kv": (64, 128),
                "dq_stages": (2, 3),
                "dq_slot_stages": (2, 3),
                "dq_warpgroups": (2, 3),
                "dq_piles": (1, 2, 4),
                "dkv_block_q": (64, 128),
                "dkv_stages": (2, 3),
                "dkv_warpgroups": (2, 3),
                "fuse_depth": (False, True),
            },
            _run_sequence_backward,
        ),
        "depth_forward": TunedKernel(lambda _: DepthConfig(), depth, _run_depth_forward),
        "depth_backward": TunedKernel(lambda _: DepthConfig(), depth, _run_depth_backward),
    }
