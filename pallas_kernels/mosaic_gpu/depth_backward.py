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
from pallas_kernels.mosaic_gpu.depth_tiles import (
    Blocks,
    DepthConfig,
    Place,
    Tile,
    choose_tile,
    clear_slots,
    load_slots,
)

_LOG2_E = math.log2(math.e)


def max_group(head_dim: int) -> int:
    """Largest G of one call: the tile's dq is kept in registers."""
    return 32 if head_dim <= 64 else 16


def smem_bytes(tile: Tile, config: DepthConfig, grad_dtype: Any) -> int:
    """Shared memory that a block of the kernel asks for."""
    rows = 2 * tile.rows * (tile.head_dim + tile.columns) * 2 + 2 * tile.rows * 4
    slots = 2 * config.stages * tile.columns * tile.head_dim * 2
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
    d_query: jax.Array | None = None,
    want_query: bool = True,
    depth_grads: tuple[jax.Array, jax.Array] | None = None,
    want_depth: bool = True,
    config: DepthConfig | None = None,
) -> tuple[jax.Array | None, tuple[jax.Array, jax.Array] | None]:
    """(dq, (dkd, dvd)) of the depth part.

    Args:
      query, d_out: [B, T, N, H], bfloat16 or float16.
      lse, delta: [B, T, N] float32: natural-log sum of the whole softmax (-inf: sees nothing), and
        rowsum(do · o) - dlse.
      depth_key, depth_value: [S, B, T, K, H].
      slots: [4] int32, two half-open ranges of visible slots; no other slot is touched.
      d_query: [B, T, N, H], added to dq; None: 0.
      want_query, want_depth: which of the results to compute; the other is None.
      depth_grads: running gradients [S, B, T, K, H], float32 or bfloat16, which are added to and
        returned; None: new ones in the keys' dtype, 0 for invisible slots.
    """
    group = query.shape[2] // depth_key.shape[3]
    config = config or DepthConfig()
    limit = max_group(query.shape[3])
    if want_depth and depth_grads is None:
        zeros = jnp.zeros(depth_key.shape, depth_key.dtype)
        depth_grads = (zeros, zeros)
    heads = common.split_heads(group, limit)
    parts = []
    for part in heads:  # a group larger than a tile's: each part adds into the same gradients
        take = functools.partial(common.take_heads, kv_heads=depth_key.shape[3], part=part)
        dq, depth_grads = _call(
            take(query), take(d_out), take(lse), take(delta), depth_key, depth_value, slots,
            None if d_query is None else take(d_query), depth_grads if want_depth else None,
            scale=scale, want_query=want_query, config=config,
        )  # fmt: skip
        parts.append(dq)
    dq = common.join_heads(parts, depth_key.shape[3]) if want_query else None
    return dq, depth_grads


