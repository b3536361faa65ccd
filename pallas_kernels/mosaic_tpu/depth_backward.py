"""Backward of the depth kernel, slot by slot, with the unified lse and delta.

    p = 2^(z - lse)            ds = scale p (do vd - delta)
    dq += ds kd                dkd = Σ_g ds q              dvd = Σ_g p do

All terms belong to one token, so a slot's gradient is complete after its only visit: it is added
to the running gradient cache in that visit, in place (the cache is input and output at once).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu import common, schedule
from pallas_kernels.mosaic_tpu.depth_forward import DepthBlocks, for_each_head, write_scores


def depth_backward(
    query: jax.Array,
    depth_key: jax.Array,
    depth_value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    slots: jax.Array,
    d_query: jax.Array | None,
    grads: tuple[jax.Array, jax.Array] | None,
    *,
    shape: schedule.CallShape,
    tiles: schedule.Tiles,
    scale: float,
    want_depth: bool = True,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """dq [B, K, G, H, T] in the query's dtype, and the slots' gradients [S, B, K, H, T].

    Args:
      query, d_out: [B, K, G, H, T]. depth_key, depth_value: [S, B, K, H, T].
      lse: [B, K, G, T], natural; +inf where a query sees nothing, so that its weights are 0.
      delta: [B, K, G, T].
      slots: see `common.slot_scalars`; the gradients of other slots are neither read nor written.
      d_query: float32, the sequence part's dq, which is added.
      grads: float32 or bfloat16, added to in place. None: all slots are visible, and their
        gradients come in the key's dtype.
      want_depth: else None stands for the slots' gradients.
    """
    block, heads = tiles.depth_grad_block, tiles.depth_grad_heads
    specs = DepthBlocks(shape, block, heads)
    vectors = (shape.batch, shape.kv_heads // heads, heads * shape.group, shape.q_len)
    old = grads if grads is not None and want_depth else (None, None)
    new = None
    if want_depth:
        dtype = depth_key.dtype if grads is None else grads[0].dtype
        new = jax.ShapeDtypeStruct(depth_key.shape, dtype)
    dq = jax.ShapeDtypeStruct(query.shape, query.dtype)
    out = common.launch(
        functools.partial(_kernel, scale=scale),
        name="moda_depth_backward",
        grid=specs.grid(depth_key.shape[0]),
        parallel=3,
        scalars={"slots": slots},
        inputs={
            "query": specs.queries(query),
            "depth_key": specs.slots(depth_key),
            "depth_value": specs.slots(depth_value),
            "d_out": specs.queries(d_out),
            "lse": specs.vectors(lse.reshape(vectors)),
            "delta": specs.vectors(delta.reshape(vectors)),
            "first_query": specs.queries(d_query),
            "old_key": specs.slots(old[0]),
            "old_value": specs.slots(old[1]),
        },
        outputs={
            "d_query": specs.queries(dq),
            "d_key": specs.slots(new),
            "d_value": specs.slots(new),
        },
        scratch={
            "score": (heads * shape.group, block),
            "d_score": (heads * shape.group, block),
            "acc": (heads, shape.group, shape.head_dim, block),
        },
        work=schedule.depth_backward_work(
            shape,
            tiles,
            depth_key.shape[0],
            running=grads is not None,
            grads_itemsize=0 if new is None else new.dtype.itemsize,
            continues=d_query is not None,
            want_depth=want_depth,
        ),
        aliases={"old_key": "d_key", "old_value": "d_value"} if old[0] is not None else {},
    )
    return out["d_query"], (out["d_key"], out["d_value"]) if want_depth else None


def _kernel(refs: Any, *, scale: float) -> None:
    s, count = pl.program_id(3), common.count_slots(refs.slots)
    heads = refs.query.shape[:2]

    @pl.when(s == 0)
    def _start():
        if refs.first_query is None:
            refs.acc[...] = jnp.zeros_like(refs.acc)
        else:
            refs.acc[...] = refs.first_query[...]

    @pl.when(s < count)
    def _slot():
        write_scores(refs.score, refs.query, refs.depth_key, scale * common.LOG2_E)
        write_scores(refs.d_score, refs.d_out, refs.depth_value, 1.0)
        weight = jnp.exp2(refs.score[...] - refs.lse[...] * common.LOG2_E)
        refs.score[...] = weight
        refs.d_score[...] = scale * weight * (refs.d_score[...] - refs.delta[...])
        _add_gradients(refs)

    if refs.old_key is not None:

        @pl.when(count == 0)
        def _nothing_is_visible():  # the block is written back all the same: unchanged
            refs.d_key[...] = refs.old_key[...]
            refs.d_value[...] = refs.old_value[...]

    @pl.when(s == pl.num_programs(3) - 1)
    def _finish():
        def store(k, g, row):
            refs.d_query[k, g] = refs.acc[k, g].astype(refs.d_query.dtype)

        for_each_head(heads, store)


def _add_gradients(refs: Any) -> None:
    kv_heads, group = refs.query.shape[:2]

    def of_key_head(k, _):
        key = refs.depth_key[k].astype(jnp.float32)
        for g in range(group):
            refs.acc[k, g] += refs.d_score[pl.ds(k * group + g, 1)] * key
        if refs.d_key is not None:
            _put(refs.d_key, refs.old_key, k, _sum_heads(refs.d_score, refs.query, k))
            _put(refs.d_value, refs.old_value, k, _sum_heads(refs.score, refs.d_out, k))

    lax.fori_loop(0, kv_heads, of_key_head, None)


def _sum_heads(weights: Any, rows: Any, k: Any) -> jax.Array:
    """[H, tokens]: the sum over the query heads of key head k of weight times row."""
    group = rows.shape[1]
    return sum(
        weights[pl.ds(k * group + g, 1)] * rows[k, g].astype(jnp.float32) for g in range(group)
    )


def _put(new: Any, old: Any, k: Any, gradient: jax.Array) -> None:
    if old is not None:
        gradient = old[k].astype(jnp.float32) + gradient
    new[k] = gradient.astype(new.dtype)
