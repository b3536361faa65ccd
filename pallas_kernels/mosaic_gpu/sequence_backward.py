"""Backward of the sequence part for Hopper: dq, dk and dv from the unified lse and delta.

Two kernels, so that every gradient is summed by one thread block in a fixed order: one for dq,
which walks over the keys of a tile of queries, and one for dk and dv, which walks over the queries
of all heads of a KV head. Scores are computed in both. In each, one warpgroup issues the TMA loads
into a ring and two or three compute; the products of one block are issued together, so that the
exponentials of the scores run beside the product with the values.

With z the scores, p = e^(z - lse): dv = p^T do, ds = p (do v^T - delta), dq = scale ds k,
dk = scale ds^T q (Zhu et al., arXiv 2603.15619; Dao, arXiv 2307.08691, algorithm 2).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.wgmma import (
    LOG2E,
    NO_SEGMENT,
    ROWS,
    accumulate,
    cdiv,
    div,
    divmod_i32,
    drain,
    heads_together,
    i32,
    iota,
    load_columns,
    pad_tokens,
    place,
    rem,
    segment_bounds,
    split_roles,
    spread,
    wait_free,
)


@dataclasses.dataclass(frozen=True)
class SequenceBackwardConfig:
    """Tile sizes of the two kernels; every compute warpgroup owns 64 rows."""

    dq_block_kv: int = 128  # keys of a ring stage
    dq_stages: int = 2
    dq_warpgroups: int = 2
    dkv_block_q: int = 128  # queries of a ring stage
    dkv_stages: int = 2
    dkv_warpgroups: int = 2

    def shared_memory(self, head_dim: int, dq_dtype: Any = jnp.float32) -> tuple[int, int]:
        """Bytes of shared memory of the dq and the dk, dv kernel, barriers rounded up."""
        row = head_dim * 2
        out = ROWS * head_dim * jnp.dtype(dq_dtype).itemsize
        tile = self.dq_warpgroups * (2 * ROWS * row + out)
        dq = tile + self.dq_stages * self.dq_block_kv * (2 * row + 4)
        keys = self.dkv_warpgroups * ROWS * 2 * row
        dkv = keys + self.dkv_stages * self.dkv_block_q * (2 * row + 12)
        return dq + 2048, dkv + 2048

    def check(self, head_dim: int, dq_dtype: Any) -> None:
        """Raises ValueError for a config that the kernels or the chip cannot run."""
        blocks = (self.dq_block_kv, self.dkv_block_q)
        counts = (self.dq_warpgroups, self.dkv_warpgroups)
        if any(block % ROWS or block > 256 for block in blocks) or not set(counts) <= {1, 2, 3}:
            raise ValueError(
                f"config needs blocks of 64, 128, 192 or 256 and 1 to 3 warpgroups, got {self}"
            )
        if min(self.dq_stages, self.dkv_stages) < 2:
            raise ValueError(f"config needs at least 2 stages, got {self}")
        needs = self.shared_memory(head_dim, dq_dtype)
        for need, name in zip(needs, ("dq", "dk, dv"), strict=True):
            common.check_smem(need, f"sequence backward, {name}")


def sequence_backward_config(head_dim: int) -> SequenceBackwardConfig:
    """The tile sizes for a head size: those that leave the accumulators in registers."""
    if head_dim == 128:
        return SequenceBackwardConfig(dq_block_kv=64, dkv_block_q=64)
    return SequenceBackwardConfig()


class _Plan(NamedTuple):
    """Static numbers of a call."""

    config: SequenceBackwardConfig
    batch: int
    q_len: int
    kv_len: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: Any
    dq_dtype: Any
    scale: float
    causal: bool
    segments: bool

    @property
    def dq_steps(self) -> int:
        """Thread blocks of a KV head in the dq kernel; a unit is a token tile of one head."""
        return cdiv(cdiv(self.q_len, ROWS) * self.group, self.config.dq_warpgroups)

    @property
    def dkv_steps(self) -> int:
        return cdiv(self.kv_len, ROWS * self.config.dkv_warpgroups)

    @property
    def q_rows(self) -> int:
        """Length of the arrays of rows: all that a warpgroup may read without TMA's clipping."""
        return cdiv(self.dq_steps * self.config.dq_warpgroups, self.group) * ROWS

    @property
    def kv_rows(self) -> int:
        return self.dkv_steps * self.config.dkv_warpgroups * ROWS


class _Refs(NamedTuple):
    query: Any
    key: Any
    value: Any
    d_out: Any
    lse: Any
    delta: Any
    query_segments: Any = None
    key_segments: Any = None
    ranges: Any = None


