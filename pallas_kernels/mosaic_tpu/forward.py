"""Forward of the tokens kernel: flash attention with tokens in the lanes.

    z[k, q] = c K^T Q     m = max z     p = 2^(z - m)     O = V p / sum p          c = scale log2 e

One grid step is one key block against one query block with its G heads. Scores stand as [keys,
queries]: maximum and sum run down the sublanes, which are plain vector operations, and what
belongs to a query (m, sum, lse) is one row of lanes, without padding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu import blocks, common, schedule
from pallas_kernels.mosaic_tpu.common import Blocked


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    slots: jax.Array,
    sides: blocks.Sides,
    initial: tuple[jax.Array, jax.Array] | None,
    *,
    shape: schedule.CallShape,
    tiles: schedule.Tiles,
    scale: float,
    causal: bool,
    chunk: int | None = None,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Softmax over the keys of the visible sources and what `initial` stands for.

    Args:
      query: [B, K, G, H, Tq].
      key, value: [S, B, K, H, Tk]: S sources of keys, S = 1 for a sequence.
      slots: which sources are visible, see `common.slot_scalars`.
      initial: (o [B, K, G, H, Tq], lse [B, K, G, Tq]) float32 of other keys.

    Returns:
      o in `out_dtype` and lse, float32, shaped as those of `initial`.
    """
    plan = blocks.plan_pairs(
        shape,
        (tiles.q_block, tiles.k_block),
        sides,
        causal=causal,
        chunk=chunk,
        k_step=tiles.k_step,
    )
    sources = key.shape[0]
    scalars = {"slots": slots} | blocks.block_scalars(plan, sides, shape.batch, by_key=False)

    def of_query(b, k, i, s, j, refs):
        return b, k, 0, 0, i

    def lse_of_query(b, k, i, s, j, refs):
        return b, k, 0, i

    def of_key(b, k, i, s, j, refs):
        return (common.slot_index(s, refs.slots), b, k, 0, key_index(b, i, s, j, refs))

    def key_index(b, i, s, j, refs):
        step = jnp.where(s < common.count_slots(refs.slots), j, plan.k_count)
        return blocks.hull_index(step, b * plan.q_count + i, refs)

    rows = (None, None, shape.group, shape.head_dim, plan.q_block)
    vectors = (None, None, shape.group, plan.q_block)
    keys = (None, None, None, shape.head_dim, plan.k_block)
    queries = query.shape
    first = initial or (None, None)
    out = common.launch(
        functools.partial(_kernel, plan=plan, sources=sources, factor=scale * common.LOG2_E),
        name="moda_tokens_forward",
        grid=(shape.batch, shape.kv_heads, plan.q_count, sources, plan.k_count),
        parallel=3,
        scalars=scalars,
        inputs={
            "query": Blocked(query, rows, of_query),
            "key": Blocked(key, keys, of_key),
            "value": Blocked(value, keys, of_key),
            "first_out": Blocked(first[0], rows, of_query),
            "first_lse": Blocked(first[1], vectors, lse_of_query),
            **mask_inputs(
                plan,
                sides,
                shape.batch,
                q_index=lambda b, k, i, s, j, refs: (b, 0, i),
                k_index=lambda b, k, i, s, j, refs: (b, 0, key_index(b, i, s, j, refs)),
            ),
        },
        outputs={
            "out": Blocked(jax.ShapeDtypeStruct(queries, out_dtype), rows, of_query),
            "lse": Blocked(
                jax.ShapeDtypeStruct((*queries[:3], queries[4]), jnp.float32), vectors, lse_of_query
            ),
        },
        scratch={
            "acc": (shape.group, shape.head_dim, plan.q_block),
            "top": (shape.group, plan.q_block),
            "total": (shape.group, plan.q_block),
        },
        work=schedule.tokens_forward_work(
            shape, tiles, causal=causal, chunk=chunk, sources=sources, continues=initial is not None
        ),
    )
    return out["out"], out["lse"]


