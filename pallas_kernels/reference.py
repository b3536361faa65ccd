"""The specification of Mixture-of-Depths Attention (Zhu et al., arXiv 2603.15619, eq. 7-9).

One softmax over the sequence keys of the layer and the depth keys that earlier layers wrote at the
query's own token. Dense masks and [T, T] scores: for reading and for tests, not for training.
Gradients are JAX's own.
"""

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
)


def unsupported_reason(operands: Operands, options: Options, platform: str) -> str | None:
    """See `contract.UnsupportedReason`."""
    return None


def forward(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """Returns o [B, Tq, N, H] in the query's dtype and lse [B, Tq, N], float32 or wider.

    lse is the natural logarithm of the softmax's denominator. A query that sees nothing gets o = 0
    and lse = -inf.
    """
    batch, q_len, heads, head_dim = operands.query.shape
    kv_heads, parts = num_kv_heads(operands), _parts(operands, options)
    dtype = accumulator_dtype(operands.query.dtype)
    if not parts:
        return jnp.zeros_like(operands.query), jnp.full((batch, q_len, heads), -jnp.inf, dtype)
    weights, lse = _softmax(_scores(parts))
    out, start = jnp.zeros((batch, kv_heads, heads // kv_heads, q_len, head_dim), dtype), 0
    for _, mask, value in parts:
        share = weights[..., start : start + mask.shape[-1]]
        out += jnp.einsum("bkgts,bktsh->bkgth", share, value, precision="highest")
        start += mask.shape[-1]
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, q_len, heads, head_dim)
    return out.astype(operands.query.dtype), lse.transpose(0, 3, 1, 2).reshape(batch, q_len, heads)


def attention_weights(
    operands: Operands, options: Options, depth_bias: jax.Array | None = None
) -> jax.Array:
    """The softmax's weights [B, N, Tq, keys], float32 or wider, of a call with keys of some kind.

    The sequence's keys come first, if the call has them, then the depth slots; without
    `depth_chunk`: S of them. A query's weights sum to 1, or are 0 if it sees nothing. depth_bias
    [N] is added to the scores of depth slots.
    """
    assert options.depth_chunk is None
    batch, q_len, heads, _ = operands.query.shape
    scores = _scores(_parts(operands, options)).reshape(batch, heads, q_len, -1)
    if depth_bias is not None:
        is_slot = jnp.arange(scores.shape[-1]) >= _num_keys(operands)
        scores += jnp.where(is_slot, depth_bias[:, None, None], 0.0)
    return _softmax(scores)[0]


def _num_keys(operands: Operands) -> int:
    return 0 if operands.key is None else operands.key.shape[1]


def _parts(operands: Operands, options: Options) -> list[tuple[jax.Array, ...]]:
    """Per key set: scores and mask [B, K, G, Tq, keys], values [B, K, Tq or 1, keys, H]."""
    dtype = accumulator_dtype(operands.query.dtype)
    batch, q_len, heads, head_dim = operands.query.shape
    kv_heads = num_kv_heads(operands)
    grouped = (batch, q_len, kv_heads, heads // kv_heads, head_dim)
    # The query is scaled, not the score: compilers fuse scale·s - max into one operation, whose
    # product is not rounded, as the one in the maximum was.
    query_BxTxKxGxH = options.scale * operands.query.astype(dtype).reshape(grouped)

    parts = []
    if operands.key is not None:
        parts.append(_sequence_part(operands, options, query_BxTxKxGxH))
    if operands.depth_key is not None and operands.depth_key.shape[0]:
        part = _depth_part if options.depth_chunk is None else _chunk_part
        parts.append(part(operands, options, query_BxTxKxGxH))
    return parts


def _scores(parts: list[tuple[jax.Array, ...]]) -> jax.Array:
    """Of all key sets side by side; -inf where a query does not look."""
    return jnp.concatenate([jnp.where(mask, score, -jnp.inf) for score, mask, _ in parts], -1)


def _softmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights that sum to 1 and logsumexp, over the last axis; 0 and -inf where all are -inf.

    The weights are not e^(z - lse): at large scores lse, rounded, loses the sum's logarithm.
    """
    maximum = jax.lax.stop_gradient(scores.max(axis=-1, initial=-jnp.inf))
    seen = ~jnp.isneginf(maximum)
    maximum = jnp.where(seen, maximum, 0.0)  # -inf - (-inf) is NaN
    exponentials = jnp.exp(scores - maximum[..., None])
    total = jnp.where(seen, exponentials.sum(axis=-1), 1.0)
    lse = jnp.where(seen, maximum + jnp.log(total), -jnp.inf)
    return exponentials / total[..., None], lse


def _token_mask(
    query: MaskTokens, key: MaskTokens, *, causal: bool, chunk: int | None
) -> jax.Array:
    """[B, 1, 1, Tq, Tk]: which tokens a query may look at."""
    q_pos, k_pos = query.position[:, :, None], key.position[:, None, :]
    mask = k_pos <= q_pos if causal else jnp.full_like(k_pos <= q_pos, True)
    if chunk is not None:
        mask &= k_pos // chunk == q_pos // chunk
    if query.segment is not None and key.segment is not None:
        mask &= query.segment[:, :, None] == key.segment[:, None, :]
    if query.valid is not None:
        mask &= query.valid[:, :, None]
    if key.valid is not None:
        mask &= key.valid[:, None, :]
    return mask[:, None, None]


def slot_mask(operands: Operands, options: Options) -> jax.Array:
    """[S]: slots below depth_length and, if bounded, among the reserved or the newest ones."""
    assert operands.depth_key is not None
    slots = operands.depth_key.shape[0]
    slot = jnp.arange(slots)
    length = slots if operands.depth_length is None else operands.depth_length
    mask = slot < length
    if options.depth_window is not None:
        mask &= (slot < options.depth_reserved) | (slot >= length - options.depth_window)
    return mask


def _sequence_part(operands: Operands, options: Options, query: jax.Array):
    keys = key_tokens(operands)
    mask = _token_mask(query_tokens(operands), keys, causal=options.is_causal, chunk=None)
    key, value = operands.key, operands.value
    if keys.valid is not None:  # uninitialized keys may be NaN, and 0 * NaN is NaN
        written = keys.valid[:, :, None, None]
        key, value = jnp.where(written, key, 0), jnp.where(written, value, 0)
    score = jnp.einsum("btkgh,bskh->bkgts", query, key.astype(query.dtype), precision="highest")
    mask = jnp.broadcast_to(mask, score.shape)
    return score, mask, value.astype(query.dtype).transpose(0, 2, 1, 3)[:, :, None]


def _visible_depth(operands: Operands, options: Options, dtype) -> tuple[jax.Array, ...]:
    """Depth keys and values with invisible slots zeroed, and the mask of slots."""
    slots = slot_mask(operands, options)
    seen = slots[:, None, None, None, None]
    key, value = (
        jnp.where(seen, x, 0).astype(dtype) for x in (operands.depth_key, operands.depth_value)
    )
    return key, value, slots


def _depth_part(operands: Operands, options: Options, query: jax.Array):
    key, value, slots = _visible_depth(operands, options, query.dtype)
    valid = query_tokens(operands).valid
    if valid is not None:  # padding may be NaN
        key, value = (jnp.where(valid[:, :, None, None], x, 0) for x in (key, value))
    score = jnp.einsum("btkgh,sbtkh->bkgts", query, key, precision="highest")
    mask = jnp.broadcast_to(slots, score.shape)
    if valid is not None:
        mask &= valid[:, None, None, :, None]
    return score, mask, value.transpose(1, 3, 2, 0, 4)


def _chunk_part(operands: Operands, options: Options, query: jax.Array):
    key, value, slots = _visible_depth(operands, options, query.dtype)
    tokens = depth_tokens(operands, options.depth_chunk)
    mask = _token_mask(query_tokens(operands), tokens, causal=True, chunk=options.depth_chunk)
    score = jnp.einsum("btkgh,sbukh->bkgtsu", query, key, precision="highest")
    mask = jnp.broadcast_to(mask[..., None, :] & slots[:, None], score.shape)
    flat = (*score.shape[:4], -1)
    value = value.transpose(1, 3, 0, 2, 4).reshape(
        *value.shape[1:2], value.shape[3], 1, -1, value.shape[4]
    )
    return score.reshape(flat), mask.reshape(flat), value
