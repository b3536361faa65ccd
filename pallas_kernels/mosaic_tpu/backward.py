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
    shape: schedule.Shape,
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
    plan = blocks.make_plan(shape, tiles, sides, causal=causal, chunk=chunk)
    spans = schedule.query_spans(shape.q_len, tiles)
    own = grads is None
    grads_dtype = jnp.float32 if own and len(spans) > 1 else key.dtype
    known = not (plan.has_offsets or plan.has_segments)
    pairs = schedule.block_pairs(shape, tiles, causal=causal, chunk=chunk)
    parts = []
    for start, stop in reversed(spans):  # under causality, the last one sees all keys
        part = dataclasses.replace(plan, q_first=start, q_count=stop - start)
        if grads is not None and known:  # later keys have their gradient already
            seen = pairs[start:stop].any(axis=0).nonzero()[0]
            part = dataclasses.replace(part, k_count=int(seen.max(initial=0)) + 1)
        d_query, grads = _launch(
            part, query, key, value, d_out, lse, delta, slots, sides, grads, shape, scale,
            schedule.tokens_backward_work(
                shape, tiles, causal=causal, chunk=chunk, sources=key.shape[0], span=(start, stop)
            ),
            grads_dtype, want_keys,
        )  # fmt: skip
        parts.append(d_query)
    d_query = jnp.concatenate(parts[::-1], axis=-1) if len(parts) > 1 else parts[0]
    if own and want_keys:
        grads = (grads[0].astype(key.dtype), grads[1].astype(key.dtype))
    return d_query[..., : shape.q_len], grads


def _launch(
    plan, query, key, value, d_out, lse, delta, slots, sides, grads, shape, scale, work,
    grads_dtype, want_keys,
):  # fmt: skip
    scalars = {"slots": slots} | blocks.block_scalars(plan, sides, shape.batch, by_key=True)

    def q_index(b, s, j, i, refs):
        """Where nothing is left to do, the block that is there already."""
        rest = s >= common.count_slots(refs.slots)
        step = jnp.where(rest, plan.q_count, i)
        column = jnp.where(rest, plan.k_count - 1, j)
        return plan.q_first + blocks.hull_index(step, b * plan.k_count + column, refs)

    def k_index(b, s, j, refs):
        return jnp.where(s < common.count_slots(refs.slots), j, plan.k_count - 1)

    def of_query(b, k, s, j, i, refs):
        return b, k, 0, 0, q_index(b, s, j, i, refs)

    def row_of_query(b, k, s, j, i, refs):
        return b, k, 0, q_index(b, s, j, i, refs)

    def of_key(b, k, s, j, i, refs):
        return common.slot_index(s, refs.slots), b, k, 0, k_index(b, s, j, refs)

    rows = (None, None, shape.group, shape.head_dim, plan.q_block)
    vectors = (None, None, shape.group, plan.q_block)
    keys = (None, None, None, shape.head_dim, plan.k_block)
    span = (shape.batch, shape.kv_heads, shape.group, shape.head_dim, plan.q_count * plan.q_block)
    new_key = new_value = None
    if want_keys:
        new_key = new_value = jax.ShapeDtypeStruct(
            key.shape, grads_dtype if grads is None else grads[0].dtype
        )
    old = (None, None) if grads is None or not want_keys else grads
    sources = key.shape[0]
    out = common.launch(
        functools.partial(_kernel, plan=plan, scale=scale),
        name="moda_tokens_backward",
        grid=(shape.batch, shape.kv_heads, sources, plan.k_count, plan.q_count),
        parallel=2,
        scalars=scalars,
        inputs={
            "query": Blocked(query, rows, of_query),
            "key": Blocked(key, keys, of_key),
            "value": Blocked(value, keys, of_key),
            "d_out": Blocked(d_out, rows, of_query),
            "lse": Blocked(lse, vectors, row_of_query),
            "delta": Blocked(delta, vectors, row_of_query),
            "old_key": Blocked(old[0], keys, of_key),
            "old_value": Blocked(old[1], keys, of_key),
            **mask_inputs(
                plan, sides, shape.batch,
                q_index=lambda b, k, s, j, i, refs: (b, 0, q_index(b, s, j, i, refs)),
                k_index=lambda b, k, s, j, i, refs: (b, 0, k_index(b, s, j, refs)),
            ),
        },
        outputs={
            "d_query": Blocked(
                jax.ShapeDtypeStruct(span, jnp.float32), (None, None, *span[2:]),
                lambda b, k, s, j, i, refs: (b, k, 0, 0, 0),
            ),
            "d_key": Blocked(new_key, keys, of_key),
            "d_value": Blocked(new_value, keys, of_key),
        },
        scratch={"key_sum": keys[3:], "value_sum": keys[3:]} if want_keys else {},
        work=work,
        aliases={"old_key": "d_key", "old_value": "d_value"} if old[0] is not None else {},
    )  # fmt: skip
    return out["d_query"], (out["d_key"], out["d_value"]) if want_keys else None


def _kernel(refs: Any, *, plan: blocks.Plan, scale: float) -> None:
    b, s, j, i = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    count = common.count_slots(refs.slots)
    entry = b * plan.k_count + j
    step = refs.first[entry] + i
    at = blocks.pair(
        plan, refs, b, plan.q_first + jnp.minimum(step, plan.q_count - 1), j
    )  # fmt: skip
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

        @pl.when((i == plan.q_count - 1) & (s < count))
        def _finish_keys():
            put(refs.d_key, refs.old_key, scale * refs.key_sum[...])
            put(refs.d_value, refs.old_value, refs.value_sum[...])

        if refs.old_key is not None:

            @pl.when(count == 0)
            def _nothing_is_visible():  # a block is written back all the same: as it was
                refs.d_key[...] = refs.old_key[...]
                refs.d_value[...] = refs.old_value[...]


def put(new: Any, old: Any, gradient: jax.Array) -> None:
    """Writes a gradient, added to the running one if there is one, in float32."""
    if old is not None:
        gradient = old[...].astype(jnp.float32) + gradient
    new[...] = gradient.astype(new.dtype)


def _add_block(refs: Any, plan: blocks.Plan, at: blocks.Pair, scale: float, *, masked: bool):
    key, value = refs.key[...], refs.value[...]
    visible = blocks.mask(plan, refs, at) if masked else None
    q_start, k_start = at.q_block * plan.q_block, at.k_block * plan.k_block
    if masked and plan.ragged_keys:  # 0 * NaN is NaN, here and below
        key, value = (blocks.valid_lanes(x, k_start, refs.k_stop[at.row]) for x in (key, value))
    of_span = at.q_block - plan.q_first
    columns = pl.ds(pl.multiple_of(of_span * plan.q_block, schedule.LANES), plan.q_block)

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
