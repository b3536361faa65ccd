"""Weighted sums over the entries of a history, in float32, as one pass over all slots.

Slots from `count` on are masked: they may hold NaN. XLA fuses the mask, the products and the sum
over slots into one kernel (two with a softmax: its scores come first), but reads every slot of the
buffer, also those not written yet: a pass over the layers reads twice what it needs.
"""

import jax
import jax.numpy as jnp


def weighted_sum(
    weight_S: jax.Array, entries_SxBxTxD: jax.Array, count: jax.Array | int
) -> jax.Array:
    """Σ_{j < count} weight_j · entry_j, [B, T, D], in the entries' dtype."""
    seen = (jnp.arange(weight_S.shape[0]) < count)[:, None, None, None]
    entries = entries_SxBxTxD[: weight_S.shape[0]]
    terms = jnp.where(seen, weight_S[:, None, None, None] * entries.astype(jnp.float32), 0.0)
    return terms.sum(axis=0).astype(entries.dtype)


def softmax_read(
    query_D: jax.Array,
    entries_SxBxTxD: jax.Array,
    count: jax.Array | int,
    eps: float,
    *,
    last_BxTxD: jax.Array | None = None,
    last_seen: jax.Array | bool = True,
) -> jax.Array:
    """Σ_j α_j v_j [B, T, D] with α = softmax_j(query · v_j / rms(v_j)), over j < count.

    Args:
      query_D: [D] float32; an RMSNorm's scale on v_j is a factor of it.
      entries_SxBxTxD: v.
      count: entries that are there; at least 1, or `last_seen`.
      eps: of the RMSNorm.
      last_BxTxD: one more entry beside the history, if `last_seen`.
    """
    seen = jnp.arange(entries_SxBxTxD.shape[0]) < count
    value = jnp.where(seen[:, None, None, None], entries_SxBxTxD, 0).astype(jnp.float32)
    score = jnp.where(seen[:, None, None], _score(query_D, value, eps), -jnp.inf)
    if last_BxTxD is None:
        alpha = jax.nn.softmax(score, axis=0)
        return (alpha[..., None] * value).sum(axis=0).astype(entries_SxBxTxD.dtype)
    last = last_BxTxD.astype(jnp.float32)
    last_score = jnp.where(last_seen, _score(query_D, last, eps), -jnp.inf)
    alpha = jax.nn.softmax(jnp.concatenate([score, last_score[None]]), axis=0)
    total = (alpha[:-1, ..., None] * value).sum(axis=0) + alpha[-1][..., None] * last
    return total.astype(entries_SxBxTxD.dtype)


def _score(query_D: jax.Array, value: jax.Array, eps: float) -> jax.Array:
    """query · RMSNorm(value), without materializing the normed value."""
    mean_square = jnp.mean(jnp.square(value), axis=-1)
    return (value * query_D).sum(axis=-1) * jax.lax.rsqrt(mean_square + eps)
