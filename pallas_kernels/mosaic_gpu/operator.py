"""The backend's functions: which kernels a call takes, and the paddings they ask for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import chunks
from pallas_kernels.mosaic_gpu.depth.backward import depth_backward
from pallas_kernels.mosaic_gpu.depth.forward import depth_forward
from pallas_kernels.mosaic_gpu.depth.gather import COLUMNS as GATHER_COLUMNS
from pallas_kernels.mosaic_gpu.fused_forward.attend import attend
from pallas_kernels.mosaic_gpu.sequence_backward.backward import DepthPart, fuses, sequence_backward
from pallas_kernels.operands import (
    Gradients,
    Operands,
    Options,
    row_delta,
    visible_slots,
)

_HEAD_DIMS = (64, 128)


def unsupported_reason(operands: Operands, options: Options, platform: str) -> str | None:
    """See `contract.UnsupportedReason`."""
    if platform == "tpu":
        return "Mosaic GPU kernels need an NVIDIA GPU"
    if platform == "gpu" and (reason := _device_unsupported_reason()):
        return reason
    if jax.__version_info__ < (0, 11):
        return f"needs JAX >= 0.11, this is {jax.__version__}"
    dtype = operands.query.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if operands.query.shape[-1] > _HEAD_DIMS[-1]:
        return f"takes head sizes up to {_HEAD_DIMS[-1]}, not {operands.query.shape[-1]}"
    if operands.query_offset is not None or operands.kv_length is not None:
        return "is for training and prefill: no query_offset or kv_length"
    if operands.query.shape[1] == 0 or (operands.key is not None and operands.key.shape[1] == 0):
        return "needs at least one token"
    return None


@functools.cache
def _device_unsupported_reason() -> str | None:
    """Of the first device: all devices of a mesh are of one kind."""
    if platforms.current() != jax.default_backend().replace("cuda", "gpu"):
        return None  # compiled ahead of time for a chip that is not here
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", None))
    if capability != "9.0":
        return f"needs compute capability 9.0 (H100, H200), {device.device_kind} has {capability}"
    return None


def _one_by_one(function: Any) -> Any:
    """Under vmap, call after call: another leading axis would be one too many for TMA."""
    return jax.custom_batching.sequential_vmap(function)


def forward(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """See `contract.Forward`."""
    return _one_by_one(functools.partial(_forward, options=options))(operands)


def _forward(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    head_dim = operands.query.shape[-1]
    operands = _pad_head_dim(operands)
    query, key, value, depth_key, depth_value = operands[:5]
    has_depth = depth_key is not None and depth_key.shape[0] > 0
    settings: dict[str, Any] = {"scale": options.scale}
    ids: dict[str, Any] = {
        "query_segments": operands.query_segments,
        "key_segments": operands.key_segments,
    }
    if has_depth and options.depth_chunk is not None:
        out, lse = chunks.forward(operands, options)
    elif has_depth and key is None:
        segments = operands.query_segments
        out, lse = depth_forward(
            query,
            depth_key,
            depth_value,
            _slots(operands, options),
            is_prefix=options.depth_window is None,
            valid=None if segments is None else segments != 0,
            **settings,
        )
    elif has_depth:
        out, lse = attend(
            query,
            key,
            value,
            depth_key,
            depth_value,
            jnp.asarray(_slots(operands, options)),
            is_causal=options.is_causal,
            **settings,
            **ids,
        )
    else:
        out, lse = attend(
            query, key, value, None, None, None, is_causal=options.is_causal, **settings, **ids
        )
    return out[..., :head_dim], lse


def backward(
    operands: Operands,
    options: Options,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array | None,
    depth_grads: tuple[jax.Array, jax.Array] | None = None,
    *,
    depth: bool = True,
) -> Gradients:
    """See `contract.Backward`."""
    assert depth or depth_grads is None
    call = functools.partial(_backward, options, want_depth=depth)
    return _one_by_one(call)(operands, out, lse, d_out, d_lse, depth_grads)


def _backward(options, operands, out, lse, d_out, d_lse, depth_grads, *, want_depth) -> Gradients:
    head_dim = operands.query.shape[-1]
    delta = row_delta(out, lse, d_out, d_lse)
    operands = _pad_head_dim(operands)
    width = operands.query.shape[-1]
    d_out = _pad_last(d_out, width)
    query, key, value, depth_key, depth_value = operands[:5]
    running = None
    if depth_grads is not None:
        running = _pad_last(depth_grads[0], width), _pad_last(depth_grads[1], width)
    depth = None
    if depth_key is not None and depth_key.shape[0] and options.depth_chunk is None:
        slots = _slots(operands, options)
        depth = DepthPart(depth_key, depth_value, slots, running, want_depth)
    d_query = d_key = d_value = new = None
    fused = False  # whether the sequence part's kernel for dq does the depth part, too
    if key is not None:
        fused = depth is not None and fuses(query, key, depth, is_causal=options.is_causal)
        d_query, d_key, d_value, new = sequence_backward(
            query,
            key,
            value,
            d_out,
            lse,
            delta,
            scale=options.scale,
            is_causal=options.is_causal,
            query_segments=operands.query_segments,
            key_segments=operands.key_segments,
            depth=depth if fused else None,
            dq_dtype=query.dtype,
        )
    if depth_key is not None and not depth_key.shape[0]:
        new = running or (depth_key, depth_value)
    elif depth_key is not None and options.depth_chunk is not None:
        d_query, new = chunks.backward(
            operands, options, d_out, lse, delta, d_query, running, want_depth=want_depth
        )
    elif depth is not None and not fused:
        d_query, new = depth_backward(
            query,
            d_out,
            lse,
            delta,
            depth_key,
            depth_value,
            depth.slots,
            scale=options.scale,
            is_prefix=options.depth_window is None,
            d_query=d_query,
            depth_grads=running,
            want_depth=want_depth,
        )
    grads = [d_query, d_key, d_value, *(new if new is not None and want_depth else (None, None))]
    return Gradients(*(None if x is None else x[..., :head_dim] for x in grads))


def gather_unsupported_reason(operands: Operands) -> str | None:
    """See `contract.GatherUnsupportedReason`: other shapes pad whole caches for every layer."""
    length, _, head_dim = operands.query.shape[1:]
    if head_dim not in _HEAD_DIMS:
        return f"gathers for head sizes {_HEAD_DIMS}, not {head_dim}"
    if length % GATHER_COLUMNS:
        return f"gathers for rows of a multiple of {GATHER_COLUMNS} tokens, not {length}"
    return None


def _slots(operands: Operands, options: Options) -> Any:
    """[4] int32: the two ranges of visible slots; a numpy array if they are known."""
    ranges = visible_slots(operands, options)
    if len(ranges) == 1:
        stop = ranges[0][1]
        ranges = [*ranges, (stop, stop)]
    bounds = [bound for pair in ranges for bound in pair]
    if all(isinstance(bound, int) for bound in bounds):
        return np.asarray(bounds, np.int32)
    return jnp.stack([jnp.asarray(bound, jnp.int32) for bound in bounds])


def _padded_size(head_dim: int) -> int:
    return next(size for size in _HEAD_DIMS if size >= head_dim)


def _pad_last(x: jax.Array, size: int) -> jax.Array:
    missing = size - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _pad_head_dim(operands: Operands) -> Operands:
    """Zeros up to a head size that the kernels have: scores and values do not change."""
    size = _padded_size(operands.query.shape[-1])
    arrays = (None if x is None else _pad_last(x, size) for x in operands[:5])
    return operands._replace(**dict(zip(Gradients._fields, arrays, strict=True)))