def _tile(plan: _Plan, per_head: int, heavy_last: bool):
    """Batch, KV head and place of this thread block's tile; those with the most work come first."""
    length = max(plan.q_len * plan.group, plan.kv_len)
    together = heads_together(plan.batch * plan.kv_heads, length, plan.head_dim)
    head, index = place(lax.axis_index("block"), together, per_head)
    if heavy_last:
        index = per_head - 1 - index
    return *divmod_i32(head, plan.kv_heads), index


def _segments_meet(rows, columns, shape):
    """Which row and column are of one segment; padding among the queries equals nothing."""
    return spread(rows, shape, 0) == spread(columns, shape, 1)


# dq


def _kv_blocks(plan: _Plan, refs: _Refs, batch, index) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sequence blocks [start, stop) of a tile of queries, masked from the second number on."""
    config = plan.config
    first_unit = index * config.dq_warpgroups
    first = div(first_unit, plan.group) * ROWS
    last = div(first_unit + (config.dq_warpgroups - 1), plan.group) * ROWS + (ROWS - 1)
    to_all = to_any = i32(plan.kv_len)
    if plan.causal:
        to_all, to_any = jnp.minimum(first + 1, to_all), jnp.minimum(last + 1, to_any)
    start, masked = i32(0), div(to_all, config.dq_block_kv)
    stop = div(to_any + (config.dq_block_kv - 1), config.dq_block_kv)
    if plan.segments:
        start = masked = jnp.minimum(refs.ranges[batch, index, 0], stop)
        stop = jnp.minimum(refs.ranges[batch, index, 1], stop)
    return start, masked, stop


def _unit(plan: _Plan, kv_head, index, warpgroup) -> tuple[jax.Array, jax.Array]:
    """First token and query head of a warpgroup's tile of queries."""
    unit = index * plan.config.dq_warpgroups + warpgroup
    return div(unit, plan.group) * ROWS, kv_head * plan.group + rem(unit, plan.group)


def _dq_loads(plan: _Plan, refs: _Refs, scratch) -> None:
    plgpu = common.mosaic()
    config = plan.config
    batch, kv_head, index = _tile(plan, plan.dq_steps, plan.causal)
    for warpgroup in range(config.dq_warpgroups):
        token, head = _unit(plan, kv_head, index, warpgroup)
        for source, name in ((refs.query, "q_smem"), (refs.d_out, "do_smem")):
            plgpu.copy_gmem_to_smem(
                source.at[batch, common.ds(token, ROWS), head],
                scratch[name].at[warpgroup],
                scratch["tile_full"].at[0],
            )

    def load(block, step):
        stage = rem(step, config.dq_stages)
        wait_free(scratch["free"], step, config.dq_stages)
        keys, full = common.ds(block * config.dq_block_kv, config.dq_block_kv), scratch["full"]
        for source, name in ((refs.key, "k_smem"), (refs.value, "v_smem")):
            plgpu.copy_gmem_to_smem(
                source.at[batch, keys, kv_head], scratch[name].at[stage], full.at[stage]
            )
        if plan.segments:
            plgpu.copy_gmem_to_smem(
                refs.key_segments.at[batch, keys], scratch["segments"].at[stage], full.at[stage]
            )
        return step + 1

    start, _, stop = _kv_blocks(plan, refs, batch, index)
    steps = lax.fori_loop(start, stop, load, i32(0))
    drain(scratch["free"], steps, config.dq_stages)


def _dq_mask(plan: _Plan, token, start, row_segment, segment_ref):
    common.mosaic()
    shape = (ROWS, plan.config.dq_block_kv)
    column = iota(shape, 1) + start
    mask = column < plan.kv_len
    if plan.causal:
        mask &= column <= iota(shape, 0) + token
    if row_segment is not None:
        columns = load_columns(segment_ref)
        mask &= _segments_meet(row_segment, columns, shape)
    return mask


def _two_products(first, second, shape: tuple[int, int], use_first):
    """a @ b twice, issued together; `use_first` runs beside the second product."""
    pl, plgpu = common.pallas(), common.mosaic()

    def products(first_acc, second_acc):
        plgpu.wgmma(first_acc, *first)
        plgpu.wgmma(second_acc, *second)
        used = use_first(plgpu.wgmma_accumulator_load(first_acc, wait_n=1))
        return used, plgpu.wgmma_accumulator_load(second_acc, wait_n=0)

    acc = plgpu.ACC(shape, jnp.float32)
    return pl.run_scoped(products, acc, acc)


