"""Backward: with the unified o and lse, the sequence and the depth part are independent.

    p = e^(z - lse)     dv = p^T do     ds = p (do v^T - delta + dlse)
    dq = scale ds k     dk = scale ds^T q

with delta = rowsum(do o). The running gradient cache is added to slot by slot, in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.operands import (
    Gradients,
    MaskTokens,
    Operands,
    Options,
    depth_tokens,
    key_tokens,
    num_kv_heads,
    query_tokens,
    row_delta,
    visible_slots,
)
from pallas_kernels.varying import vary_like
from pallas_kernels.xla import tiles


class _RowsByHead(NamedTuple):
    """Per query row, heads first."""

    query: jax.Array  # [B, K, T, G, H]
    do: jax.Array  # [B, K, T, G, H]
    lse: jax.Array  # [B, K, T, G]; 0 where the row sees nothing
    delta: jax.Array  # [B, K, T, G]: rowsum(do o) - dlse


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
    """See `contract.Backward`; `depth_grads` may have any float dtype."""
    assert depth or depth_grads is None
    if depth and depth_grads is None and operands.depth_key is not None:
        depth_grads = jnp.zeros_like(operands.depth_key), jnp.zeros_like(operands.depth_value)
    depth_grads = vary_like(depth_grads, (operands, d_out))
    kv_heads = num_kv_heads(operands)
    delta = row_delta(out, lse, d_out, d_lse)
    safe_lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
    rows = _RowsByHead(
        *(
            tiles.to_heads_first(x, kv_heads)
            for x in (operands.query, d_out.astype(operands.query.dtype), safe_lse, delta)
        )
    )
    d_query = vary_like(jnp.zeros(rows.query.shape, delta.dtype), (operands, d_out))
    d_key = d_value = None
    d_depth_key, d_depth_value = (None, None) if depth_grads is None else depth_grads
    if operands.depth_key is not None and operands.depth_key.shape[0]:
        part = _slots if options.depth_chunk is None else _chunks
        d_query, d_depth_key, d_depth_value = part(
            rows, operands, options, (d_query, d_depth_key, d_depth_value)
        )
    if operands.key is not None:
        d_query, d_key, d_value = tokens_backward(
            rows,
            d_query,
            operands.key,
            operands.value,
            query_tokens(operands),
            key_tokens(operands),
            scale=options.scale,
            causal=options.is_causal,
            chunk=None,
            offset_known=operands.query_offset is None,
        )
        d_key, d_value = d_key.astype(operands.key.dtype), d_value.astype(operands.key.dtype)
    d_query = tiles.to_tokens_first(d_query).astype(operands.query.dtype)
    return Gradients(d_query, d_key, d_value, d_depth_key, d_depth_value)


def tokens_backward(
    rows: _RowsByHead,
    d_query: jax.Array,
    key_BxTxKxH: jax.Array,
    value_BxTxKxH: jax.Array,
    query_side: MaskTokens,
    key_side: MaskTokens,
    *,
    scale: float,
    causal: bool,
    chunk: int | None,
    offset_known: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds to d_query [B, K, T, G, H]; returns it with dk and dv [B, Tk, K, H] in float32."""
    batch, kv_heads, q_len, group, _ = rows.query.shape
    k_len = key_BxTxKxH.shape[1]
    dtype = d_query.dtype
    if k_len == 0 or q_len == 0:
        return d_query, jnp.zeros(key_BxTxKxH.shape, dtype), jnp.zeros(value_BxTxKxH.shape, dtype)
    config = tiles.choose_config(batch * kv_heads * group, q_len, k_len, chunk)
    q_block, k_block = config.q_block, config.k_block
    rows = _RowsByHead(*(tiles.pad_axis(x, 2, q_block) for x in rows))
    d_query = tiles.pad_axis(d_query, 2, q_block)
    key, value = (
        tiles.pad_axis(jnp.moveaxis(x, 2, 1), 2, k_block) for x in (key_BxTxKxH, value_BxTxKxH)
    )
    sides = tiles.pad_side(query_side, q_block), tiles.pad_side(key_side, k_block)
    schedule = tiles.tile_schedule(
        q_len, k_len, (q_block, k_block), causal=causal, chunk=chunk, offset_known=offset_known
    )

    def body(i, j, grads):
        here = _RowsByHead(*(tiles.take_tile(x, 2, i, q_block) for x in rows))
        key_tile, value_tile = (tiles.take_tile(x, 2, j, k_block) for x in (key, value))
        key_here = tiles.take_side(sides[1], j, k_block)
        if key_here.valid is not None:  # as in the forward: uninitialized keys may be NaN
            written = key_here.valid[:, None, :, None]
            key_tile = jnp.where(written, key_tile, 0)
            value_tile = jnp.where(written, value_tile, 0)
        query_here = tiles.take_side(sides[0], i, q_block)
        mask = tiles.tile_mask(query_here, key_here, causal=causal, chunk=chunk)
        scores = scale * tiles.dot("bktgh,bksh->bktgs", here.query, key_tile)
        p, ds = _weights(scores, tiles.dot("bktgh,bksh->bktgs", here.do, value_tile), here, mask)
        p, ds = p.astype(here.do.dtype), (scale * ds).astype(here.query.dtype)
        return (
            tiles.add_tile(grads[0], 2, i, tiles.dot("bktgs,bksh->bktgh", ds, key_tile)),
            tiles.add_tile(grads[1], 2, j, tiles.dot("bktgs,bktgh->bksh", ds, here.query)),
            tiles.add_tile(grads[2], 2, j, tiles.dot("bktgs,bktgh->bksh", p, here.do)),
        )

    init = (d_query, jnp.zeros(key.shape, dtype), jnp.zeros(value.shape, dtype))
    init = vary_like(init, (rows, key, value, sides))
    d_query, d_key, d_value = tiles.for_each_pair(schedule, len(schedule), body, init)
    d_key, d_value = (jnp.moveaxis(x[:, :, :k_len], 1, 2) for x in (d_key, d_value))
    return d_query[:, :, :q_len], d_key, d_value


