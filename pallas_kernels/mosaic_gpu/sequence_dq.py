"""The kernel for dq: a thread block walks over the keys of its tile of queries."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.sequence_tiles import Plan, Refs, same_segment, tile, two_products
from pallas_kernels.mosaic_gpu.wgmma import (
    LOG2E,
    ROWS,
    Walk,
    accumulate,
    div,
    drain,
    i32,
    iota,
    load_columns,
    rem,
    split_roles,
    spread,
    wait_free,
)


def _kv_blocks(plan: Plan, refs: Refs, batch, index) -> Walk:
    """Sequence blocks of a tile of queries."""
    config = plan.config
    first_unit = index * config.dq_warpgroups
    first = div(first_unit, plan.group) * ROWS
    last = div(first_unit + (config.dq_warpgroups - 1), plan.group) * ROWS + (ROWS - 1)
    to_all = to_any = i32(plan.kv_len)
    if plan.causal:
        to_all, to_any = jnp.minimum(first + 1, to_all), jnp.minimum(last + 1, to_any)
    stop = div(to_any + (config.dq_block_kv - 1), config.dq_block_kv)
    bounds = refs.ranges.at[batch, index] if plan.segments else None
    return Walk.of(i32(0), stop, i32(0), div(to_all, config.dq_block_kv), bounds)


def _unit(plan: Plan, kv_head, index, warpgroup) -> tuple[jax.Array, jax.Array]:
    """First token and query head of a warpgroup's tile of queries."""
    unit = index * plan.config.dq_warpgroups + warpgroup
    return div(unit, plan.group) * ROWS, kv_head * plan.group + rem(unit, plan.group)


def _dq_loads(plan: Plan, refs: Refs, scratch) -> None:
    plgpu = common.mosaic()
    config = plan.config
    batch, kv_head, index = tile(plan, plan.dq_steps, plan.causal)
    for warpgroup in range(config.dq_warpgroups):
        token, head = _unit(plan, kv_head, index, warpgroup)
        for source, name in ((refs.query, "q_smem"), (refs.d_out, "do_smem")):
            plgpu.copy_gmem_to_smem(
                source.at[batch, common.ds(token, ROWS), head],
                scratch[name].at[warpgroup],
                scratch["tile_full"].at[0],
            )

    walk = _kv_blocks(plan, refs, batch, index)

    def load(step, _):
        stage, block = rem(step, config.dq_stages), walk.nth(step)
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

    lax.fori_loop(0, walk.count, load, None)
    drain(scratch["free"], walk.count, config.dq_stages)


def _dq_mask(plan: Plan, token, start, row_segment, segment_ref):
    common.mosaic()
    shape = (ROWS, plan.config.dq_block_kv)
    column = iota(shape, 1) + start
    mask = column < plan.kv_len
    if plan.causal:
        mask &= column <= iota(shape, 0) + token
    if row_segment is not None:
        columns = load_columns(segment_ref)
        mask &= same_segment(row_segment, columns, shape)
    return mask


def _dq_compute(plan: Plan, refs: Refs, dq_ref, scratch, warpgroup) -> None:
    plgpu = common.mosaic()
    config = plan.config
    batch, kv_head, index = tile(plan, plan.dq_steps, plan.causal)
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
    walk = _kv_blocks(plan, refs, batch, index)

    def block_step(step, dq, masked: bool):
        stage = rem(step, config.dq_stages)
        k_ref, v_ref = scratch["k_smem"].at[stage], scratch["v_smem"].at[stage]
        plgpu.barrier_wait(scratch["full"].at[stage])

        def weights(scores):
            if masked:
                ids = scratch["segments"].at[stage] if plan.segments else None
                start = walk.nth(step) * config.dq_block_kv
                mask = _dq_mask(plan, token, start, row_segment, ids)
                scores = jnp.where(mask, scores, -jnp.inf)
            return jnp.exp2(scores * (plan.scale * LOG2E) - spread(lse, shape, 0))

        p, dp = two_products(
            (q_ref, k_ref.transpose((1, 0))), (do_ref, v_ref.transpose((1, 0))), shape, weights
        )
        ds = p * (dp - spread(delta, shape, 0))
        dq = accumulate(dq, (ds.astype(plan.dtype), k_ref))
        plgpu.barrier_arrive(scratch["free"].at[stage])
        return dq

    plgpu.barrier_wait(scratch["tile_full"].at[0])
    dq = common.zeros((ROWS, plan.head_dim))
    dq = lax.fori_loop(0, walk.plain, functools.partial(block_step, masked=False), dq)
    dq = lax.fori_loop(walk.plain, walk.count, functools.partial(block_step, masked=True), dq)
    out_ref = scratch["dq_smem"].at[warpgroup]
    out_ref[...] = (dq * plan.scale).astype(plan.dq_dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_ref, dq_ref.at[batch, rows, head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def dq_kernel(plan: Plan, inputs: dict[str, jax.Array]) -> jax.Array:
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
        refs = Refs(**dict(zip(inputs, arrays, strict=True)))
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