def _call(
    query, d_out, lse, delta, depth_key, depth_value, slots, d_query, grads, *, scale, want_query,
    config,
):  # fmt: skip
    """One launch: at most `max_group` query heads a key/value head."""
    batch, length, num_heads, head_dim = query.shape
    num_slots, kv_heads = depth_key.shape[0], depth_key.shape[3]
    group = num_heads // kv_heads
    padded = common.next_power_of_two(group)
    tile = choose_tile(padded, head_dim, config)
    rows = [
        common.tile_rows(x, kv_heads, padded, tile.tokens, fill)
        for x, fill in ((lse * _LOG2_E, jnp.inf), (delta, 0.0))
    ]
    # e^(s - inf) = 0: a query that sees nothing, or is padding, weighs nothing.
    rows[0] = jnp.where(jnp.isneginf(rows[0]), jnp.inf, rows[0])
    pad = functools.partial(common.pad_heads, kv_heads=kv_heads, group=padded)
    flat = [x.reshape(num_slots, batch, length, kv_heads * head_dim) for x in
            (depth_key, depth_value)]  # fmt: skip
    operands = [slots, pad(query), pad(d_out), *rows, *flat]
    if d_query is not None:
        operands.append(pad(d_query))
    refs = []
    if grads is not None:
        refs = [jax.new_ref(g.reshape(flat[0].shape)) for g in grads]
    common.check_smem(
        smem_bytes(tile, config, grads[0].dtype if refs else query.dtype), "depth_backward"
    )
    out_type = []
    if want_query:
        out_type = [jax.ShapeDtypeStruct(operands[1].shape, query.dtype)]
    kernel = functools.partial(
        _kernel, tile=tile, config=config, scale=scale, has_d_query=d_query is not None,
        want_query=want_query, has_grads=bool(refs),
    )  # fmt: skip
    outputs = common.launch(
        kernel,
        name="moda_depth_backward",
        grid={"head": kv_heads, "tile": -(-length // tile.tokens), "row": batch},
        out_type=out_type,
        scratch=_scratch(tile, config, query.dtype, refs[0].dtype if refs else None),
    )(*operands, *refs)
    dq = common.unpad_heads(outputs[0], kv_heads, group) if want_query else None
    if not refs:
        return dq, None
    return dq, tuple(jax.freeze(ref).reshape(depth_key.shape) for ref in refs)


def _scratch(tile: Tile, config: DepthConfig, dtype: Any, grad_dtype: Any) -> dict[str, Any]:
    smem, barrier = common.smem, common.barrier
    copies = 2 * tile.slots
    scratch = {
        "q": smem((tile.rows, tile.head_dim), dtype),
        "do": smem((tile.rows, tile.head_dim), dtype),
        "p": smem((tile.rows, tile.columns), dtype),
        "ds": smem((tile.rows, tile.columns), dtype),
        "lse": smem((tile.rows,), jnp.float32),
        "delta": smem((tile.rows,), jnp.float32),
        "kd": smem((config.stages, tile.columns, tile.head_dim), dtype),
        "vd": smem((config.stages, tile.columns, tile.head_dim), dtype),
        "rows_loaded": barrier(2 * tile.group + 2, 1),
        "slots_loaded": barrier(copies, config.stages),
        "d_query_loaded": barrier(tile.group, 1),
    }
    if grad_dtype is not None:
        scratch["dkd"] = smem((tile.columns, tile.head_dim), grad_dtype)
        scratch["dvd"] = smem((tile.columns, tile.head_dim), grad_dtype)
    return scratch


def _kernel(
    slots_ref, q_ref, do_ref, lse_ref, delta_ref, kd_ref, vd_ref, *refs,
    tile: Tile, config: DepthConfig, scale: float, has_d_query: bool, want_query: bool,
    has_grads: bool, **scratch,
):  # fmt: skip
    """One warpgroup: a token tile of one row and key/value head. `refs`: see `_split_refs`."""
    plgpu = common.mosaic()
    d_query_ref, grad_refs, dq_ref = _split_refs(refs, has_d_query, has_grads, want_query)
    here = Place(lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("tile"), tile)
    blocks = Blocks.of(slots_ref, tile.slots)
    _load_rows(here, q_ref, do_ref, lse_ref, delta_ref, scratch)
    load = functools.partial(load_slots, here, blocks, kd_ref, vd_ref, scratch)
    clear_slots(scratch, tile, config)
    for stage in range(config.stages):
        common.when(stage < blocks.count, functools.partial(load, jnp.int32(stage), stage))
    plgpu.barrier_wait(scratch["rows_loaded"].at[0])
    weights = [_RowTile.of(scratch, r) for r in range(tile.rows // 64)]
    dq = [common.zeros((64, tile.head_dim)) for _ in weights] if want_query else []

    def body(block, dq):
        stage = lax.rem(block, jnp.int32(config.stages))
        plgpu.barrier_wait(scratch["slots_loaded"].at[stage])
        kd, vd = scratch["kd"].at[stage], scratch["vd"].at[stage]
        seen = blocks.mask(block, tile)
        for row in weights:
            row.weigh(scratch, kd, vd, seen, scale)
        plgpu.commit_smem()
        if want_query:
            dq = [
                common.multiply_add(total, scratch["ds"].at[row.rows], kd)
                for total, row in zip(dq, weights, strict=True)
            ]
        if has_grads:
            _store_slots(here, blocks, block, grad_refs, scratch)
        else:
            plgpu.commit_smem()  # everyone has read the stage before it is loaded again
        following = block + config.stages
        common.when(following < blocks.count, functools.partial(load, following, stage))
        return dq

    dq = lax.fori_loop(0, blocks.count, body, dq)
    if want_query:
        _store_query(here, dq, d_query_ref, dq_ref, scratch)
    plgpu.wait_smem_to_gmem(0)


def _split_refs(refs, has_d_query: bool, has_grads: bool, want_query: bool):
    """(d_query or None, (dkd, dvd) or (), dq or None)."""
    rest = list(refs)
    d_query_ref = rest.pop(0) if has_d_query else None
    grad_refs = (rest.pop(0), rest.pop(0)) if has_grads else ()
    return d_query_ref, grad_refs, rest.pop(0) if want_query else None


class _RowTile(NamedTuple):
    """64 rows (head, token) of the tile."""

    start: int
    lse: jax.Array
    delta: jax.Array

    @classmethod
    def of(cls, scratch, index: int) -> "_RowTile":
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


def _load_rows(here: Place, q_ref, do_ref, lse_ref, delta_ref, scratch) -> None:
    plgpu = common.mosaic()
    loaded, tile = scratch["rows_loaded"].at[0], here.tile
    for g in range(tile.group):
        rows = common.ds(g * tile.tokens, tile.tokens)
        plgpu.copy_gmem_to_smem(here.query(q_ref, g), scratch["q"].at[rows], loaded)
        plgpu.copy_gmem_to_smem(here.query(do_ref, g), scratch["do"].at[rows], loaded)
    rows = common.ds(here.index * tile.rows, tile.rows)
    for name, ref in (("lse", lse_ref), ("delta", delta_ref)):
        plgpu.copy_gmem_to_smem(ref.at[here.row, here.head, rows], scratch[name], loaded)


def _store_slots(here: Place, blocks: Blocks, block, grad_refs, scratch) -> None:
    """dvd = pᵀ do and dkd = dsᵀ q of a block, added to the gradients in memory."""
    plgpu = common.mosaic()
    tile = here.tile
    shape = (tile.columns, tile.head_dim)
    base, stop = blocks.first_slot(block)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last block's tile is out
    for name, weights, rows, ref in (
        ("dkd", "ds", "q", grad_refs[0]), ("dvd", "p", "do", grad_refs[1])
    ):  # fmt: skip
        product = common.multiply(scratch[weights].transpose((1, 0)), scratch[rows], shape)
        scratch[name][...] = product.astype(ref.dtype)
    plgpu.commit_smem()
    for i in range(tile.slots):
        columns = common.ds(i * tile.tokens, tile.tokens)

        def store(i=i, columns=columns):
            for name, ref in zip(("dkd", "dvd"), grad_refs, strict=True):
                common.add_to_gmem(scratch[name].at[columns], here.slot(ref, base + i))

        common.when(base + i < stop, store)
    plgpu.commit_smem_to_gmem_group()


def _store_query(here: Place, dq, d_query_ref, dq_ref, scratch) -> None:
    """dq plus the sequence part's, through the queries' place in shared memory."""
    plgpu = common.mosaic()
    tile, q = here.tile, scratch["q"]
    row_groups = [common.ds(g * tile.tokens, tile.tokens) for g in range(tile.group)]
    plgpu.commit_smem()
    if d_query_ref is not None:
        loaded = scratch["d_query_loaded"].at[0]
        for g, rows in enumerate(row_groups):
            plgpu.copy_gmem_to_smem(here.query(d_query_ref, g), q.at[rows], loaded)
        plgpu.barrier_wait(loaded)
    for r, part in enumerate(dq):
        rows = common.ds(64 * r, 64)
        if d_query_ref is not None:
            old = plgpu.load(q.at[rows], layout=plgpu.Layout.WGMMA, optimized=False)
            part = part + old.astype(jnp.float32)
        q[rows] = part.astype(q.dtype)
    plgpu.commit_smem()
    for g, rows in enumerate(row_groups):
        plgpu.copy_smem_to_gmem(q.at[rows], here.query(dq_ref, g))
