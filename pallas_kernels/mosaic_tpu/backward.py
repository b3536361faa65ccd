"""Backward of the tokens kernel: dq, dk and dv in one pass over the pairs, five products each.

    P = 2^(z - lse)   dV += dO P^T   dS = P (V^T dO - delta)   dQ += K dS   dK += Q dS^T

Scores stand as [keys, queries], all else as [H, tokens]. A key block stays while its query blocks
pass by: dk and dv gather in scratch. dq of a span of queries stays in VMEM for the whole launch, in
float32: neither are scores computed twice, as by two kernels, nor are parts of dq written per key
block. A sequence longer than a span takes several launches, which add to dk and dv in place.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu import blocks, common, schedule
from pallas_kernels.mosaic_tpu.common import Blocked
from pallas_kernels.mosaic_tpu.forward import mask_inputs


def tokens_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    slots: jax.Array,
    sides: blocks.Sides,
    grads: tuple[jax.Array, jax.Array] | None,
    *,
    shape: schedule.CallShape,
    tiles: schedule.Tiles,
    scale: float,
    causal: bool,
    chunk: int | None = None,
    want_keys: bool = True,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """dq [B, K, G, H, Tq], float32, and (dk, dv) [S, B, K, H, Tk].

    Args:
      query, d_out: [B, K, G, H, Tq]. key, value: [S, B, K, H, Tk].
      lse: [B, K, G, Tq], natural; +inf where a query sees nothing, so that its weights are 0.
      delta: [B, K, G, Tq].
      grads: float32 or bfloat16, shaped as key: dk and dv of the visible sources are added in
        place, the other sources keep their bits. None: all sources are visible, and dk and dv
        come in the key's dtype.
      want_keys: else None stands for (dk, dv).
    """
    (_, size), *rest = schedule.query_spans(shape.q_len, tiles)
    spans = 1 + len(rest)
    plan = blocks.plan_pairs(
        shape, (tiles.q_grad_block, tiles.k_grad_block), sides, causal=causal, chunk=chunk
    )
    plan = dataclasses.replace(plan, q_count=size)
    call = functools.partial(
        _launch,
        plan,
        (query, key, value, d_out, lse, delta),
        slots,
        sides,
        shape=shape,
        scale=scale,
        want_keys=want_keys,
        work=schedule.tokens_backward_work(
            shape,
            tiles,
            causal=causal,
            chunk=chunk,
            sources=key.shape[0],
            running=grads is not None,
            grads_itemsize=key.dtype.itemsize if grads is None else grads[0].dtype.itemsize,
        ).divided(spans),
    )
    if spans == 1:
        d_query, grads = call(jnp.int32(0), None, grads)
    else:
        own = grads is None and want_keys
        if own:
            grads = jnp.zeros(key.shape, jnp.float32), jnp.zeros(key.shape, jnp.float32)
        lanes = spans * plan.q_count * plan.q_block
        carry = jnp.zeros((*query.shape[:-1], lanes), jnp.float32), grads
        d_query, grads = lax.fori_loop(0, spans, lambda n, carry: call(n, *carry), carry)
        if own:
            grads = (grads[0].astype(key.dtype), grads[1].astype(key.dtype))
    return d_query[..., : shape.q_len], grads


def _launch(
    plan: blocks.PairPlan,
    arrays: tuple[jax.Array, ...],
    slots: jax.Array,
    sides: blocks.Sides,
    span: jax.Array,
    d_query: jax.Array | None,
    grads: Any,
    *,
    shape: schedule.CallShape,
    scale: float,
    want_keys: bool,
    work: schedule.Work,
) -> tuple[jax.Array, Any]:
    """dq of the span-th q_count query blocks, in `d_query`, and their contributions to dk, dv."""
    query, key, value, d_out, lse, delta = arrays
    running = want_keys and grads is not None
    scalars = {"slots": slots} | blocks.block_scalars(
        plan, sides, shape.batch, by_key=True, span=span, all_keys=not running
    )

    def source_and_column(b, s, j, refs):
        """Past the last one, that one again, which is there already: nothing is fetched."""
        rest = (s >= common.count_slots(refs.slots)) | (j > refs.k_end[b])
        return common.slot_index(s, refs.slots), jnp.where(rest, refs.k_end[b], j), rest

    def q_index(b, s, j, i, refs):
        _, column, rest = source_and_column(b, s, j, refs)
        step = jnp.where(rest, plan.q_count, i)
        hull = blocks.hull_index(step, b * plan.k_count + column, refs)
        return refs.span[0] * plan.q_count + hull

    def of_query(b, k, s, j, i, refs):
        return b, k, 0, 0, q_index(b, s, j, i, refs)

    def row_of_query(b, k, s, j, i, refs):
        return b, k, 0, q_index(b, s, j, i, refs)

    def of_key(b, k, s, j, i, refs):
        source, column, _ = source_and_column(b, s, j, refs)
        return source, b, k, 0, column

    rows = (None, None, shape.group, shape.head_dim, plan.q_block)
    vectors = (None, None, shape.group, plan.q_block)
    keys = (None, None, None, shape.head_dim, plan.k_block)
    span_rows = (None, None, shape.group, shape.head_dim, plan.q_count * plan.q_block)
    dq_shape = (*query.shape[:-1], span_rows[-1]) if d_query is None else d_query.shape
    new = old = None
    if want_keys:
        new = jax.ShapeDtypeStruct(key.shape, grads[0].dtype if running else key.dtype)
        old = grads
    aliases = {"old_key": "d_key", "old_value": "d_value"} if running else {}
    out = common.launch(
        functools.partial(_kernel, plan=plan, scale=scale),
        name="moda_tokens_backward",
        grid=(shape.batch, shape.kv_heads, key.shape[0], plan.k_count, plan.q_count),
        parallel=2,
        scalars=scalars,
        inputs={
            "query": Blocked(query, rows, of_query),
            "key": Blocked(key, keys, of_key),
            "value": Blocked(value, keys, of_key),
            "d_out": Blocked(d_out, rows, of_query),
            "lse": Blocked(lse, vectors, row_of_query),
            "delta": Blocked(delta, vectors, row_of_query),
            "old_query": Blocked(d_query, None, None),
            "old_key": Blocked(old and old[0], keys, of_key),
            "old_value": Blocked(old and old[1], keys, of_key),
            **mask_inputs(
                plan,
                sides,
                shape.batch,
                q_index=lambda b, k, s, j, i, refs: (b, 0, q_index(b, s, j, i, refs)),
                k_index=lambda b, k, s, j, i, refs: (b, 0, source_and_column(b, s, j, refs)[1]),
            ),
        },
        outputs={
            "d_query": Blocked(
                jax.ShapeDtypeStruct(dq_shape, jnp.float32),
                span_rows,
                lambda b, k, s, j, i, refs: (b, k, 0, 0, refs.span[0]),
            ),
            "d_key": Blocked(new, keys, of_key),
            "d_value": Blocked(new, keys, of_key),
        },
        scratch={"key_sum": keys[3:], "value_sum": keys[3:]} if want_keys else {},
        work=work,
        aliases=aliases | ({} if d_query is None else {"old_query": "d_query"}),
    )
    return out["d_query"], (out["d_key"], out["d_value"]) if want_keys else None


def _kernel(refs: Any, *, plan: blocks.PairPlan, scale: float) -> None:
    b, s, j, i = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    count = common.count_slots(refs.slots)
    entry = b * plan.k_count + j
    step = refs.first[entry] + i
    at = blocks.pair(plan, refs, b, jnp.minimum(step, plan.q_count - 1), j)
    needed = at.needed & (step <= refs.last[entry]) & (s < count)

    @pl.when((s == 0) & (j == 0) & (i == 0))
    def _start():
        refs.d_query[...] = jnp.zeros_like(refs.d_query)

    if refs.d_key is not None:

        @pl.when(i == 0)
        def _start_keys():
            refs.key_sum[...] = jnp.zeros_like(refs.key_sum)
            refs.value_sum[...] = jnp.zeros_like(refs.value_sum)

    @pl.when(needed & at.unmasked)
    def _whole():
        _add_block(refs, plan, at, scale, masked=False)

    @pl.when(needed & jnp.logical_not(at.unmasked))
    def _masked():
        _add_block(refs, plan, at, scale, masked=True)

    if refs.d_key is not None:

        @pl.when((i == plan.q_count - 1) & (s < count) & (j <= refs.k_end[b]))
        def _finish_keys():
            put(refs.d_key, refs.old_key, scale * refs.key_sum[...])
            put(refs.d_value, refs.old_value, refs.value_sum[...])

        if refs.old_key is not None:

            @pl.when(count == 0)
            def _nothing_is_visible():  # the block is written back all the same: unchanged
                refs.d_key[...] = refs.old_key[...]
                refs.d_value[...] = refs.old_value[...]


def put(new: Any, old: Any, gradient: jax.Array) -> None:
    """Writes a gradient, added to the running one if there is one, in float32."""
    if old is not None:
        gradient = old[...].astype(jnp.float32) + gradient
    new[...] = gradient.astype(new.dtype)


def _add_block(
    refs: Any, plan: blocks.PairPlan, at: blocks.BlockPair, scale: float, *, masked: bool
):
    key, value = refs.key[...], refs.value[...]
    visible = blocks.mask(plan, refs, at) if masked else None
    q_start, k_start = at.q_block * plan.q_block, at.k_block * plan.k_block
    if masked and plan.ragged_keys:  # 0 * NaN is NaN, here and below
        key, value = (blocks.valid_lanes(x, k_start, refs.k_stop[at.row]) for x in (key, value))
    columns = pl.ds(pl.multiple_of(at.q_step * plan.q_block, schedule.LANES), plan.q_block)

    def add(head, _):
        row = pl.ds(head, 1)
        query, d_out = refs.query[head], refs.d_out[head]
        if masked and plan.ragged_queries:
            query, d_out = (blocks.valid_lanes(x, q_start, plan.q_len) for x in (query, d_out))
        z = (scale * common.LOG2_E) * common.dot(key, query, (0, 0)) - refs.lse[row] * common.LOG2_E
        ds = common.dot(value, d_out, (0, 0)) - refs.delta[row]
        p = jnp.exp2(z)
        ds = p * ds
        if masked:
            p, ds = jnp.where(visible, p, 0.0), jnp.where(visible, ds, 0.0)
        p, ds = p.astype(value.dtype), ds.astype(value.dtype)
        refs.d_query[head, :, columns] += scale * common.dot(key, ds, (1, 0))
        if refs.d_key is not None:
            refs.value_sum[...] += common.dot(d_out, p, (1, 1))
            refs.key_sum[...] += common.dot(query, ds, (1, 1))

    lax.fori_loop(0, refs.query.shape[0], add, None)
