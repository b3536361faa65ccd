"""Forward: one online softmax over the depth slots, then over the sequence tiles."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.operands import (
    MaskTokens,
    Operands,
    Options,
    accumulator_dtype,
    depth_tokens,
    key_tokens,
    num_kv_heads,
    query_tokens,
    visible_slots,
)
from pallas_kernels.varying import vary_like
from pallas_kernels.xla import tiles


class OnlineSoftmax(NamedTuple):
    """Running state of an online softmax: o = total / denominator."""

    total: jax.Array  # [B, K, T, G, H], float32 or wider
    maximum: jax.Array  # [B, K, T, G], of the products q·k, before they are scaled
    denominator: jax.Array  # [B, K, T, G]


def unsupported_reason(operands: Operands, options: Options, platform: str) -> str | None:
    """See `contract.UnsupportedReason`."""
    if operands.query.dtype.itemsize == 8:
        return "float64 is for the reference only"
    return None


def forward(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """See `contract.Forward`."""
    query, scale = _positive_scale(operands.query, options.scale)
    query = tiles.to_heads_first(query, num_kv_heads(operands))
    dtype = accumulator_dtype(query.dtype)
    state = OnlineSoftmax(
        jnp.zeros(query.shape, dtype),
        jnp.full(query.shape[:-1], -jnp.inf, dtype),
        jnp.zeros(query.shape[:-1], dtype),
    )
    state = vary_like(state, operands)
    if operands.depth_key is not None and operands.depth_key.shape[0]:
        attend = _attend_slots if options.depth_chunk is None else _attend_chunks
        state = attend(state, query, operands, dataclasses.replace(options, scale=scale))
    if operands.key is not None:
        state = attend_tokens(
            state,
            query,
            operands.key,
            operands.value,
            query_tokens(operands),
            key_tokens(operands),
            scale=scale,
            causal=options.is_causal,
            chunk=None,
            offset_known=operands.query_offset is None,
            kv_length=operands.kv_length,
        )
    seen = state.denominator > 0
    denominator = jnp.where(seen, state.denominator, 1.0)
    out = state.total / denominator[..., None]
    lse = jnp.where(seen, scale * state.maximum + jnp.log(denominator), -jnp.inf)
    return tiles.to_tokens_first(out.astype(query.dtype)), tiles.to_tokens_first(lse)


def _positive_scale(query: jax.Array, scale: float) -> tuple[jax.Array, float]:
    """A query and a scale > 0 with the same scores: the largest product has the largest score."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale else (0 * query, 1.0)


def _update(state: OnlineSoftmax, products: jax.Array, scale: float, weigh_values) -> OnlineSoftmax:
    """Adds the keys of the last axis; weigh_values maps their weights to weighted sums.

    Subtracts before it scales. XLA fuses scale·x - max into one operation, which rounds the product
    otherwise than max was: at scores of 1e10 weights would be inf, and o NaN.
    """
    maximum = jnp.maximum(state.maximum, products.max(axis=-1))
    # A row that has seen nothing yet has maximum -inf: subtract 0, not -inf, to get 0, not NaN.
    shift = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    weights = jnp.exp(scale * (products - shift[..., None]))
    decay = jnp.exp(scale * (state.maximum - shift))
    return OnlineSoftmax(
        state.total * decay[..., None] + weigh_values(weights),
        maximum,
        state.denominator * decay + weights.sum(axis=-1),
    )