def mask_inputs(plan: blocks.PairPlan, sides: blocks.Sides, batch: int, *, q_index, k_index):
    """Segments and chunks, where the call has them: rows of lanes."""
    q_ids = k_ids = None
    if plan.has_segments:
        q_ids, k_ids = sides.q_segments[:, None], sides.k_segments[:, None]
    starts = blocks.chunk_starts(plan, sides, batch)
    return {
        "q_segments": Blocked(q_ids, (None, 1, plan.q_block), q_index),
        "k_segments": Blocked(k_ids, (None, 1, plan.k_block), k_index),
        "chunk_start": Blocked(starts, (None, 1, plan.q_block), q_index),
    }


def _kernel(refs: Any, *, plan: blocks.PairPlan, sources: int, factor: float) -> None:
    b, i, s, j = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    first = refs.first[b * plan.q_count + i]
    at = blocks.pair(plan, refs, b, i, jnp.minimum(first + j, plan.k_count - 1))
    needed = (
        at.needed
        & (first + j <= refs.last[b * plan.q_count + i])
        & (s < common.count_slots(refs.slots))
    )

    @pl.when((s == 0) & (j == 0))
    def _start():
        start_softmax(refs)

    @pl.when(needed & at.unmasked)
    def _whole():
        _add_block(refs, plan, at, factor, masked=False)

    @pl.when(needed & jnp.logical_not(at.unmasked))
    def _masked():
        _add_block(refs, plan, at, factor, masked=True)

    @pl.when((s == sources - 1) & (j == plan.k_count - 1))
    def _finish():
        total, top = refs.total[...], refs.top[...]
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        refs.lse[...] = jnp.where(seen, (top + jnp.log2(safe)) * common.LN_2, -jnp.inf)
        refs.out[...] = (refs.acc[...] / safe[:, None]).astype(refs.out.dtype)


def start_softmax(refs: Any) -> None:
    """The running softmax of what was seen before: one key of score lse and value o, or none."""
    if refs.first_out is None:
        refs.acc[...] = jnp.zeros_like(refs.acc)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.top[...] = jnp.full_like(refs.top, -jnp.inf)
        return
    lse = refs.first_lse[...]
    refs.acc[...] = refs.first_out[...]
    refs.top[...] = lse * common.LOG2_E
    refs.total[...] = jnp.where(jnp.isneginf(lse), 0.0, 1.0)


def _add_block(
    refs: Any, plan: blocks.PairPlan, at: blocks.BlockPair, factor: float, *, masked: bool
):
    key, value = refs.key[...], refs.value[...]
    visible = blocks.mask(plan, refs, at) if masked else None
    if masked and plan.ragged_keys:  # 0 * NaN is NaN; a NaN score is masked all the same
        value = blocks.valid_lanes(value, at.k_block * plan.k_block, refs.k_stop[at.row])

    steps = [slice(n, n + plan.k_step) for n in range(0, plan.k_block, plan.k_step)]

    def add(head, _):
        row = pl.ds(head, 1)
        query = refs.query[head]
        # All scores first: the products of one step run under the softmax of the one before.
        scores = [factor * common.dot(key[:, step], query, (0, 0)) for step in steps]
        top, total, acc = refs.top[row], refs.total[row], refs.acc[head]
        for step, z in zip(steps, scores, strict=True):  # z [keys, queries]
            if masked:
                z = jnp.where(visible[step], z, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(z, axis=0, keepdims=True))
            # A query that has seen nothing yet: -inf - (-inf) is NaN.
            shift = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
            p, kept = jnp.exp2(z - shift), jnp.exp2(top - shift)
            total = kept * total + jnp.sum(p, axis=0, keepdims=True)
            product = common.dot(value[:, step], p.astype(value.dtype), (1, 0))
            acc = kept * acc + product  # [H, queries]
            top = new_top
        refs.top[row], refs.total[row], refs.acc[head] = top, total, acc

    lax.fori_loop(0, refs.query.shape[0], add, None)