def _dq_compute(plan: _Plan, refs: _Refs, dq_ref, scratch, warpgroup) -> None:
    plgpu = common.mosaic()
    config = plan.config
    batch, kv_head, index = _tile(plan, plan.dq_steps, plan.causal)
    token, head = _unit(plan, kv_head, index, warpgroup)
    rows, layout = common.ds(token, ROWS), plgpu.Layout.WGMMA.reduce(1)
    lse, delta = (
        plgpu.load(x.at[batch, head, rows], layout=layout, optimized=False)
        for x in (refs.lse, refs.delta)
    )
    row_segment = None
    if plan.segments:
        ids = refs.query_segments.at[batch, rows]
        row_segment = plgpu.load(ids, layout=layout, optimized=False)
    q_ref, do_ref = scratch["q_smem"].at[warpgroup], scratch["do_smem"].at[warpgroup]
    shape = (ROWS, config.dq_block_kv)

    def block_step(block, carry, masked: bool):
        step, dq = carry
        stage = rem(step, config.dq_stages)
        k_ref, v_ref = scratch["k_smem"].at[stage], scratch["v_smem"].at[stage]
        plgpu.barrier_wait(scratch["full"].at[stage])

        def weights(scores):
            if masked:
                ids = scratch["segments"].at[stage] if plan.segments else None
                mask = _dq_mask(plan, token, block * config.dq_block_kv, row_segment, ids)
                scores = jnp.where(mask, scores, -jnp.inf)
            return jnp.exp2(scores * (plan.scale * LOG2E) - spread(lse, shape, 0))

        p, dp = _two_products(
            (q_ref, k_ref.transpose((1, 0))), (do_ref, v_ref.transpose((1, 0))), shape, weights
        )
        ds = p * (dp - spread(delta, shape, 0))
        dq = accumulate(dq, (ds.astype(plan.dtype), k_ref))
        plgpu.barrier_arrive(scratch["free"].at[stage])
        return step + 1, dq

    start, masked, stop = _kv_blocks(plan, refs, batch, index)
    plgpu.barrier_wait(scratch["tile_full"].at[0])
    carry = (i32(0), common.zeros((ROWS, plan.head_dim)))
    if not plan.segments:
        carry = lax.fori_loop(start, masked, functools.partial(block_step, masked=False), carry)
    _, dq = lax.fori_loop(masked, stop, functools.partial(block_step, masked=True), carry)
    out_ref = scratch["dq_smem"].at[warpgroup]
    out_ref[...] = (dq * plan.scale).astype(plan.dq_dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_ref, dq_ref.at[batch, rows, head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _dq_kernel(plan: _Plan, inputs: dict[str, jax.Array]) -> jax.Array:
    plgpu = common.mosaic()
    config, dim = plan.config, plan.head_dim
    count, stages, block = config.dq_warpgroups, config.dq_stages, config.dq_block_kv
    scratch = {
        "q_smem": common.smem((count, ROWS, dim), plan.dtype),
        "do_smem": common.smem((count, ROWS, dim), plan.dtype),
        "dq_smem": common.smem((count, ROWS, dim), plan.dq_dtype),
        "k_smem": common.smem((stages, block, dim), plan.dtype),
        "v_smem": common.smem((stages, block, dim), plan.dtype),
        "tile_full": common.barrier(2 * count, 1),
        "full": common.barrier(3 if plan.segments else 2, stages),
        "free": common.barrier(count, stages),
    }
    if plan.segments:
        scratch["segments"] = plgpu.SMEM((stages, block), jnp.int32)
    query = inputs["query"]

    def body(*operands, **scratch):
        *arrays, dq_ref = operands
        refs = _Refs(**dict(zip(inputs, arrays, strict=True)))
        split_roles(
            count,
            lambda warpgroup: _dq_compute(plan, refs, dq_ref, scratch, warpgroup),
            lambda: _dq_loads(plan, refs, scratch),
        )

    return common.launch(
        body,
        name="moda_sequence_dq",
        grid={"block": plan.batch * plan.kv_heads * plan.dq_steps},
        out_type=jax.ShapeDtypeStruct(query.shape, plan.dq_dtype),
        scratch=scratch,
        threads=count + 1,
    )(*inputs.values())


# dk, dv


def _q_blocks(plan: _Plan, refs: _Refs, batch, index) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query blocks [start, stop) that see a tile of keys, masked before the second number."""
    block_q = plan.config.dkv_block_q
    start, full, stop = i32(0), i32(0), i32(cdiv(plan.q_len, block_q))
    if plan.causal:
        keys = ROWS * plan.config.dkv_warpgroups
        first = index * keys
        start = jnp.minimum(div(first, block_q), stop)
        full = jnp.minimum(div(first + (keys - 1 + block_q - 1), block_q), stop)
    if plan.segments:
        start = jnp.maximum(refs.ranges[batch, index, 0], start)
        stop = full = jnp.maximum(refs.ranges[batch, index, 1], start)
    return start, full, stop


def _dkv_loads(plan: _Plan, refs: _Refs, scratch) -> None:
    plgpu = common.mosaic()
    config = plan.config
    batch, kv_head, index = _tile(plan, plan.dkv_steps, False)
    for warpgroup in range(config.dkv_warpgroups):
        keys = common.ds((index * config.dkv_warpgroups + warpgroup) * ROWS, ROWS)
        for source, name in ((refs.key, "k_smem"), (refs.value, "v_smem")):
            plgpu.copy_gmem_to_smem(
                source.at[batch, keys, kv_head],
                scratch[name].at[warpgroup],
                scratch["tile_full"].at[0],
            )

    def load(step, first):
        stage = rem(step, config.dkv_stages)
        wait_free(scratch["free"], step, config.dkv_stages)
        block, head = first + div(step, plan.group), kv_head * plan.group + rem(step, plan.group)
        rows, full = common.ds(block * config.dkv_block_q, config.dkv_block_q), scratch["full"]
        for source, name in (
            (refs.query.at[batch, rows, head], "q_smem"),
            (refs.lse.at[batch, head, rows], "lse"),
            (refs.d_out.at[batch, rows, head], "do_smem"),
            (refs.delta.at[batch, head, rows], "delta"),
        ):
            plgpu.copy_gmem_to_smem(source, scratch[name].at[stage], full.at[stage])
        if plan.segments:
            plgpu.copy_gmem_to_smem(
                refs.query_segments.at[batch, rows], scratch["segments"].at[stage], full.at[stage]
            )
        return first

    start, _, stop = _q_blocks(plan, refs, batch, index)
    steps = (stop - start) * plan.group
    lax.fori_loop(0, steps, load, start)
    drain(scratch["free"], steps, config.dkv_stages)


def _dkv_mask(plan: _Plan, first_key, token, row_segment, segment_ref):
    """[keys, queries]: transposed, as the scores are."""
    common.mosaic()
    shape = (ROWS, plan.config.dkv_block_q)
    mask = None
    if plan.causal:
        mask = iota(shape, 0) + first_key <= iota(shape, 1) + token
    if row_segment is not None:
        columns = load_columns(segment_ref)
        meet = _segments_meet(row_segment, columns, shape)
        mask = meet if mask is None else mask & meet
    return mask


def _dkv_products(plan: _Plan, tiles, weights, delta, dk, dv):
    """dk and dv with one block of queries added: four products, of which two may run at a time."""
    pl, plgpu = common.pallas(), common.mosaic()
    k_ref, v_ref, q_ref, do_ref = tiles
    shape = (ROWS, plan.config.dkv_block_q)
    scores = (k_ref, q_ref.transpose((1, 0)))
    d_weights = (v_ref, do_ref.transpose((1, 0)))
    if platforms.interpreted():  # which cannot initialise an accumulator
        p, dp = _two_products(scores, d_weights, shape, weights)
        ds = p * (dp - delta())
        dv = accumulate(dv, (p.astype(plan.dtype), do_ref))
        return accumulate(dk, (ds.astype(plan.dtype), q_ref)), dv

    def update(accs):
        dk_acc, dv_acc = accs

        def products(s_acc, dp_acc):
            plgpu.wgmma(s_acc, *scores)
            plgpu.wgmma(dp_acc, *d_weights)
            p = weights(plgpu.wgmma_accumulator_load(s_acc, wait_n=1))
            plgpu.wgmma(dv_acc, p.astype(plan.dtype), do_ref)
            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
            ds = p * (dp - delta())
            plgpu.wgmma(dk_acc, ds.astype(plan.dtype), q_ref)

        acc = plgpu.ACC(shape, jnp.float32)
        pl.run_scoped(products, acc, acc)

    return pl.run_state(update)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))


def _dkv_compute(plan: _Plan, refs: _Refs, dk_ref, dv_ref, scratch, warpgroup) -> None:
    plgpu = common.mosaic()
    config = plan.config
    batch, kv_head, index = _tile(plan, plan.dkv_steps, False)
    first_key = (index * config.dkv_warpgroups + warpgroup) * ROWS
    keys, by_row, _by_column = (
        common.ds(first_key, ROWS), plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    )  # fmt: skip
    row_segment = None
    if plan.segments:
        ids = refs.key_segments.at[batch, keys]
        row_segment = plgpu.load(ids, layout=by_row, optimized=False)
    k_ref, v_ref = scratch["k_smem"].at[warpgroup], scratch["v_smem"].at[warpgroup]
    shape = (ROWS, config.dkv_block_q)
    start, full, stop = _q_blocks(plan, refs, batch, index)

    def block_step(step, carry, masked: bool):
        stage = rem(step, config.dkv_stages)
        plgpu.barrier_wait(scratch["full"].at[stage])

        def columns(name):
            return spread(load_columns(scratch[name].at[stage]), shape, 1)

        def weights(scores):
            if masked:
                ids = scratch["segments"].at[stage] if plan.segments else None
                token = (start + div(step, plan.group)) * config.dkv_block_q
                mask = _dkv_mask(plan, first_key, token, row_segment, ids)
                scores = jnp.where(mask, scores, -jnp.inf)
            return jnp.exp2(scores * (plan.scale * LOG2E) - columns("lse"))

        tiles = (k_ref, v_ref, scratch["q_smem"].at[stage], scratch["do_smem"].at[stage])
        carry = _dkv_products(plan, tiles, weights, lambda: columns("delta"), *carry)
        plgpu.barrier_arrive(scratch["free"].at[stage])
        return carry

    plgpu.barrier_wait(scratch["tile_full"].at[0])
    zeros = common.zeros((ROWS, plan.head_dim))
    carry, edge = (zeros, zeros), (full - start) * plan.group
    if plan.causal or plan.segments:
        carry = lax.fori_loop(0, edge, functools.partial(block_step, masked=True), carry)
    if not plan.segments:
        steps = (stop - start) * plan.group
        carry = lax.fori_loop(edge, steps, functools.partial(block_step, masked=False), carry)
    dk, dv = carry
    k_ref[...] = (dk * plan.scale).astype(plan.dtype)
    v_ref[...] = dv.astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k_ref, dk_ref.at[batch, keys, kv_head], commit_group=False)
    plgpu.copy_smem_to_gmem(v_ref, dv_ref.at[batch, keys, kv_head], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _dkv_kernel(plan: _Plan, inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    plgpu = common.mosaic()
    config, dim = plan.config, plan.head_dim
    count, stages, block = config.dkv_warpgroups, config.dkv_stages, config.dkv_block_q
    scratch = {
        "k_smem": common.smem((count, ROWS, dim), plan.dtype),
        "v_smem": common.smem((count, ROWS, dim), plan.dtype),
        "q_smem": common.smem((stages, block, dim), plan.dtype),
        "do_smem": common.smem((stages, block, dim), plan.dtype),
        "lse": plgpu.SMEM((stages, block), jnp.float32),
        "delta": plgpu.SMEM((stages, block), jnp.float32),
        "tile_full": common.barrier(2 * count, 1),
        "full": common.barrier(5 if plan.segments else 4, stages),
        "free": common.barrier(count, stages),
    }
    if plan.segments:
        scratch["segments"] = plgpu.SMEM((stages, block), jnp.int32)
    key = inputs["key"]

    def body(*operands, **scratch):
        *arrays, dk_ref, dv_ref = operands
        refs = _Refs(**dict(zip(inputs, arrays, strict=True)))
        split_roles(
            count,
            lambda warpgroup: _dkv_compute(plan, refs, dk_ref, dv_ref, scratch, warpgroup),
            lambda: _dkv_loads(plan, refs, scratch),
        )

    return common.launch(
        body,
        name="moda_sequence_dkv",
        grid={"block": plan.batch * plan.kv_heads * plan.dkv_steps},
        out_type=(jax.ShapeDtypeStruct(key.shape, key.dtype),) * 2,
        scratch=scratch,
        threads=count + 1,
    )(*inputs.values())


# entry


def _ranges(plan: _Plan, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
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
    config = sequence_backward_config(head_dim) if config is None else config
    config.check(head_dim, dq_dtype)
    plan = _Plan(
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
    dq = _dq_kernel(plan, dq_inputs)
    dk, dv = _dkv_kernel(plan, dkv_inputs)
    return dq[:, :q_len], dk[:, :kv_len], dv[:, :kv_len]
