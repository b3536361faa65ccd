"""A warpgroup of its own for the depth slots, beside those that read the keys of a sequence.

While tensor cores are busy with the keys of a tile, its slots arrive and are worked on: their
traffic hides under the sequence's products. Products are transposed: rows are 8 slots of 8 tokens,
columns the query heads of these tokens. So one pair in 8 is of one token, where a product of a
tile's 64 rows with the slots of all its tokens has one in 64 / heads.

Reading and computing are this warpgroup's own affair: it starts the copy of a later block when it
is through with one. What comes out goes through shared memory to the warpgroups that have the rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common, depth_tiles
from pallas_kernels.mosaic_gpu.depth_tiles import DepthConfig, Place, load_slots, wait_slots
from pallas_kernels.mosaic_gpu.forward_tiles import Plan, Tile, locate_rows, unit
from pallas_kernels.mosaic_gpu.ring import Refs
from pallas_kernels.mosaic_gpu.sequence_tiles import two_products
from pallas_kernels.mosaic_gpu.wgmma import (
    LOG2E,
    ROWS,
    TOKEN_ALIGNMENT,
    cdiv,
    divmod_i32,
    i32,
    iota,
    rem,
    spread,
)

_OCTET_BITS = TOKEN_ALIGNMENT.bit_length() - 1


class Blocks(depth_tiles.Blocks):
    """Blocks of 8 slots. A range's last one overlaps the one before: it, too, is one copy."""

    def bounds(self, block):
        """(first slot of a block, end of its range)."""
        start, stop = super().bounds(block)
        first = jnp.where(block < self.first_count, self.ranges[0], self.ranges[2])
        size = self.tile.slots
        return jnp.where(stop - first >= size, jnp.minimum(start, stop - size), start), stop

    def seen(self, block, shape: tuple[int, int]):
        """Of pairs (slot, token), (head, token): those of one token, and of this block's slots."""
        base, stop = self.bounds(block)
        start, _ = super().bounds(block)
        row, column = iota(shape, 0), iota(shape, 1)
        slot = row >> _OCTET_BITS
        same_token = ((row ^ column) & (TOKEN_ALIGNMENT - 1)) == 0
        return same_token & (slot >= start - base) & (slot < stop - base)

    def has_part(self):
        """Whether a range has slots, but fewer than a block."""
        start0, stop0, start1, stop1 = self.ranges
        counts = stop0 - start0, stop1 - start1
        first, second = ((count > 0) & (count < self.tile.slots) for count in counts)
        return first | second