def _weights(scores, d_weights, rows: _RowsByHead, mask) -> tuple[jax.Array, jax.Array]:
    """p and ds / scale of the keys in the last axis; exactly 0 where masked."""
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    p = tiles.weights(scores, rows.lse[..., None])
    ds = p * (d_weights - rows.delta[..., None])
    return p, ds if mask is None else jnp.where(mask, ds, 0.0)  # padding's values may be NaN


def _slots(rows: _RowsByHead, operands: Operands, options: Options, grads):
    """Depth slots of the query's own token; all terms are local to the token.

    Tokens first and slot after slot, as `forward._attend_slots`.
    """
    rows = _RowsByHead(*(jnp.moveaxis(x, 1, 2) for x in rows))
    valid = query_tokens(operands).valid
    mask = None if valid is None else valid[:, :, None, None, None]

    def body(slot, grads):
        d_query, d_key, d_value = grads
        key, value = operands.depth_key[slot], operands.depth_value[slot]
        scores = options.scale * tiles.dot("btkgh,btkh->btkg", rows.query, key)
        d_weights = tiles.dot("btkgh,btkh->btkg", rows.do, value)
        p, ds = _weights(scores[..., None], d_weights[..., None], rows, mask)
        ds = options.scale * ds
        return (
            d_query + ds * key[:, :, :, None].astype(ds.dtype),
            _add_slot(d_key, slot, jnp.sum(ds * rows.query, axis=3)),
            _add_slot(d_value, slot, jnp.sum(p * rows.do, axis=3)),
        )

    grads = jnp.moveaxis(grads[0], 1, 2), *grads[1:]
    grads = tiles.for_each_slot(visible_slots(operands, options), body, grads)
    return jnp.moveaxis(grads[0], 2, 1), *grads[1:]


def _chunks(rows: _RowsByHead, operands: Operands, options: Options, grads):
    """Chunk-visible: the gradient of `forward._attend_chunks`, slot after slot."""
    chunk = options.depth_chunk

    def body(slot, grads):
        d_query, d_depth_key, d_depth_value = grads
        d_query, d_key, d_value = tokens_backward(
            rows,
            d_query,
            operands.depth_key[slot],
            operands.depth_value[slot],
            query_tokens(operands),
            depth_tokens(operands, chunk),
            scale=options.scale,
            causal=True,
            chunk=chunk,
            offset_known=operands.query_offset is None,
        )
        return (
            d_query,
            _add_slot(d_depth_key, slot, d_key),
            _add_slot(d_depth_value, slot, d_value),
        )

    return tiles.for_each_slot(visible_slots(operands, options), body, grads)


def _add_slot(grads_SxBxTxKxH: jax.Array | None, slot: jax.Array, block: jax.Array):
    """Read, add in the wider dtype, write back: one pass over the slot's memory."""
    if grads_SxBxTxKxH is None:
        return None
    old = lax.dynamic_index_in_dim(grads_SxBxTxKxH, slot, 0, keepdims=False)
    new = (old.astype(block.dtype) + block).astype(grads_SxBxTxKxH.dtype)
    return lax.dynamic_update_index_in_dim(grads_SxBxTxKxH, new, slot, 0)
