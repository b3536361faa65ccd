"""Attention to the depth slots alone.

The layout is that of `depth.backward`: a tile of tokens with all query heads of one key/value head
walks over the visible slots. A second launch over other slots starts from the first one's (o, lse),
which is exact: o is the sum of e^(z - lse) v, so maximum lse, denominator 1 and total o are a state
of an online softmax.
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
    wait_slots,
)

_LOG2_E = math.log2(math.e)


def smem_bytes(tile: SlotTile, config: DepthConfig) -> int:
    """Shared memory that a block of the kernel asks for."""
    rows = tile.rows * (2 * tile.head_dim + tile.columns) * 2 + 2 * tile.rows * 4
    return rows + 2 * config.stages * tile.columns * tile.head_dim * 2


def depth_forward(
    query: jax.Array,
    depth_key: jax.Array,
    depth_value: jax.Array,
    slots: jax.Array,
    *,
    scale: float,
    is_prefix: bool = False,
    valid: jax.Array | None = None,
    config: DepthConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(o [B, T, N, H], lse [B, T, N] float32) over the depth slots.

    Args:
      query: [B, T, N, H], bfloat16 or float16.
      depth_key, depth_value: [S, B, T, K, H].
      slots: [4] int32, two half-open ranges of visible slots; no other slot is touched.
      is_prefix: the first range starts at slot 0 and the second is empty, always.
      valid: [B, T] bool: queries that may see slots; None: all.
    """
    kv_heads = depth_key.shape[3]
    batch, length, num_heads, _ = query.shape
    lse = jnp.full((batch, length, num_heads), -jnp.inf, jnp.float32)
    if valid is not None:
        lse = jnp.where(valid[:, :, None], lse, jnp.inf)  # +inf marks a query that sees no slot
    config = config or DepthConfig()
    parts: dict[tuple[int, int], tuple[jax.Array, ...]] = {}
    whole = (0, num_heads // kv_heads)
    for launch in plan_launches(whole[1], query.shape, slots, is_prefix, config):
        take = functools.partial(common.take_heads, kv_heads=kv_heads, part=launch.heads)
        before = [None, take(lse)]
        if whole in parts:  # continue the first launch over other slots
            before = [take(x) for x in parts[whole]]
            if valid is not None:
                before[1] = jnp.where(valid[:, :, None], before[1], jnp.inf)
        call = take(query), depth_key, depth_value, *before
        parts[launch.heads] = _call(launch, *call, scale=scale, config=config)
    if len(parts) > 1:
        parts.pop(whole, None)
    outs, lses = zip(*parts.values(), strict=True)
    return common.join_heads(list(outs), kv_heads), common.join_heads(list(lses), kv_heads)


def _call(launch: DepthLaunch, query, depth_key, depth_value, out, lse, *, scale, config):
    """One launch."""
    batch, length, num_heads, head_dim = query.shape
    kv_heads = depth_key.shape[3]
    group = num_heads // kv_heads
    tile = launch.tile
    common.check_smem(smem_bytes(tile, config), "depth_forward")

    def pad(x: jax.Array) -> jax.Array:
        x = common.pad_heads(x, kv_heads=kv_heads, group=tile.group)
        return common.pad_tokens(x, 1, tile.tokens)

    rows = common.tile_rows(
        lse * _LOG2_E, kv_heads, tile.group, tile.tokens, jnp.inf, tokens_first=tile.tokens_first
    )
    operands = [
        jnp.asarray(launch.slots),
        pad(query),
        rows,
        *(flat_slots(x, tile) for x in (depth_key, depth_value)),
    ]
    if out is not None:
        operands.append(pad(out))
    smem, barrier = common.smem, common.barrier
    new_out, new_rows = common.launch(
        functools.partial(_kernel, tile=tile, config=config, scale=scale, has_out=out is not None),
        name="moda_depth_forward",
        grid={"head": kv_heads, "tile": -(-length // tile.tokens), "row": batch},
        out_type=[
            jax.ShapeDtypeStruct(operands[1].shape, query.dtype),
            jax.ShapeDtypeStruct(rows.shape, jnp.float32),
        ],
        scratch={
            "q": smem((tile.rows, head_dim), query.dtype),
            "o": smem((tile.rows, head_dim), query.dtype),
            "p": smem((tile.rows, tile.columns), query.dtype),
            "lse": smem((tile.rows,), jnp.float32),
            "kd": tile.buffer(query.dtype, config.stages),
            "vd": tile.buffer(query.dtype, config.stages),
            "rows_loaded": barrier(tile.copies[0] * (1 if out is None else 2) + 1, 1),
            **slot_barriers(tile, config.stages),
        },
    )(*operands)
    new_lse = common.untile_rows(
        new_rows, length, tile.group, tile.tokens, tokens_first=tile.tokens_first
    )
    new_lse = new_lse / _LOG2_E
    new_out, new_lse = new_out[:, :length], new_lse
    return tuple(common.unpad_heads(x, kv_heads, group) for x in (new_out, new_lse))


class _DepthSoftmax(NamedTuple):
    """State of 64 rows; scores are in units of log 2."""

    total: Any  # [64, H]
    maximum: Any  # [64]
    denominator: Any  # [64]

    @classmethod
    def start(cls, scratch, rows, has_out: bool) -> tuple["_DepthSoftmax", Any]:
        """The state before these slots, and which rows may see them."""
        plgpu = common.mosaic()
        lse = plgpu.load(scratch["lse"].at[rows], layout=plgpu.Layout.WGMMA.reduce(1))
        total = common.zeros((64, scratch["q"].shape[1]))
        if has_out:
            old = plgpu.load(scratch["o"].at[rows], layout=plgpu.Layout.WGMMA, optimized=False)
            total = old.astype(jnp.float32)
        valid = lse < jnp.inf
        seen = valid & (lse > -jnp.inf)
        return cls(total, jnp.where(valid, lse, -jnp.inf), jnp.where(seen, 1.0, 0.0)), valid

    def update(self, scores) -> tuple["_DepthSoftmax", Any]:
        """(the state, still without the values; weights of the new keys)."""
        maximum = jnp.maximum(self.maximum, scores.max(axis=1))
        # A row that has seen nothing has maximum -inf: subtract 0, not -inf, to get 0, not NaN.
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(shift, scores.shape, (0,)))
        decay = jnp.exp2(self.maximum - shift)
        total = self.total * lax.broadcast_in_dim(decay, self.total.shape, (0,))
        denominator = self.denominator * decay + weights.sum(axis=1)
        return _DepthSoftmax(total, maximum, denominator), weights

    def finish(self):
        """(o, lse in units of log 2)."""
        seen = self.denominator > 0.0
        inverse = jnp.where(seen, 1.0 / self.denominator, 0.0)
        out = self.total * lax.broadcast_in_dim(inverse, self.total.shape, (0,))
        return out, jnp.where(seen, self.maximum + jnp.log2(self.denominator), -jnp.inf)


def _kernel(
    slots_ref,
    q_ref,
    lse_ref,
    kd_ref,
    vd_ref,
    *refs,
    tile: SlotTile,
    config: DepthConfig,
    scale: float,
    has_out: bool,
    **scratch,
):
    """One warpgroup: a token tile of one row and key/value head. refs: ([o before], o, lse)."""
    plgpu = common.mosaic()
    here = DepthPlace.here(lse_ref.shape[2] // tile.rows, tile)
    blocks = SlotBlocks.of(slots_ref, tile)
    _load_rows(here, q_ref, lse_ref, refs[0] if has_out else None, scratch)
    clear_slots(scratch, tile, range(config.stages))
    load = functools.partial(load_slots, here, blocks, kd_ref, vd_ref, scratch)
    for stage in range(config.stages):
        common.when(stage < blocks.count, functools.partial(load, jnp.int32(stage), stage))
    plgpu.barrier_wait(scratch["rows_loaded"].at[0])
    rows = [common.ds(64 * r, 64) for r in range(tile.rows // 64)]
    states, valid = zip(*(_DepthSoftmax.start(scratch, r, has_out) for r in rows), strict=True)

    def body(block, states):
        stage = lax.rem(block, jnp.int32(config.stages))
        wait_slots(blocks, scratch, block, stage)
        kd, vd = (tile.matrix(scratch[name].at[stage]) for name in ("kd", "vd"))
        same = blocks.mask(block)
        new = []
        for r, state, ok in zip(rows, states, valid, strict=True):
            seen = same & lax.broadcast_in_dim(ok, same.shape, (0,))
            s = common.multiply(scratch["q"].at[r], kd.transpose((1, 0)), same.shape)
            state, p = state.update(jnp.where(seen, s * (scale * _LOG2_E), -jnp.inf))
            scratch["p"][r] = p.astype(scratch["p"].dtype)
            new.append(state)
        plgpu.commit_smem()
        new = [
            state._replace(total=common.multiply_add(state.total, scratch["p"].at[r], vd))
            for r, state in zip(rows, new, strict=True)
        ]
        plgpu.commit_smem()  # everyone has read the stage before it is loaded again
        following = block + config.stages
        common.when(following < blocks.count, functools.partial(load, following, stage))
        return tuple(new)

    states = lax.fori_loop(0, blocks.count, body, states)
    _store_rows(here, states, refs[-2], refs[-1], scratch)


def _load_rows(here: DepthPlace, q_ref, lse_ref, out_ref, scratch) -> None:
    plgpu = common.mosaic()
    loaded, tile = scratch["rows_loaded"].at[0], here.tile
    for rows, q in here.queries(q_ref):
        plgpu.copy_gmem_to_smem(q, scratch["q"].at[rows], loaded)
    if out_ref is not None:
        for rows, out in here.queries(out_ref):
            plgpu.copy_gmem_to_smem(out, scratch["o"].at[rows], loaded)
    rows = common.ds(here.tile_index * tile.rows, tile.rows)
    plgpu.copy_gmem_to_smem(lse_ref.at[here.row, here.head, rows], scratch["lse"], loaded)


def _store_rows(here: DepthPlace, states, out_ref, lse_ref, scratch) -> None:
    plgpu = common.mosaic()
    tile = here.tile
    for r, state in enumerate(states):
        rows = common.ds(64 * r, 64)
        out, lse = state.finish()
        scratch["o"][rows] = out.astype(scratch["o"].dtype)
        scratch["lse"][rows] = lse
    plgpu.commit_smem()
    for rows, out in here.queries(out_ref):
        plgpu.copy_smem_to_gmem(scratch["o"].at[rows], out)
    rows = common.ds(here.tile_index * tile.rows, tile.rows)
    plgpu.copy_smem_to_gmem(scratch["lse"], lse_ref.at[here.row, here.head, rows])
    plgpu.wait_smem_to_gmem(0)
