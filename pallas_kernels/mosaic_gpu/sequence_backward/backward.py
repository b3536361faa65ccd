"""Backward of the sequence part for Hopper, with the depth part's fused into it.

Two kernels, so that every gradient is summed by one thread block in a fixed order: one for dq,
which walks over the slots and keys of a tile of queries, and one for dk and dv, which walks over
the queries of all heads of a KV head. Scores are computed in both. In each, one warpgroup issues
the TMA loads into a ring and two or three compute; the products of one block are issued together,
so that the exponentials of the scores run beside the product with the values.

With z the scores, p = e^(z - lse): dv = p^T do, ds = p (do v^T - delta), dq = scale ds k,
dk = scale ds^T q (Zhu et al., arXiv 2603.15619; Dao, arXiv 2307.08691, algorithm 2).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import common, row_tiles
from pallas_kernels.mosaic_gpu.sequence_backward.dkv import dkv_kernel
from pallas_kernels.mosaic_gpu.sequence_backward.dq import DqResults, dq_kernel, dq_shared_memory
from pallas_kernels.mosaic_gpu.sequence_backward.tiles import (
    KeyPlan,
    SequenceBackwardConfig,
    sequence_backward_config,
)
from pallas_kernels.mosaic_gpu.wgmma import LOG2E, NO_SEGMENT, cdiv, pad_rows, pad_tokens
from pallas_kernels.segments import segment_bounds

_SHORT = 32  # blocks of keys


class DepthPart(NamedTuple):
    """The depth part, which the dq kernel can compute with the sequence's."""

    key: jax.Array  # [S, B, Tq, K, H]
    value: jax.Array
    slots: Any  # [4] int32, two half-open ranges of visible slots; no other slot is touched
    running: tuple[jax.Array, jax.Array] | None = None
    """Gradients to add to, [S, B, Tq, K, H], float32 or bfloat16; None: new ones in the keys'
    dtype, 0 for slots that are not visible."""
    want_slots: bool = True
    """Whether to compute the slots' gradients, or only their part of dq."""

    @property
    def slots_dtype(self) -> Any:
        if not self.want_slots:
            return None
        return self.key.dtype if self.running is None else self.running[0].dtype


