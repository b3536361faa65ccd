"""Backward of the sequence part for Hopper: dq, dk and dv from the unified lse and delta.

Two kernels, so that every gradient is summed by one thread block in a fixed order: one for dq,
which walks over the keys of a tile of queries, and one for dk and dv, which walks over the queries
of all heads of a KV head. Scores are computed in both. In each, one warpgroup issues the TMA loads
into a ring and two or three compute; the products of one block are issued together, so that the
exponentials of the scores run beside the product with the values.

With z the scores, p = e^(z - lse): dv = p^T do, ds = p (do v^T - delta), dq = scale ds k,
dk = scale ds^T q (Zhu et al., arXiv 2603.15619; Dao, arXiv 2307.08691, algorithm 2).
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.sequence_dkv import dkv_kernel
from pallas_kernels.mosaic_gpu.sequence_dq import dq_kernel
from pallas_kernels.mosaic_gpu.sequence_tiles import (
    Plan,
    SequenceBackwardConfig,
    sequence_backward_config,
)
from pallas_kernels.mosaic_gpu.tuned import tuned
from pallas_kernels.mosaic_gpu.wgmma import LOG2E, NO_SEGMENT, ROWS, pad_tokens
from pallas_kernels.segments import segment_bounds


def _ranges(plan: Plan, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per tile of the dq kernel the blocks of keys, per tile of the other the blocks of queries."""
    config = plan.config
    units = jnp.arange(plan.dq_steps * config.dq_warpgroups) // plan.group
    q_tiles = queries.reshape(plan.batch, -1, ROWS)[:, units]
    q_tiles = q_tiles.reshape(plan.batch, plan.dq_steps, -1)
    k_tiles = keys.reshape(plan.batch, plan.dkv_steps, -1)
    return (
        segment_bounds(q_tiles, keys, config.dq_block_kv),
        segment_bounds(k_tiles, queries, config.dkv_block_q),
    )


def _by_head(x: jax.Array, length: int, fill: float) -> jax.Array:
    """[B, T, N] -> [B, N, length]."""
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)), constant_values=fill)
    return x.transpose(0, 2, 1)


def sequence_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    is_causal: bool,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    dq_dtype: Any = jnp.float32,
    config: SequenceBackwardConfig | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the sequence part of Mixture-of-Depths Attention.

    Args:
        query, d_out: [B, Tq, N, H], bfloat16 or float16, H 64 or 128.
        key, value: [B, Tk, K, H], in the query's dtype.
        lse: [B, Tq, N] float32, the natural logarithm of the whole softmax's denominator, depth
            slots included; -inf for a query that sees nothing.
        delta: [B, Tq, N] float32, rowsum(d_out * o) minus lse's cotangent.
        scale: factor of the scores.
        is_causal: whether query i sees only keys j <= i.
        query_segments, key_segments: [B, Tq], [B, Tk] int32; 0 is padding.
        dq_dtype: float32, or the query's.
        config: tile sizes; None takes `sequence_backward_config`'s.

    Returns:
        dq [B, Tq, N, H] in `dq_dtype`, dk and dv [B, Tk, K, H] in the key's dtype, summed over the
        heads of a group in a fixed order.

    Raises:
        ValueError: the config does not fit the head size or the shared memory.
    """
    batch, q_len, num_heads, head_dim = query.shape
    kv_len, kv_heads = key.shape[1:3]
    if config is None:
        config = tuned(
            "sequence_backward", sequence_backward_config(head_dim), head_dim=head_dim,
            group=num_heads // kv_heads, is_causal=is_causal,
        )  # fmt: skip
    config.check(head_dim, dq_dtype)
    plan = Plan(
        config, batch, q_len, kv_len, kv_heads, num_heads // kv_heads, head_dim, query.dtype,
        dq_dtype, scale, is_causal, query_segments is not None,
    )  # fmt: skip
    # A query that sees nothing: e^(z - inf) is 0, where e^(z + inf) would not be.
    base2 = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)
    inputs = {name: pad_tokens(x, 1) for name, x in (
        ("query", query), ("key", key), ("value", value), ("d_out", d_out))}  # fmt: skip
    inputs["lse"] = _by_head(base2, plan.q_rows, jnp.inf)
    inputs["delta"] = _by_head(delta, plan.q_rows, 0)
    dq_inputs = dkv_inputs = inputs
    if query_segments is not None:
        assert key_segments is not None
        queries = jnp.pad(query_segments, ((0, 0), (0, plan.q_rows - q_len)))
        keys = jnp.pad(key_segments, ((0, 0), (0, plan.kv_rows - kv_len)))
        kv_ranges, q_ranges = _ranges(plan, queries, keys)
        # Padding on one side is renamed, so that it does not equal padding on the other.
        ids = {"query_segments": jnp.where(queries == 0, NO_SEGMENT, queries)}
        ids["key_segments"] = keys
        dq_inputs = inputs | ids | {"ranges": kv_ranges}
        dkv_inputs = inputs | ids | {"ranges": q_ranges}
    dq = dq_kernel(plan, dq_inputs)
    dk, dv = dkv_kernel(plan, dkv_inputs)
    return dq[:, :q_len], dk[:, :kv_len], dv[:, :kv_len]
