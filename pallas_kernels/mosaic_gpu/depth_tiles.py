"""Tiles of the depth kernels, and how a block of slots comes to shared memory.

A block of the grid takes a tile of tokens of one row and one key/value head, with all query heads
of that head. Rows are (query head, token), columns (slot, token).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import common


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """Tile sizes of the depth backward."""

    slots: int = 0
    """Slots of a block; 0: as many as make 64 columns with the tile's tokens."""
    stages: int = 2
    """Blocks in flight."""


class Tile(NamedTuple):
    """Sizes that follow from a call's shape."""

    group: int  # query heads of a key/value head, a power of two
    tokens: int
    slots: int
    head_dim: int

    @property
    def rows(self) -> int:
        return self.tokens * self.group

    @property
    def columns(self) -> int:
        return self.tokens * self.slots


def choose_tile(group: int, head_dim: int, config: DepthConfig) -> Tile:
    """64 rows, and never less than 8 tokens: the swizzled layout's unit."""
    tokens = max(8, 64 // group)
    return Tile(group, tokens, config.slots or max(1, 64 // tokens), head_dim)


class Place(NamedTuple):
    """Where a block of the grid stands."""

    row: jax.Array
    head: jax.Array
    index: jax.Array
    tile: Tile

    @property
    def tokens(self):
        return common.ds(self.index * self.tile.tokens, self.tile.tokens)

    def query(self, ref, g: int):
        """The tile's tokens of the g-th query head in [B, T, K·G, H]."""
        return ref.at[self.row, self.tokens, self.head * self.tile.group + g]

    def slot(self, ref, slot):
        """The tile's tokens of one slot in [S, B, T, K·H]."""
        head = common.ds(self.head * self.tile.head_dim, self.tile.head_dim)
        return ref.at[slot, self.row, self.tokens, head]


class Blocks(NamedTuple):
    """Blocks of `size` slots, over the first range and then over the second."""

    ranges: tuple[Any, ...]
    first_count: Any
    count: Any
    size: int

    @classmethod
    def of(cls, slots_ref, size: int) -> "Blocks":
        start0, stop0, start1, stop1 = (slots_ref[i] for i in range(4))
        first = lax.div(stop0 - start0 + (size - 1), jnp.int32(size))
        second = lax.div(stop1 - start1 + (size - 1), jnp.int32(size))
        return cls((start0, stop0, start1, stop1), first, first + second, size)

    def first_slot(self, block):
        """(first slot of a block, end of its range)."""
        start0, stop0, start1, stop1 = self.ranges
        is_first = block < self.first_count
        base = jnp.where(
            is_first, start0 + block * self.size, start1 + (block - self.first_count) * self.size
        )
        return base, jnp.where(is_first, stop0, stop1)

    def mask(self, block, tile: Tile):
        """[64, columns]: a column's slot is visible and its token is the row's."""
        plgpu = common.mosaic()
        base, stop = self.first_slot(block)
        shape = (64, tile.columns)
        row, column = (
            plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
            for axis in (0, 1)
        )
        same_token = ((row ^ column) & (tile.tokens - 1)) == 0
        return same_token & (column < (stop - base) * tile.tokens)


def clear_slots(scratch, tile: Tile, config: DepthConfig) -> None:
    """Zeros in every stage: columns of slots that are not loaded keep what was there, and
    0 · NaN must not come from it.
    """
    zeros = jnp.zeros((tile.columns, tile.head_dim), scratch["kd"].dtype)
    for stage in range(config.stages):
        scratch["kd"][stage] = zeros
        scratch["vd"][stage] = zeros
    common.mosaic().commit_smem()


def load_slots(here: Place, blocks: Blocks, kd_ref, vd_ref, scratch, block, stage) -> None:
    """Starts the copies of a block's visible slots; for the others the barrier just counts."""
    plgpu = common.mosaic()
    tile, loaded = here.tile, scratch["slots_loaded"].at[stage]
    base, stop = blocks.first_slot(block)
    for i in range(tile.slots):
        columns = common.ds(i * tile.tokens, tile.tokens)

        def load(i=i, columns=columns):
            for name, ref in (("kd", kd_ref), ("vd", vd_ref)):
                target = scratch[name].at[stage, columns]
                plgpu.copy_gmem_to_smem(here.slot(ref, base + i), target, loaded)

        def skip():
            plgpu.barrier_arrive(loaded)
            plgpu.barrier_arrive(loaded)

        lax.cond(base + i < stop, load, skip)
