"""The kernel for dk and dv: a thread block walks over the queries of all heads of a KV head."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.sequence_backward.tiles import (
    KeyPlan,
    KeyRefs,
    key_tile,
    same_segment,
)
from pallas_kernels.mosaic_gpu.wgmma import (
    LOG2E,
    ROWS,
    Walk,
    cdiv,
    div,
    drain,
    i32,
    iota,
    key_products,
    load_columns,
    rem,
    split_roles,
    spread,
    wait_free,
)


def _q_blocks(plan: KeyPlan, refs: KeyRefs, batch, index) -> Walk:
    """Query blocks that see a tile of keys."""
    block_q = plan.config.dkv_block_q
    start, plain, stop = i32(0), i32(0), i32(cdiv(plan.q_len, block_q))
    if plan.causal:
        keys = ROWS * plan.config.dkv_warpgroups
        first = index * keys
        start = jnp.minimum(div(first, block_q), stop)
        plain = div(first + (keys - 1 + block_q - 1), block_q)
    bounds = refs.ranges.at[batch, index] if plan.segments else None
    return Walk.of(start, stop, plain, stop, bounds)


def _dkv_loads(plan: KeyPlan, refs: KeyRefs, scratch) -> None:
    plgpu = common.mosaic()
    config = plan.config
    batch, kv_head, index = key_tile(plan)
    for warpgroup in range(config.dkv_warpgroups):
        keys = common.ds((index * config.dkv_warpgroups + warpgroup) * ROWS, ROWS)
        for source, name in ((refs.key, "k_smem"), (refs.value, "v_smem")):
            plgpu.copy_gmem_to_smem(
                source.at[batch, keys, kv_head],
                scratch[name].at[warpgroup],
                scratch["tile_full"].at[0],
            )

    walk = _q_blocks(plan, refs, batch, index)

    def load(step, _):
        stage = rem(step, config.dkv_stages)
        wait_free(scratch["free"], step, config.dkv_stages)
        block = walk.nth(div(step, plan.group))
        head = kv_head * plan.group + rem(step, plan.group)
        rows, full = common.ds(block * config.dkv_block_q, config.dkv_block_q), scratch["full"]
        for source, name in (
            (refs.query.at[batch, rows, head], "q_smem"),
            (refs.lse.at[batch, head, rows], "lse"),
            (refs.d_out.at[batch, rows, head], "do_smem"),
            (refs.minus_delta.at[batch, head, rows], "minus_delta"),
        ):
            plgpu.copy_gmem_to_smem(source, scratch[name].at[stage], full.at[stage])
        if plan.segments:
            plgpu.copy_gmem_to_smem(
                refs.query_segments.at[batch, rows], scratch["segments"].at[stage], full.at[stage]
            )

    steps = walk.count * plan.group
    lax.fori_loop(0, steps, load, None)
    drain(scratch["free"], steps, config.dkv_stages)


def _dkv_mask(plan: KeyPlan, first_key, token, row_segment, segment_ref):
    """[keys, queries]: transposed, as the scores are."""
    shape = (ROWS, plan.config.dkv_block_q)
    mask = None
    if plan.causal:
        mask = iota(shape, 0) + (first_key - token) <= iota(shape, 1)
    if row_segment is not None:
        columns = load_columns(segment_ref)
        meet = same_segment(row_segment, columns, shape)
        mask = meet if mask is None else mask & meet
    return mask


def _dkv_compute(plan: KeyPlan, refs: KeyRefs, dk_ref, dv_ref, scratch, warpgroup) -> None:
    plgpu = common.mosaic()
    config = plan.config
    batch, kv_head, index = key_tile(plan)
    first_key = (index * config.dkv_warpgroups + warpgroup) * ROWS
    keys = common.ds(first_key, ROWS)
    row_segment = None
    if plan.segments:
        ids = refs.key_segments.at[batch, keys]
        row_segment = plgpu.load(ids, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    k_ref, v_ref = scratch["k_smem"].at[warpgroup], scratch["v_smem"].at[warpgroup]
    shape = (ROWS, config.dkv_block_q)
    walk = _q_blocks(plan, refs, batch, index)

    def block_step(step, carry, masked: bool):
        stage = rem(step, config.dkv_stages)
        plgpu.barrier_wait(scratch["full"].at[stage])

        def columns(name):
            return spread(load_columns(scratch[name].at[stage]), shape, 1)

        def weights(scores):
            scores *= plan.scale * LOG2E
            if masked:
                ids = scratch["segments"].at[stage] if plan.segments else None
                token = walk.nth(div(step, plan.group)) * config.dkv_block_q
                mask = _dkv_mask(plan, first_key, token, row_segment, ids)
                scores = jnp.where(mask, scores, -jnp.inf)
            return jnp.exp2(scores - columns("lse"))

        tiles = (k_ref, v_ref, scratch["q_smem"].at[stage], scratch["do_smem"].at[stage])
        carry = key_products(tiles, shape, weights, columns("minus_delta"), *carry)
        plgpu.barrier_arrive(scratch["free"].at[stage])
        return carry

    plgpu.barrier_wait(scratch["tile_full"].at[0])
    zeros = common.zeros((ROWS, plan.head_dim))
    plain, steps = walk.plain * plan.group, walk.count * plan.group
    carry = (zeros, zeros)
    carry = lax.fori_loop(0, plain, functools.partial(block_step, masked=False), carry)
    if plan.causal or plan.segments:
        carry = lax.fori_loop(plain, steps, functools.partial(block_step, masked=True), carry)
    dk, dv = carry
    k_ref[...] = (dk * plan.scale).astype(plan.dtype)
    v_ref[...] = dv.astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k_ref, dk_ref.at[batch, keys, kv_head], commit_group=False)
    plgpu.copy_smem_to_gmem(v_ref, dv_ref.at[batch, keys, kv_head], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def dkv_kernel(plan: KeyPlan, inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    plgpu = common.mosaic()
    config, dim = plan.config, plan.head_dim
    count, stages, block = config.dkv_warpgroups, config.dkv_stages, config.dkv_block_q
    scratch = {
        "k_smem": common.smem((count, ROWS, dim), plan.dtype),
        "v_smem": common.smem((count, ROWS, dim), plan.dtype),
        "q_smem": common.smem((stages, block, dim), plan.dtype),
        "do_smem": common.smem((stages, block, dim), plan.dtype),
        "lse": plgpu.SMEM((stages, block), jnp.float32),
        "minus_delta": plgpu.SMEM((stages, block), jnp.float32),
        "tile_full": common.barrier(2 * count, 1),
        "full": common.barrier(5 if plan.segments else 4, stages),
        "free": common.barrier(count, stages),
    }
    if plan.segments:
        scratch["segments"] = plgpu.SMEM((stages, block), jnp.int32)
    key = inputs["key"]

    def body(*operands, **scratch):
        *arrays, dk_ref, dv_ref = operands
        refs = KeyRefs(**dict(zip(inputs, arrays, strict=True)))
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