class SequenceGradients(NamedTuple):
    """dq [B, Tq, N, H], dk and dv [B, Tk, K, H], and the slots' [S, B, Tq, K, H] or None."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    slots: tuple[jax.Array, jax.Array] | None


def fuses(
    query: jax.Array,
    key: jax.Array,
    depth: DepthPart,
    *,
    is_causal: bool,
    config: SequenceBackwardConfig | None = None,
) -> bool:
    """Whether the dq kernel computes the depth part, too.

    For the slots' gradients a tile must have all query heads of its tokens, and the shared memory
    room for these gradients.
    """
    config = config or sequence_backward_config(query.shape[-1])
    plan = _query_plan(config, query, key, 1.0, is_causal, True, depth.key.shape[0])
    if not config.fuse_depth or (depth.want_slots and plan.subgroups > 1):
        return False
    results = DqResults(query.dtype, depth.slots_dtype)
    return dq_shared_memory(plan, results) <= common.SMEM_LIMIT


def _query_plan(config, query, key, scale, is_causal, segments, slots) -> row_tiles.RowPlan:
    batch, q_len, num_heads, head_dim = query.shape
    kv_len, kv_heads = key.shape[1:3]
    return row_tiles.RowPlan(
        config.dq_tiles,
        batch,
        q_len,
        kv_len,
        kv_heads,
        num_heads // kv_heads,
        head_dim,
        query.dtype,
        scale,
        is_causal,
        segments,
        slots,
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
    depth: DepthPart | None = None,
    dq_dtype: Any = jnp.float32,
    config: SequenceBackwardConfig | None = None,
) -> SequenceGradients:
    """Gradients of the sequence part of Mixture-of-Depths Attention, and of `depth` if it is given.

    Args:
        query, d_out: [B, Tq, N, H], bfloat16 or float16, H 64 or 128.
        key, value: [B, Tk, K, H], in the query's dtype.
        lse: [B, Tq, N] float32, the natural logarithm of the whole softmax's denominator, depth
            slots included; -inf for a query that sees nothing.
        delta: [B, Tq, N] float32, rowsum(d_out * o) minus lse's cotangent.
        scale: factor of the scores.
        is_causal: whether query i sees only keys j <= i.
        query_segments, key_segments: [B, Tq], [B, Tk] int32; 0 is padding.
        depth: the depth part, if `fuses` allows it; None: dq is the sequence's part alone.
        dq_dtype: float32, or the query's.
        config: tile sizes; None takes `sequence_backward_config`'s.

    Returns:
        dq in `dq_dtype`, dk and dv in the key's dtype, summed over the heads of a group in a fixed
        order, and the slots' gradients or None.

    Raises:
        ValueError: the config does not fit the head size or the shared memory.
    """
    config = config or sequence_backward_config(query.shape[-1])
    config.check(query.shape[-1])
    # lse = +inf makes the weights e^(z - lse) of a query that sees nothing 0.
    base2 = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)
    arrays = {
        name: pad_tokens(x, 1)
        for name, x in (("query", query), ("d_out", d_out), ("key", key), ("value", value))
    }
    segments = None
    if query_segments is not None:
        assert key_segments is not None
        segments = query_segments, key_segments
    settings = config, query, key, scale, is_causal, segments is not None
    plan = _query_plan(*settings, 0 if depth is None else depth.key.shape[0])
    dq, slots = _dq(config, plan, arrays, base2, delta, segments, depth, dq_dtype)
    dk, dv = _dkv(_key_plan(*settings), arrays, base2, delta, segments)
    length, kv_len = query.shape[1], key.shape[1]
    if slots is not None:
        slots = slots[0][:, :, :length], slots[1][:, :, :length]
    return SequenceGradients(dq[:, :length], dk[:, :kv_len], dv[:, :kv_len], slots)


def _dq(config, plan, arrays, base2, delta, segments, depth, dq_dtype):
    results = DqResults(dq_dtype)
    if depth is not None:
        results = DqResults(dq_dtype, depth.slots_dtype, depth.running is not None)
        plan = _with_slots(config, plan, results)
    if config.dq_piles is None and not plan.depth_warpgroups:
        plan = _with_piles(plan, results)
    common.check_smem(dq_shared_memory(plan, results), "sequence backward, dq")
    inputs = dict(arrays)
    inputs |= {name: pad_rows(arrays[name], plan.tokens) for name in ("query", "d_out")}
    inputs["lse"] = row_tiles.rows_by_tile(plan, base2, jnp.inf)
    inputs["delta"] = row_tiles.rows_by_tile(plan, delta, 0)
    if segments is not None:
        inputs["query_segments"] = row_tiles.segment_rows(plan, segments[0])
        inputs["key_segments"] = pad_tokens(segments[1], 1)
        inputs["ranges"] = row_tiles.segment_ranges(plan, *segments)
    running: tuple = ()
    if depth is not None:
        inputs["depth_key"], inputs["depth_value"] = (pad_tokens(x, 2) for x in depth[:2])
        inputs["slots"] = jnp.asarray(depth.slots)
        running = tuple(pad_tokens(x, 2) for x in depth.running or ())
    return dq_kernel(plan, inputs, results, running if results.slots_dtype is not None else ())


def _with_slots(config, plan, results: DqResults) -> row_tiles.RowPlan:
    more = _with_depth_warpgroups(config, plan)
    gradients = results.slots_dtype is not None  # depth warpgroups do not compute them
    fits = dq_shared_memory(more, results) <= common.SMEM_LIMIT
    wanted = config.depth_warpgroups
    if wanted is None:
        wanted = _hides_slots(plan)
    if wanted and not gradients and fits and plan.head_dim == 64:
        return more
    return _with_slot_stages(plan, config.dq_slot_stages, results)


def _hides_slots(plan) -> bool:
    """Whether there are keys enough to read a tile's slots beside them.

    A depth warpgroup waits for each of its products; beside few keys that is the kernel's time. The
    small models of `configs/table6` (group 3, 46 slots of 16 tokens, 256 keys) take 0.35 ms of 1.6
    less without.
    """
    return plan.slots * plan.tokens <= 1.25 * plan.mean_keys


def _with_depth_warpgroups(config, plan) -> row_tiles.RowPlan:
    tiles = dataclasses.replace(
        plan.config,
        warpgroups=2,
        block_kv=config.depth_block_kv,
        stages=config.depth_stages,
        piles=config.depth_piles,
        depth_warpgroups=True,
        slot_stages=config.slot_stages,
    )
    return plan._replace(config=tiles)


def _with_slot_stages(plan, stages: int, results: DqResults) -> row_tiles.RowPlan:
    """With more ring stages, if they fit, and if the slots are many or get no gradients.

    With gradients a third stage is 6% faster at T16K and 1% slower at T64K, where keys are most of
    the work.
    """
    more = plan._replace(config=dataclasses.replace(plan.config, stages=stages))
    if dq_shared_memory(more, results) > common.SMEM_LIMIT:
        return plan
    if results.slots_dtype is None:
        return more
    return more if 10 * cdiv(plan.slots, plan.block_slots) >= _key_blocks(plan) else plan


def _with_piles(plan, results: DqResults) -> row_tiles.RowPlan:
    """With heavy and light tiles running at the same time, where rows are short.

    It is slower with slots' gradients (B8), and for long rows (T16K).
    """
    if _key_blocks(plan) > _SHORT or results.slots_dtype is not None:
        return plan
    piles = 4 if plan.slots else 2
    return plan._replace(config=dataclasses.replace(plan.config, piles=piles))


def _key_blocks(plan) -> float:
    """How many blocks of keys a tile reads on average."""
    return cdiv(plan.kv_len, plan.config.block_kv) / (2 if plan.causal else 1)


def _key_plan(config, query, key, scale, is_causal, segments) -> KeyPlan:
    batch, q_len, num_heads, head_dim = query.shape
    kv_len, kv_heads = key.shape[1:3]
    return KeyPlan(
        config,
        batch,
        q_len,
        kv_len,
        kv_heads,
        num_heads // kv_heads,
        head_dim,
        query.dtype,
        scale,
        is_causal,
        segments,
    )


def _dkv(plan: KeyPlan, arrays, base2, delta, segments):
    inputs = dict(arrays)
    inputs["lse"] = _by_head(base2, plan.q_rows, jnp.inf)
    inputs["minus_delta"] = _by_head(-delta, plan.q_rows, 0)
    if segments is not None:
        queries, keys = segments
        queries = jnp.pad(queries, ((0, 0), (0, plan.q_rows - queries.shape[1])))
        keys = jnp.pad(keys, ((0, 0), (0, plan.kv_rows - keys.shape[1])))
        # Padding on one side is renamed, so that it does not equal padding on the other.
        inputs["query_segments"] = jnp.where(queries == 0, NO_SEGMENT, queries)
        inputs["key_segments"] = keys
        tiles = keys.reshape(plan.batch, plan.dkv_steps, -1)
        inputs["ranges"] = segment_bounds(tiles, queries, plan.config.dkv_block_q)
    return dkv_kernel(plan, inputs)
