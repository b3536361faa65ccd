"""Warpgroups for the depth slots alone, one beside each compute warpgroup of the dq kernel.

While the tensor cores work on the keys of a tile, the depth warpgroup loads the tile's slots and
computes their part of dq: the slots' traffic hides under the sequence's products. Its own products
are transposed: rows are 8 slots of 8 tokens, columns the query heads of these tokens. One pair in 8
is of one token then. In a product of a tile's 64 rows with the slots of all its tokens it would be
one in 64 / heads.

A depth warpgroup starts its own loads: after each block it starts the copy of a later one. It hands
its part of dq to the compute warpgroup through shared memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.depth import tiles
from pallas_kernels.mosaic_gpu.depth.tiles import DepthPlace, load_slots, wait_slots
from pallas_kernels.mosaic_gpu.ring import RowRefs
from pallas_kernels.mosaic_gpu.row_tiles import RowPlan, RowTile, locate_rows, unit
from pallas_kernels.mosaic_gpu.wgmma import (
    LOG2E,
    TOKEN_ALIGNMENT,
    cdiv,
    end_reads,
    i32,
    iota,
    rem,
    spread,
    two_products,
)

_BLOCK = 8  # slots
_OCTET_BITS = TOKEN_ALIGNMENT.bit_length() - 1


class OverlappingSlotBlocks(tiles.SlotBlocks):
    """Blocks of 8 slots. A range's last one overlaps the one before: it, too, is one copy."""

    def bounds(self, block):
        """(first slot of a block, end of its range)."""
        start, stop = super().bounds(block)
        first = jnp.where(block < self.first_count, self.ranges[0], self.ranges[2])
        size = self.tile.slots
        return jnp.where(stop - first >= size, jnp.minimum(start, stop - size), start), stop

    def within(self, block, shape: tuple[int, int]):
        """Of pairs (slot, token), (head, token): those of this block's slots."""
        base, stop = self.bounds(block)
        start, _ = super().bounds(block)
        slot = iota(shape, 0) >> _OCTET_BITS
        return (slot >= start - base) & (slot < stop - base)

    def has_part(self):
        """Whether a range has slots, but fewer than a block."""
        start0, stop0, start1, stop1 = self.ranges
        counts = stop0 - start0, stop1 - start1
        first, second = ((count > 0) & (count < self.tile.slots) for count in counts)
        return first | second


def memory(plan: RowPlan) -> dict[str, Any]:
    """Shared memory and barriers, by the names of `RowRefs`."""
    config, tile = plan.config, _tile(plan)
    stages = config.warpgroups * config.slot_stages
    barriers = tiles.slot_barriers(tile, stages)
    slots = tile.buffer(plan.dtype, stages)
    weights = (config.warpgroups, _columns(plan), tile.columns)
    return {
        "slot_keys": slots,
        "slot_values": slots,
        "slot_weights": common.smem(weights, plan.dtype),
        "slots_loaded": barriers["slots_loaded"],
        "depth_full": common.barrier(plan.octets, config.warpgroups),
    } | ({"box_loaded": barriers["box_loaded"]} if tile.boxes else {})


def shared_memory(plan: RowPlan) -> int:
    """Bytes of `memory`, without barriers."""
    pairs = _tile(plan).columns
    ring = 2 * plan.config.slot_stages * pairs * plan.head_dim * 2
    return plan.config.warpgroups * (ring + _columns(plan) * pairs * 2)


def flat(plan: RowPlan, x: jax.Array) -> jax.Array:
    """Depth keys or values as the warpgroup reads them."""
    return tiles.flat_slots(x, _tile(plan))


def _columns(plan: RowPlan) -> int:
    return TOKEN_ALIGNMENT * plan.heads


def _tile(plan: RowPlan) -> tiles.SlotTile:
    boxes = not platforms.interpreted()  # the interpreter reads no reshaped buffer
    return tiles.SlotTile(1, TOKEN_ALIGNMENT, _BLOCK, plan.head_dim, boxes=boxes)


class SlotCursor(NamedTuple):
    """Which block of slots of which octet is the next to be loaded."""

    octet: jax.Array
    block: jax.Array

    def after(self, blocks: Any) -> "SlotCursor":
        block = self.block + 1
        done = block >= blocks
        return SlotCursor(jnp.where(done, self.octet + 1, self.octet), jnp.where(done, 0, block))


