"""Gradients of a few depth slots, gathered from the layers whose queries read them.

In `backward` a layer adds to the running gradients of all the slots that it read, which are read
and written again by every layer. Gathering keeps the layers' queries and output gradients instead,
and writes a slot's gradient once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.operands import (
    KeptLayers,
    Operands,
    accumulator_dtype,
    num_kv_heads,
    row_delta,
)
from pallas_kernels.varying import vary_like
from pallas_kernels.xla import tiles


def keep_layer(
    operands: Operands,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array | None,
) -> KeptLayers:
    """See `contract.KeepLayer`."""
    delta = row_delta(out, lse, d_out, d_lse)
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # e^(s - inf) = 0
    batch, kv_heads = lse.shape[0], num_kv_heads(operands)
    rows = jnp.stack([lse, delta], axis=1).reshape(batch, 2, lse.shape[1], kv_heads, -1)
    rows = jnp.moveaxis(rows, 3, 1).reshape(batch, kv_heads, -1)
    return KeptLayers(operands.query, d_out.astype(operands.query.dtype), rows)


def gather_unsupported_reason(operands: Operands) -> str | None:
    """See `contract.GatherUnsupportedReason`: any shape will do."""
    return None


def gather_depth_grads(
    kept: KeptLayers,
    depth_key: jax.Array,
    depth_value: jax.Array,
    layers: tuple[Any, Any],
    first: Any,
    count: int,
    *,
    scale: float,
    dtype: Any,
    so_far: tuple[jax.Array, jax.Array] | None = None,
    offset: Any = 0,
) -> tuple[jax.Array, jax.Array]:
    """See `contract.GatherDepthGrads`."""
    slots = [lax.dynamic_slice_in_dim(x, first, count) for x in (depth_key, depth_value)]
    key, value = slots
    batch, length, kv_heads, head_dim = key.shape[1:]
    heads = (batch, length, kv_heads, -1)

    def body(layer, grads):
        query, d_out = (x[layer].reshape(*heads, head_dim) for x in kept[:2])
        rows = kept.rows[layer].reshape(batch, kv_heads, 2, length, -1)
        lse, delta = (jnp.moveaxis(rows[:, :, i], 1, 2) for i in (0, 1))
        scores = scale * tiles.dot("btkgh,sbtkh->sbtkg", query, key)
        p = tiles.weights(scores, lse)
        ds = scale * p * (tiles.dot("btkgh,sbtkh->sbtkg", d_out, value) - delta)
        d_key = jnp.sum(ds[..., None] * query, axis=4)
        return grads[0] + d_key, grads[1] + jnp.sum(p[..., None] * d_out, axis=4)

    sums = tuple(jnp.zeros(key.shape, accumulator_dtype(key.dtype)) for _ in slots)
    if so_far is not None:
        parts = (lax.dynamic_slice_in_dim(x, offset, count) for x in so_far)
        sums = tuple(part.astype(total.dtype) for part, total in zip(parts, sums, strict=True))
    sums = vary_like(sums, (kept, slots))
    start, stop = (jnp.int32(x) for x in layers)
    d_key, d_value = lax.fori_loop(start, stop, body, sums)
    return d_key.astype(dtype), d_value.astype(dtype)
