"""Chunk-visible depth slots: every slot is a set of keys like the sequence's, chunk by chunk.

A query sees a slot's keys of its own chunk up to itself, which is causal attention among segments
that are (chunk, document) pairs. Slot after slot, the sequence kernels do it, and the parts are
merged through (o, lse).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu.fused_forward.attend import attend
from pallas_kernels.mosaic_gpu.sequence_backward.backward import sequence_backward
from pallas_kernels.operands import Operands, Options, visible_slots


def chunk_segments(segments: jax.Array | None, shape: tuple[int, ...], chunk: int) -> jax.Array:
    """[B, T] int32: equal for tokens of one chunk and one document; 0 for padding."""
    batch, length = shape
    position = jnp.arange(length, dtype=jnp.int32)
    if segments is None:
        return jnp.broadcast_to(position // chunk + 1, shape)
    size = min(chunk, length)
    padded = jnp.pad(segments, ((0, 0), (0, -length % size))).reshape(batch, -1, size)
    # Documents are named, within a chunk, by their first position in it.
    first = jnp.argmax(padded[..., :, None] == padded[..., None, :], axis=-1).astype(jnp.int32)
    names = jnp.arange(padded.shape[1], dtype=jnp.int32)[:, None] * size + first + 1
    return jnp.where(padded == 0, 0, names).reshape(batch, -1)[:, :length]


def forward(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """(o, lse) over the sequence, if there is one, and the visible slots."""
    query, key, value, depth_key, depth_value = operands[:5]
    assert depth_key is not None
    assert depth_value is not None
    assert options.depth_chunk is not None
    names = chunk_segments(operands.query_segments, query.shape[:2], options.depth_chunk)
    if key is None:
        out = jnp.zeros(query.shape, jnp.float32)
        lse = jnp.full(query.shape[:3], -jnp.inf, jnp.float32)
    else:
        out, lse = attend(
            query,
            key,
            value,
            None,
            None,
            None,
            scale=options.scale,
            is_causal=options.is_causal,
            query_segments=operands.query_segments,
            key_segments=operands.key_segments,
        )

    def body(slot, state):
        part = attend(
            query,
            depth_key[slot],
            depth_value[slot],
            None,
            None,
            None,
            scale=options.scale,
            is_causal=True,
            query_segments=names,
            key_segments=names,
        )
        return _merge(state, part)

    state = (out.astype(jnp.float32), lse)
    for start, stop in visible_slots(operands, options):
        state = lax.fori_loop(start, stop, body, state)
    return state[0].astype(query.dtype), state[1]


def _merge(state: Any, part: Any) -> tuple[jax.Array, jax.Array]:
    (out, lse), (new_out, new_lse) = state, part
    total = jnp.logaddexp(lse, new_lse)
    shift = jnp.where(jnp.isneginf(total), 0.0, total)  # neither part saw a key: weights e^-inf = 0
    weights = (jnp.exp(x - shift)[..., None] for x in (lse, new_lse))
    return out * next(weights) + new_out.astype(out.dtype) * next(weights), total


def backward(
    operands: Operands,
    options: Options,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_query: jax.Array | None,
    depth_grads: tuple[jax.Array, jax.Array] | None,
    *,
    want_depth: bool,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """(dq with `d_query` added, gradients of the slots or None)."""
    query, _, _, depth_key, depth_value = operands[:5]
    assert depth_key is not None
    assert depth_value is not None
    assert options.depth_chunk is not None
    names = chunk_segments(operands.query_segments, query.shape[:2], options.depth_chunk)
    if depth_grads is None:
        depth_grads = (jnp.zeros_like(depth_key), jnp.zeros_like(depth_value))

    def body(slot, carry):
        total, grads = carry
        dq, *new, _ = sequence_backward(
            query,
            depth_key[slot],
            depth_value[slot],
            d_out,
            lse,
            delta,
            scale=options.scale,
            is_causal=True,
            query_segments=names,
            key_segments=names,
        )
        if want_depth:
            grads = tuple(_add_slot(g, slot, d) for g, d in zip(grads, new, strict=True))
        return total + dq, grads

    total = jnp.zeros(query.shape, jnp.float32)
    carry = (total if d_query is None else d_query.astype(jnp.float32), depth_grads)
    for start, stop in visible_slots(operands, options):
        carry = lax.fori_loop(start, stop, body, carry)
    return carry[0].astype(query.dtype), carry[1] if want_depth else None


def _add_slot(grads: jax.Array, slot: jax.Array, d: jax.Array) -> jax.Array:
    old = lax.dynamic_index_in_dim(grads, slot, 0, keepdims=False)
    new = (old.astype(jnp.float32) + d.astype(jnp.float32)).astype(grads.dtype)
    return lax.dynamic_update_index_in_dim(grads, new, slot, 0)