def memory(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers, by the names of `Refs`."""
    config, tile = _config(plan), _tile(plan)
    barriers = depth_tiles.slot_barriers(tile, config)
    slots = tile.buffer(plan.dtype, config.stages)
    return {
        "slot_keys": slots,
        "slot_values": slots,
        "slot_weights": common.smem((_columns(plan), tile.columns), plan.dtype),
        "slots_loaded": barriers["slots_loaded"],
        "depth_full": common.barrier(plan.octets, plan.config.warpgroups),
    } | ({"box_loaded": barriers["box_loaded"]} if tile.boxes else {})


def shared_memory(plan: Plan) -> int:
    """Bytes of `memory`, without barriers."""
    pairs = _tile(plan).columns
    ring = 2 * plan.config.slot_stages * pairs * plan.head_dim * 2
    return ring + _columns(plan) * pairs * 2


def flat(plan: Plan, x: jax.Array) -> jax.Array:
    """Depth keys or values as the warpgroup reads them."""
    return depth_tiles.flat_slots(x, _tile(plan))


def _columns(plan: Plan) -> int:
    return TOKEN_ALIGNMENT * plan.heads


def _tile(plan: Plan) -> depth_tiles.Tile:
    boxes = not platforms.interpreted()  # which does not read through a reshaped buffer
    return depth_tiles.Tile(
        1, TOKEN_ALIGNMENT, plan.config.slot_block, plan.head_dim, boxes=boxes
    )


def _config(plan: Plan) -> DepthConfig:
    return DepthConfig(stages=plan.config.slot_stages)


class Reader(NamedTuple):
    """The ring of slots: a tile's warpgroups, their octets of tokens, the blocks of slots."""

    plan: Plan
    refs: Refs
    blocks: Blocks
    memory: dict[str, Any]

    @classmethod
    def of(cls, plan: Plan, refs: Refs) -> "Reader":
        names = {"kd": "slot_keys", "vd": "slot_values"}
        names |= {name: name for name in ("slots_loaded", "box_loaded")}
        views = {name: getattr(refs, view) for name, view in names.items()}
        blocks = Blocks.of(refs.slots, _tile(plan))
        reader = cls(plan, refs, blocks, views)
        clear = functools.partial(depth_tiles.clear_slots, views, blocks.tile, _config(plan))
        common.when(blocks.has_part(), clear)
        return reader

    @property
    def parts(self) -> int:
        """Octets of all warpgroups' tiles."""
        return self.plan.config.warpgroups * self.plan.octets

    def start(self, tiles: Any, steps: jax.Array) -> None:
        """The first loads. tiles: number of a tile -> where it lies; steps: of all tiles."""
        for stage in range(self.plan.config.slot_stages):
            common.when(stage < steps, functools.partial(self.load, tiles, i32(stage)))

    def load(self, tiles: Any, step: jax.Array) -> None:
        part, block = lax.div(step, self.blocks.count), lax.rem(step, self.blocks.count)
        number, part = divmod_i32(part, self.parts)
        place = self._place(tiles(number), part)
        stage = rem(step, self.plan.config.slot_stages)
        load_slots(
            place, self.blocks, self.refs.depth_key, self.refs.depth_value, self.memory, block,
            stage,
        )  # fmt: skip

    def _place(self, tile: Tile, part: jax.Array) -> Place:
        plan = self.plan
        warpgroup, octet = divmod_i32(part, plan.octets)
        token, _ = unit(plan, tile, warpgroup)
        octets = cdiv(plan.q_len, TOKEN_ALIGNMENT)
        index = token // TOKEN_ALIGNMENT + octet
        return Place(tile.batch, tile.kv_head, index, octets, self.blocks.tile)

    def wait(self, block: jax.Array, step: jax.Array) -> tuple[Any, Any]:
        """A block's keys and values."""
        stage = rem(step, self.plan.config.slot_stages)
        wait_slots(self.blocks, self.memory, block, stage)
        tile = self.blocks.tile
        return tuple(tile.matrix(self.memory[name].at[stage]) for name in ("kd", "vd"))

    def octet_rows(self, part: jax.Array) -> tuple[jax.Array, Any]:
        """The warpgroup of an octet, and its rows in that one's tile."""
        warpgroup, octet = divmod_i32(part, self.plan.octets)
        columns = _columns(self.plan)
        return warpgroup, common.ds(octet * columns, columns)

    def hand_over(self, part: jax.Array, columns: jax.Array) -> None:
        """Puts [H, (head, token)] of an octet to where its rows' warpgroup finds them."""
        warpgroup, rows = self.octet_rows(part)
        _store_transposed(self.refs.dq_smem.at[warpgroup, rows], columns)
        common.mosaic().barrier_arrive(self.refs.depth_full.at[warpgroup])


def _store_transposed(target: Any, x: jax.Array) -> None:
    """target [n, m] = x [m, n]."""
    plgpu = common.mosaic()
    if platforms.interpreted():
        target[...] = x.T
        return
    turned = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
    target.transpose((1, 0))[...] = turned


def depth_rows(refs: Refs, warpgroup: jax.Array) -> jax.Array:
    """What `Reader.hand_over` put there, of a warpgroup's tile: [64, H] float32."""
    plgpu = common.mosaic()
    plgpu.barrier_wait(refs.depth_full.at[warpgroup])
    rows = refs.dq_smem.at[warpgroup]
    return plgpu.load(rows, layout=plgpu.Layout.WGMMA, optimized=False)


def depth_dq(plan: Plan, refs: Refs) -> None:
    """The slots' part of dq / scale for a thread block's tile."""
    plgpu = common.mosaic()
    reader = Reader.of(plan, refs)
    count = reader.blocks.count
    steps = count * reader.parts

    tile = locate_rows(plan, lax.axis_index("block"))

    def tiles(_number):
        return tile

    reader.start(tiles, steps)
    plgpu.barrier_wait(refs.q_full.at[0])
    shape = (reader.blocks.tile.columns, _columns(plan))
    weights_ref = refs.slot_weights

    def octet(part, _):
        warpgroup, octet_rows = reader.octet_rows(part)
        number = tile.place * plan.config.warpgroups + warpgroup
        lse, delta = (
            plgpu.load(
                x.at[tile.batch, tile.kv_head, number, octet_rows],
                layout=plgpu.Layout.WGMMA.reduce(0), optimized=False,
            )
            for x in (refs.lse, refs.delta)
        )  # fmt: skip
        query, d_out = (x.at[warpgroup, octet_rows] for x in (refs.q_smem, refs.do_smem))

        def block_step(block, total):
            step = part * count + block
            key, value = reader.wait(block, step)
            seen = reader.blocks.seen(block, shape)

            def weigh(scores):
                scores = jnp.where(seen, scores * (plan.scale * LOG2E), -jnp.inf)
                return jnp.exp2(scores - spread(lse, shape, 1))

            first = key, query.transpose((1, 0))
            p, dp = two_products(first, (value, d_out.transpose((1, 0))), shape, weigh)
            ds = p * (dp - spread(delta, shape, 1))
            _store_transposed(weights_ref, ds.astype(plan.dtype))
            plgpu.commit_smem()
            total = common.multiply_add(total, key.transpose((1, 0)), weights_ref.transpose((1, 0)))
            plgpu.commit_smem()  # everyone has read the stage before it is loaded again
            following = step + plan.config.slot_stages
            common.when(following < steps, functools.partial(reader.load, tiles, following))
            return total

        total = lax.fori_loop(0, count, block_step, common.zeros((plan.head_dim, _columns(plan))))
        reader.hand_over(part, total)

    lax.fori_loop(0, reader.parts, octet, None)
