"""Depth part of the backward: dq, and the depth gradients, stored or added into a running cache.

Token-local: a query meets the slots of its own token only. One warpgroup takes a tile of tokens of
one key/value head with all G query heads of each, so that a depth key is read once, and walks over
the visible slots. Rows are (head, token), columns (slot, token); the products are dense and all
pairs of different tokens are masked: the tensor cores have time to spare where memory is the limit.

    s = q kdᵀ   dp = do vdᵀ   p = e^(scale s - lse)   ds = scale p (dp - delta)
    dvd = pᵀ do   dkd = dsᵀ q   dq += ds kd

lse and delta are those of the whole softmax, sequence included, so the parts simply add.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.depth.tiles import (
    DepthConfig,
    DepthLaunch,
    DepthPlace,
    SlotBlocks,
    SlotTile,
    clear_slots,
    flat_slots,
    load_slots,
    plan_launches,
    slot_barriers,
    store_slots,
    store_zeros,
    unflat_slots,
    wait_slots,
)

_LOG2_E = math.log2(math.e)


def smem_bytes(tile: SlotTile, config: DepthConfig, grad_dtype: Any) -> int:
    """Shared memory that a block of the kernel asks for."""
    rows = 2 * tile.rows * (tile.head_dim + tile.columns) * 2 + 2 * tile.rows * 4
    slots = 2 * config.stages * tile.columns * tile.head_dim * 2
    grads = 0
    if grad_dtype is not None:
        grads = 2 * tile.columns * tile.head_dim * jnp.dtype(grad_dtype).itemsize
    return rows + slots + grads


def depth_backward(
    query: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    depth_key: jax.Array,
    depth_value: jax.Array,
    slots: jax.Array,
    *,
    scale: float,
    is_prefix: bool = False,
    d_query: jax.Array | None = None,
    depth_grads: tuple[jax.Array, jax.Array] | None = None,
    want_depth: bool = True,
    config: DepthConfig | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """(dq, (dkd, dvd)) of the depth part.

    Args:
      query, d_out: [B, T, N, H], bfloat16 or float16.
      lse, delta: [B, T, N] float32: natural-log sum of the whole softmax (-inf: sees nothing), and
        rowsum(do · o) - dlse.
      depth_key, depth_value: [S, B, T, K, H].
      slots: [4] int32, two half-open ranges of visible slots; no other slot is touched.
      is_prefix: the first range starts at slot 0 and the second is empty, always.
      d_query: [B, T, N, H], added to dq; None: 0.
      want_depth: whether to compute (dkd, dvd); else None stands for them.
      depth_grads: running gradients [S, B, T, K, H], float32 or bfloat16, which are added to and
        returned; None: new ones in the keys' dtype, 0 for invisible slots.
    """
    kv_heads = depth_key.shape[3]
    config = config or DepthConfig()
    group = query.shape[2] // kv_heads
    parts: dict[tuple[int, int], jax.Array] = {}
    for launch in plan_launches(group, query.shape, slots, is_prefix, config):
        # Each launch adds to the results of those before: of other slots, or of other heads.
        take = functools.partial(common.take_heads, kv_heads=kv_heads, part=launch.heads)
        so_far = parts.get((0, group), d_query)
        rows = take(query), take(d_out), take(lse), take(delta)
        before = None if so_far is None else take(so_far)
        dq, depth_grads = _call(
            launch,
            *rows,
            depth_key,
            depth_value,
            before,
            depth_grads,
            scale,
            want_depth=want_depth,
            config=config,
        )
        parts[launch.heads] = dq
    if len(parts) > 1:
        parts.pop((0, group), None)
    return common.join_heads(list(parts.values()), kv_heads), depth_grads


def _call(
    launch: DepthLaunch,
    query,
    d_out,
    lse,
    delta,
    depth_key,
    depth_value,
    d_query,
    grads,
    scale,
    *,
    want_depth,
    config,
):
    """One launch."""
    batch, length, num_heads, _ = query.shape
    kv_heads = depth_key.shape[3]
    group = num_heads // kv_heads
    tile = launch.tile
    padded = tile.group
    # lse = +inf makes all weights e^(s - lse) of padding, and of a query that sees nothing, 0.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * _LOG2_E)
    rows = [
        common.tile_rows(x, kv_heads, padded, tile.tokens, fill, tokens_first=tile.tokens_first)
        for x, fill in ((lse, jnp.inf), (delta, 0.0))
    ]

    def pad(x: jax.Array) -> jax.Array:
        x = common.pad_heads(x, kv_heads=kv_heads, group=padded)
        return common.pad_tokens(x, 1, tile.tokens)

    flat = [flat_slots(x, tile) for x in (depth_key, depth_value)]
    operands = [jnp.asarray(launch.slots), pad(query), pad(d_out), *rows, *flat]
    if d_query is not None:
        operands.append(pad(d_query))
    running = [] if grads is None else [jax.new_ref(flat_slots(g, tile)) for g in grads]
    out_type = [jax.ShapeDtypeStruct(operands[1].shape, query.dtype)]
    if want_depth and not running:
        out_type += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
    grad_dtype = (running[0].dtype if running else flat[0].dtype) if want_depth else None
    common.check_smem(smem_bytes(tile, config, grad_dtype), "depth_backward")
    outputs = common.launch(
        functools.partial(
            _kernel,
            tile=tile,
            config=config,
            scale=scale,
            has_d_query=d_query is not None,
            want_depth=want_depth,
            add=bool(running),
        ),
        name="moda_depth_backward",
        grid={"head": kv_heads, "tile": -(-length // tile.tokens), "row": batch},
        out_type=out_type,
        scratch=_scratch(tile, config, query.dtype, grad_dtype),
    )(*operands, *running)
    dq = common.unpad_heads(outputs[0][:, :length], kv_heads, group)
    if not want_depth:
        return dq, None
    new = [jax.freeze(ref) for ref in running] or outputs[-2:]
    return dq, tuple(unflat_slots(x, depth_key.shape) for x in new)


def _scratch(tile: SlotTile, config: DepthConfig, dtype: Any, grad_dtype: Any) -> dict[str, Any]:
    smem, barrier = common.smem, common.barrier
    scratch = {
        "q": smem((tile.rows, tile.head_dim), dtype),
        "do": smem((tile.rows, tile.head_dim), dtype),
        "p": smem((tile.rows, tile.columns), dtype),
        "ds": smem((tile.rows, tile.columns), dtype),
        "lse": smem((tile.rows,), jnp.float32),
        "delta": smem((tile.rows,), jnp.float32),
        "kd": tile.buffer(dtype, config.stages),
        "vd": tile.buffer(dtype, config.stages),
        "rows_loaded": barrier(2 * tile.copies[0] + 2, 1),
        **slot_barriers(tile, config.stages),
        "d_query_loaded": barrier(tile.copies[0], 1),
    }
    if grad_dtype is not None:
        scratch["dkd"] = tile.buffer(grad_dtype)
        scratch["dvd"] = tile.buffer(grad_dtype)
    return scratch


def _kernel(
    slots_ref,
    q_ref,
    do_ref,
    lse_ref,
    delta_ref,
    kd_ref,
    vd_ref,
    *refs,
    tile: SlotTile,
    config: DepthConfig,
    scale: float,
    has_d_query: bool,
    want_depth: bool,
    add: bool,
    **scratch,
):
    """One warpgroup: a token tile of one row and key/value head. `refs`: see `_split_refs`."""
    plgpu = common.mosaic()
    d_query_ref, grad_refs, dq_ref = _split_refs(refs, has_d_query=has_d_query, add=add)
    here = DepthPlace.here(lse_ref.shape[2] // tile.rows, tile)
    blocks = SlotBlocks.of(slots_ref, tile)
    _load_rows(here, q_ref, do_ref, lse_ref, delta_ref, scratch)
    load = functools.partial(load_slots, here, blocks, kd_ref, vd_ref, scratch)
    clear_slots(scratch, tile, range(config.stages))
    for stage in range(config.stages):
        common.when(stage < blocks.count, functools.partial(load, jnp.int32(stage), stage))
    plgpu.barrier_wait(scratch["rows_loaded"].at[0])
    weights = [_RowBlock.of(scratch, r) for r in range(tile.rows // 64)]
    dq = [common.zeros((64, tile.head_dim)) for _ in weights]

    def body(block, dq):
        stage = lax.rem(block, jnp.int32(config.stages))
        wait_slots(blocks, scratch, block, stage)
        kd, vd = (tile.matrix(scratch[name].at[stage]) for name in ("kd", "vd"))
        seen = blocks.mask(block)
        for row in weights:
            row.weigh(scratch, kd, vd, seen, scale)
        plgpu.commit_smem()
        dq = [
            common.multiply_add(total, scratch["ds"].at[row.rows], kd)
            for total, row in zip(dq, weights, strict=True)
        ]
        if want_depth:
            _multiply_slots(tile, scratch)
            store_slots(here, blocks, block, grad_refs, scratch, ("dkd", "dvd"), add=add)
        else:
            plgpu.commit_smem()  # everyone has read the stage before it is loaded again
        following = block + config.stages
        common.when(following < blocks.count, functools.partial(load, following, stage))
        return dq

    dq = lax.fori_loop(0, blocks.count, body, dq)
    _store_query(here, dq, d_query_ref, dq_ref, scratch)
    if want_depth and not add:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        zeros = common.zeros((tile.columns, tile.head_dim)).astype(scratch["dkd"].dtype)
        tile.matrix(scratch["dkd"])[...] = zeros
        plgpu.commit_smem()
        store_zeros(here, blocks, kd_ref.shape[0], grad_refs, scratch["dkd"])
    plgpu.wait_smem_to_gmem(0)


def _split_refs(refs, *, has_d_query: bool, add: bool):
    """(d_query or None, (dkd, dvd) or (), dq); running gradients come before dq."""
    rest = list(refs)
    d_query_ref = rest.pop(0) if has_d_query else None
    running = (rest.pop(0), rest.pop(0)) if add else ()
    dq_ref = rest.pop(0)
    return d_query_ref, running or tuple(rest), dq_ref


class _RowBlock(NamedTuple):
    """64 rows (head, token) of the tile."""

    start: int
    lse: jax.Array
    delta: jax.Array

    @classmethod
    def of(cls, scratch, index: int) -> "_RowBlock":
        plgpu = common.mosaic()
        rows = common.ds(64 * index, 64)
        lse, delta = (
            plgpu.load(scratch[name].at[rows], layout=plgpu.Layout.WGMMA.reduce(1))
            for name in ("lse", "delta")
        )
        return cls(64 * index, lse, delta)

    @property
    def rows(self):
        return common.ds(self.start, 64)

    def weigh(self, scratch, kd, vd, seen, scale: float):
        """Writes p and ds of these rows to shared memory."""
        rows = self.rows
        dtype = kd.dtype
        s = common.multiply(scratch["q"].at[rows], kd.transpose((1, 0)), seen.shape)
        lse, delta = (lax.broadcast_in_dim(x, seen.shape, (0,)) for x in (self.lse, self.delta))
        p = jnp.where(seen, jnp.exp2(s * (scale * _LOG2_E) - lse), 0.0)
        dp = common.multiply(scratch["do"].at[rows], vd.transpose((1, 0)), seen.shape)
        ds = jnp.where(seen, p * (dp - delta) * scale, 0.0).astype(dtype)
        scratch["p"][rows] = p.astype(dtype)
        scratch["ds"][rows] = ds


def _load_rows(here: DepthPlace, q_ref, do_ref, lse_ref, delta_ref, scratch) -> None:
    plgpu = common.mosaic()
    loaded, tile = scratch["rows_loaded"].at[0], here.tile
    for rows, q, do in here.queries(q_ref, do_ref):
        plgpu.copy_gmem_to_smem(q, scratch["q"].at[rows], loaded)
        plgpu.copy_gmem_to_smem(do, scratch["do"].at[rows], loaded)
    rows = common.ds(here.tile_index * tile.rows, tile.rows)
    for name, ref in (("lse", lse_ref), ("delta", delta_ref)):
        plgpu.copy_gmem_to_smem(ref.at[here.row, here.head, rows], scratch[name], loaded)


def _multiply_slots(tile: SlotTile, scratch) -> None:
    """dkd = dsᵀ q and dvd = pᵀ do of a block, to shared memory."""
    plgpu = common.mosaic()
    shape = (tile.columns, tile.head_dim)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous block's gradients are copied
    for name, weights, rows in (("dkd", "ds", "q"), ("dvd", "p", "do")):
        product = common.multiply(scratch[weights].transpose((1, 0)), scratch[rows], shape)
        tile.matrix(scratch[name])[...] = product.astype(scratch[name].dtype)
    plgpu.commit_smem()


def _store_query(here: DepthPlace, dq, d_query_ref, dq_ref, scratch) -> None:
    """dq plus the sequence part's, through the queries' place in shared memory."""
    plgpu = common.mosaic()
    q = scratch["q"]
    plgpu.commit_smem()
    if d_query_ref is not None:
        loaded = scratch["d_query_loaded"].at[0]
        for rows, piece in here.queries(d_query_ref):
            plgpu.copy_gmem_to_smem(piece, q.at[rows], loaded)
        plgpu.barrier_wait(loaded)
    for r, part in enumerate(dq):
        rows = common.ds(64 * r, 64)
        if d_query_ref is not None:
            old = plgpu.load(q.at[rows], layout=plgpu.Layout.WGMMA, optimized=False)
            part = part + old.astype(jnp.float32)
        q[rows] = part.astype(q.dtype)
    plgpu.commit_smem()
    for rows, piece in here.queries(dq_ref):
        plgpu.copy_smem_to_gmem(q.at[rows], piece)