class SlotReader(NamedTuple):
    """A depth warpgroup's ring: for each octet of a tile's tokens, its blocks of slots."""

    plan: RowPlan
    refs: RowRefs
    warpgroup: jax.Array  # the compute warpgroup that has the tile
    blocks: OverlappingSlotBlocks
    memory: dict[str, Any]

    @classmethod
    def of(cls, plan: RowPlan, refs: RowRefs, warpgroup: jax.Array) -> "SlotReader":
        names = {"kd": "slot_keys", "vd": "slot_values"}
        names |= {name: name for name in ("slots_loaded", "box_loaded")}
        views = {name: getattr(refs, view) for name, view in names.items()}
        reader = cls(
            plan, refs, warpgroup, OverlappingSlotBlocks.of(refs.slots, _tile(plan)), views
        )
        common.when(reader.blocks.has_part(), reader._clear)
        return reader

    def _clear(self) -> None:
        stages = [self._stage(i32(i)) for i in range(self.plan.config.slot_stages)]
        tiles.clear_slots(self.memory, self.blocks.tile, stages)

    def start(self, tile: RowTile) -> SlotCursor:
        """The first loads; where to go on."""
        cursor = SlotCursor(i32(0), i32(0))
        for step in range(self.plan.config.slot_stages):
            cursor = self.load(tile, cursor, i32(step))
        return cursor

    def load(self, tile: RowTile, cursor: SlotCursor, step: jax.Array) -> SlotCursor:
        """Starts a block's copies into the stage of `step`, if there is one; where to go on."""

        def load():
            place = self._place(tile, cursor.octet)
            load_slots(
                place,
                self.blocks,
                self.refs.depth_key,
                self.refs.depth_value,
                self.memory,
                cursor.block,
                self._stage(step),
            )

        common.when((cursor.octet < self.plan.octets) & (self.blocks.count > 0), load)
        return cursor.after(self.blocks.count)

    def _stage(self, step: jax.Array) -> jax.Array:
        stages = self.plan.config.slot_stages
        return self.warpgroup * stages + rem(step, stages)

    def _place(self, tile: RowTile, octet: jax.Array) -> DepthPlace:
        plan = self.plan
        token, _ = unit(plan, tile, self.warpgroup)
        octets = cdiv(plan.q_len, TOKEN_ALIGNMENT)
        index = token // TOKEN_ALIGNMENT + octet
        return DepthPlace(tile.batch, tile.kv_head, index, octets, self.blocks.tile)

    def wait(self, block: jax.Array, step: jax.Array) -> tuple[Any, Any]:
        """A block's keys and values."""
        stage, tile = self._stage(step), self.blocks.tile
        wait_slots(self.blocks, self.memory, block, stage)
        return tuple(tile.matrix(self.memory[name].at[stage]) for name in ("kd", "vd"))

    def rows(self, octet: jax.Array) -> Any:
        """An octet's rows in the tile."""
        columns = _columns(self.plan)
        return common.ds(octet * columns, columns)

    def hand_over(self, octet: jax.Array, columns: jax.Array) -> None:
        """Writes an octet's part of dq, [H, (head, token)], for the compute warpgroup."""
        _store_transposed(self.refs.dq_smem.at[self.warpgroup, self.rows(octet)], columns)
        common.mosaic().barrier_arrive(self.refs.depth_full.at[self.warpgroup])


def _store_transposed(target: Any, x: jax.Array) -> None:
    """target [n, m] = x [m, n]."""
    plgpu = common.mosaic()
    if platforms.interpreted():
        target[...] = x.T
        return
    turned = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
    target.transpose((1, 0))[...] = turned


def depth_rows(refs: RowRefs, warpgroup: jax.Array) -> jax.Array:
    """What `SlotReader.hand_over` wrote for a warpgroup's tile: [64, H] float32."""
    plgpu = common.mosaic()
    plgpu.barrier_wait(refs.depth_full.at[warpgroup])
    rows = refs.dq_smem.at[warpgroup]
    return plgpu.load(rows, layout=plgpu.Layout.WGMMA, optimized=False)


def depth_dq(plan: RowPlan, refs: RowRefs, warpgroup: jax.Array) -> None:
    """The slots' part of dq / scale for a warpgroup's tile."""
    plgpu = common.mosaic()
    reader = SlotReader.of(plan, refs, warpgroup)
    count = reader.blocks.count
    tile = locate_rows(plan, lax.axis_index("block"))
    cursor = reader.start(tile)
    plgpu.barrier_wait(refs.q_full.at[0])
    shape = (reader.blocks.tile.columns, _columns(plan))
    weights_ref = refs.slot_weights.at[warpgroup]
    number = tile.place * plan.config.warpgroups + warpgroup

    def octet_step(octet, carry):
        rows = reader.rows(octet)
        lse, delta = (
            plgpu.load(
                x.at[tile.batch, tile.kv_head, number, rows],
                layout=plgpu.Layout.WGMMA.reduce(0),
                optimized=False,
            )
            for x in (refs.lse, refs.delta)
        )
        same_token = ((iota(shape, 0) ^ iota(shape, 1)) & (TOKEN_ALIGNMENT - 1)) == 0
        bias = jnp.where(same_token, -spread(lse, shape, 1), -jnp.inf)
        query, d_out = (x.at[warpgroup, rows] for x in (refs.q_smem, refs.do_smem))

        def block_step(block, carry):
            cursor, step, total = carry
            key, value = reader.wait(block, step)

            def weigh(scores):
                shown = jnp.where(reader.blocks.within(block, shape), bias, -jnp.inf)
                return jnp.exp2(scores * (plan.scale * LOG2E) + shown)

            first = key, query.transpose((1, 0))
            p, dp = two_products(first, (value, d_out.transpose((1, 0))), shape, weigh)
            ds = p * (dp - spread(delta, shape, 1))
            _store_transposed(weights_ref, ds.astype(plan.dtype))
            plgpu.commit_smem()
            total = common.multiply_add(total, key.transpose((1, 0)), weights_ref.transpose((1, 0)))
            end_reads()  # on the chip, the load waits until every warp of this warpgroup has read
            return reader.load(tile, cursor, step), step + 1, total

        cursor, step = carry
        zeros = common.zeros((plan.head_dim, _columns(plan)))
        cursor, step, total = lax.fori_loop(0, count, block_step, (cursor, step, zeros))
        reader.hand_over(octet, total)
        return cursor, step

    lax.fori_loop(0, plan.octets, octet_step, (cursor, i32(0)))
