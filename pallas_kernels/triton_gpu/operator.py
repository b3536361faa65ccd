"""The backend's functions: which calls it takes, and the order of its kernels.

Forward: the depth slots first, then the sequence, which goes on with the depth part's softmax.
Backward: the depth part, whose dq the sequence's dq is added to; dk and dv.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.operands import (
    Gradients,
    Operands,
    Options,
    num_kv_heads,
    row_delta,
    visible_slots,
)
from pallas_kernels.triton_gpu import calls, launch
from pallas_kernels.triton_gpu.calls import MAX_GROUP, MAX_HEAD_DIM, KernelCall, QueryRows


def unsupported_reason(operands: Operands, options: Options, platform: str) -> str | None:
    """See `contract.UnsupportedReason`."""
    if reason := launch.unsupported_reason(platform):
        return reason
    dtype = operands.query.dtype
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 and float32, not {dtype}"
    if platform == "cpu" and dtype == jnp.bfloat16:
        return "Triton's interpreter multiplies no bfloat16: on a CPU float16 and float32 only"
    if operands.query.shape[-1] > MAX_HEAD_DIM:
        return f"takes head sizes up to {MAX_HEAD_DIM}, not {operands.query.shape[-1]}"
    group = operands.query.shape[2] // num_kv_heads(operands)
    if group > MAX_GROUP:
        return f"takes up to {MAX_GROUP} query heads per key/value head, not {group}"
    if operands.query_offset is not None or operands.kv_length is not None:
        return "is for training and prefill: no query_offset or kv_length"
    if operands.query.size == 0 or (operands.key is not None and operands.key.shape[1] == 0):
        return "needs at least one token"
    return None


def _one_by_one(function: Any) -> Any:
    """Under vmap, call after call: a kernel knows its axes."""
    return jax.custom_batching.sequential_vmap(function)


def _positive_scale(operands: Operands, options: Options) -> tuple[Operands, float, int]:
    """Kernels take scale > 0: (operands, scale, sign), the sign moved into the queries."""
    scale = options.scale
    if scale > 0:
        return operands, scale, 1
    sign = -1 if scale < 0 else 0
    return operands._replace(query=operands.query * sign), -scale if sign else 1.0, sign


def forward(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """See `contract.Forward`."""
    return _one_by_one(functools.partial(_forward, options))(operands)


def _forward(options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
    operands, scale, _ = _positive_scale(operands, options)
    part = KernelCall(operands, options, scale)
    if not part.has_depth:
        return calls.sequence_forward(part, None)
    depth = calls.chunk_forward if options.depth_chunk is not None else calls.depth_forward
    if operands.key is None:
        return depth(part, _bounds(operands, options), operands.query.dtype)
    return calls.sequence_forward(part, depth(part, _bounds(operands, options), jnp.float32))


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
    delta = row_delta(out, lse, d_out, d_lse)
    operands, scale, sign = _positive_scale(operands, options)
    part = KernelCall(operands, options, scale)
    rows = QueryRows(operands.query, d_out.astype(operands.query.dtype), lse, delta)
    partial_dq, d_depth = None, depth_grads
    if part.has_depth:
        depth = calls.chunk_backward if options.depth_chunk is not None else calls.depth_backward
        # Another kernel goes on with dq in float32; the last one rounds it.
        dq_dtype = rows.query.dtype if operands.key is None else jnp.float32
        partial_dq, d_depth = depth(
            part, rows, _bounds(operands, options), dq_dtype, depth_grads, want_depth=want_depth
        )
    elif operands.depth_key is not None and depth_grads is None:
        d_depth = operands.depth_key, operands.depth_value  # no slots: empty arrays
    d_query, d_key, d_value = partial_dq, None, None
    if operands.key is not None:
        d_key, d_value = calls.sequence_dkv(part, rows)
        d_query = calls.sequence_dq(part, rows, partial_dq)
    elif not part.has_depth:
        d_query = jnp.zeros_like(operands.query)
    if sign != 1:
        d_query = d_query * sign
    return Gradients(d_query, d_key, d_value, *(d_depth if want_depth and d_depth else (None,) * 2))


def _bounds(operands: Operands, options: Options) -> jax.Array:
    """[2] or [4] int32: start and stop of the ranges of visible slots."""
    bounds = [bound for pair in visible_slots(operands, options) for bound in pair]
    return jnp.stack([jnp.asarray(bound, jnp.int32) for bound in bounds])