def attend_tokens(
    state: OnlineSoftmax,
    query: jax.Array,
    key_BxTxKxH: jax.Array,
    value_BxTxKxH: jax.Array,
    query_side: MaskTokens,
    key_side: MaskTokens,
    *,
    scale: float,
    causal: bool,
    chunk: int | None,
    offset_known: bool,
    kv_length: jax.Array | None,
) -> OnlineSoftmax:
    """Continues the softmax over the tokens of one key set, tile by tile."""
    batch, kv_heads, q_len, group, _ = query.shape
    k_len = key_BxTxKxH.shape[1]
    if k_len == 0 or q_len == 0:
        return state
    config = tiles.choose_config(batch * kv_heads * group, q_len, k_len, chunk)
    q_block, k_block = config.q_block, config.k_block
    query = tiles.pad_axis(query, 2, q_block)
    key, value = (
        tiles.pad_axis(jnp.moveaxis(x, 2, 1), 2, k_block) for x in (key_BxTxKxH, value_BxTxKxH)
    )
    state = OnlineSoftmax(*(tiles.pad_axis(x, 2, q_block) for x in state))
    sides = tiles.pad_side(query_side, q_block), tiles.pad_side(key_side, k_block)
    schedule = tiles.tile_schedule(
        q_len, k_len, (q_block, k_block), causal=causal, chunk=chunk, offset_known=offset_known
    )
    num_pairs: jax.Array | int = len(schedule)
    if kv_length is not None and not (offset_known and causal):
        # Decoding with a preallocated cache: key tiles past every row's length are not read.
        num_q, num_k = query.shape[2] // q_block, key.shape[2] // k_block
        num_pairs = jnp.minimum((kv_length.max() + k_block - 1) // k_block, num_k) * num_q

    def body(i, j, state: OnlineSoftmax) -> OnlineSoftmax:
        here = OnlineSoftmax(*(tiles.take_tile(x, 2, i, q_block) for x in state))
        query_tile = tiles.take_tile(query, 2, i, q_block)
        key_tile, value_tile = (tiles.take_tile(x, 2, j, k_block) for x in (key, value))
        key_here = tiles.take_side(sides[1], j, k_block)
        mask = tiles.tile_mask(
            tiles.take_side(sides[0], i, q_block), key_here, causal=causal, chunk=chunk
        )
        products = tiles.dot("bktgh,bksh->bktgs", query_tile, key_tile)
        if mask is not None:
            products = jnp.where(mask, products, -jnp.inf)
        if kv_length is not None:  # uninitialized keys may be NaN, and 0 * NaN is NaN
            value_tile = jnp.where(key_here.valid[:, None, :, None], value_tile, 0)
        new = _update(
            here,
            products,
            scale,
            lambda p: tiles.dot("bktgs,bksh->bktgh", p.astype(value.dtype), value_tile),
        )
        return OnlineSoftmax(
            *(
                jax.lax.dynamic_update_slice_in_dim(old, x, i * q_block, 2)
                for old, x in zip(state, new, strict=True)
            )
        )

    state = tiles.for_each_pair(schedule, num_pairs, body, state)
    return OnlineSoftmax(*(x[:, :, :q_len] for x in state))


def _attend_slots(state: OnlineSoftmax, query: jax.Array, operands: Operands, options: Options):
    """Depth slots of the query's own token, slot after slot: read once per key/value head.

    Queries are laid out tokens first, as the slots are, so that no slot is transposed. A product of
    a token's G queries with several of its slots would be too small for matrix units.
    """
    query = jnp.moveaxis(query, 1, 2)
    valid = query_tokens(operands).valid

    def body(slot, state: OnlineSoftmax) -> OnlineSoftmax:
        key, value = operands.depth_key[slot], operands.depth_value[slot]  # [B, T, K, H]
        products = tiles.dot("btkgh,btkh->btkg", query, key)
        if valid is not None:
            products = jnp.where(valid[:, :, None, None], products, -jnp.inf)
        value = value[:, :, :, None].astype(products.dtype)
        return _update(state, products[..., None], options.scale, lambda p: p * value)

    state = OnlineSoftmax(*(jnp.moveaxis(x, 1, 2) for x in state))
    state = tiles.for_each_slot(visible_slots(operands, options), body, state)
    return OnlineSoftmax(*(jnp.moveaxis(x, 2, 1) for x in state))


def _attend_chunks(state: OnlineSoftmax, query: jax.Array, operands: Operands, options: Options):
    """Chunk-visible: each slot is a key set of tokens, masked to the query's chunk."""
    chunk = options.depth_chunk

    def body(slot, state: OnlineSoftmax) -> OnlineSoftmax:
        key, value = operands.depth_key[slot], operands.depth_value[slot]
        return attend_tokens(
            state,
            query,
            key,
            value,
            query_tokens(operands),
            depth_tokens(operands, chunk),
            scale=options.scale,
            causal=True,
            chunk=chunk,
            offset_known=operands.query_offset is None,
            kv_length=None,
        )

    return tiles.for_each_slot(visible_slots(operands, options), body, state)
