"""Tiles of the depth kernels: which rows and columns they have, and how slots come to memory.

A block of the grid takes a tile of tokens of one row and one key/value head, with all query heads
of that head. Rows are (token, query head) pairs, columns (token, slot) pairs, in one of two orders:

- slots first: rows (head, token), columns (slot, token). Copies are [tokens, H] of one slot, at
  least 8 tokens, so any set of slots can be visible. 64 rows hold 8 heads at most.
- tokens first: rows (token, head), columns (token, slot). Copies are 8 slots of one token, so a
  tile of few tokens has many heads: less of the dense product is masked away. The visible slots
  are a prefix; what does not fill a copy lies before slot 0, where TMA reads zeros and writes
  nothing.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """Tile sizes of a depth kernel."""

    columns: int = 64
    """Slots times tokens of a block."""
    stages: int = 2
    """Blocks in flight."""
    tokens_first: bool | None = None
    """Order of rows and columns; None: tokens first from 16 query heads on, where it can be."""


class Tile(NamedTuple):
    """Sizes that follow from a call's shape."""

    group: int  # query heads of a key/value head, a power of two
    tokens: int
    slots: int
    head_dim: int
    tokens_first: bool

    @property
    def rows(self) -> int:
        return self.tokens * self.group

    @property
    def columns(self) -> int:
        return self.tokens * self.slots

    @property
    def slot_shift(self) -> int:
        """Slots to pad in front for the interpreter, which cannot read before slot 0."""
        return self.slots if self.tokens_first and platforms.interpreted() else 0


def choose_tile(
    group: int, head_dim: int, length: int, is_prefix: bool, config: DepthConfig
) -> Tile:
    """The tile for a padded group; `is_prefix`: visible slots are the first so many."""
    wanted = group >= 16 if config.tokens_first is None else config.tokens_first
    if wanted and is_prefix and 8 <= group <= 64 and length % (64 // group) == 0:
        tokens = 64 // group
        return Tile(group, tokens, max(8, config.columns // tokens), head_dim, True)
    tokens = max(8, 64 // group)
    return Tile(group, tokens, max(1, config.columns // tokens), head_dim, False)


def max_group(head_dim: int, length: int, is_prefix: bool) -> int:
    """Largest G of one call: a tile's results are kept in registers, 64 rows or a few times 64."""
    if is_prefix and length % 4 == 0:
        return 64
    return 32 if head_dim <= 64 else 16


class Place(NamedTuple):
    """Where a block of the grid stands."""

    row: jax.Array
    head: jax.Array
    tile_index: jax.Array
    tile: Tile

    @property
    def tokens(self):
        return common.ds(self.tile_index * self.tile.tokens, self.tile.tokens)

    def queries(self, *refs) -> Iterator[tuple[Any, ...]]:
        """(rows of the tile, their piece of every [B, T, K·G, H] array)."""
        tile = self.tile
        if tile.tokens_first:
            heads = common.ds(self.head * tile.group, tile.group)
            for t in range(tile.tokens):
                token = self.tile_index * tile.tokens + t
                rows = common.ds(t * tile.group, tile.group)
                yield rows, *(ref.at[self.row, token, heads] for ref in refs)
        else:
            for g in range(tile.group):
                rows = common.ds(g * tile.tokens, tile.tokens)
                head = self.head * tile.group + g
                yield rows, *(ref.at[self.row, self.tokens, head] for ref in refs)

    def slots(self, base, *refs) -> Iterator[tuple[Any, ...]]:
        """(first slot, columns, their piece of every [S, B, T, K·H] array) of a block."""
        tile = self.tile
        heads = common.ds(self.head * tile.head_dim, tile.head_dim)
        if tile.tokens_first:
            for start in range(0, tile.slots, 8):
                slots = common.ds(base + (start + tile.slot_shift), 8)
                for t in range(tile.tokens):
                    token = self.tile_index * tile.tokens + t
                    columns = common.ds(t * tile.slots + start, 8)
                    pieces = (ref.at[slots, self.row, token, heads] for ref in refs)
                    yield base + start, columns, *pieces
        else:
            for i in range(tile.slots):
                columns = common.ds(i * tile.tokens, tile.tokens)
                yield (
                    base + i,
                    columns,
                    *(ref.at[base + i, self.row, self.tokens, heads] for ref in refs),
                )

    @staticmethod
    def pieces(tile: Tile) -> tuple[int, int]:
        """How many pieces `queries` and `slots` yield."""
        if tile.tokens_first:
            return tile.tokens, tile.tokens * tile.slots // 8
        return tile.group, tile.slots


class Blocks(NamedTuple):
    """The visible slots in blocks of `tile.slots`: over the first range, then over the second."""

    ranges: tuple[Any, ...]
    first_count: Any
    count: Any
    tile: Tile

    @classmethod
    def of(cls, slots_ref, tile: Tile) -> "Blocks":
        start0, stop0, start1, stop1 = (slots_ref[i] for i in range(4))
        size = jnp.int32(tile.slots)
        first = lax.div(stop0 - start0 + (size - 1), size)
        if tile.tokens_first:  # a prefix: the second range is empty
            return cls((start0, stop0, start1, stop1), first, first, tile)
        second = lax.div(stop1 - start1 + (size - 1), size)
        return cls((start0, stop0, start1, stop1), first, first + second, tile)

    def bounds(self, block):
        """(first slot of a block, end of its range); tokens first: a slot below 0 is none."""
        start0, stop0, start1, stop1 = self.ranges
        size = self.tile.slots
        if self.tile.tokens_first:
            return stop0 - (self.count - block) * size, stop0
        is_first = block < self.first_count
        base = jnp.where(
            is_first, start0 + block * size, start1 + (block - self.first_count) * size
        )
        return base, jnp.where(is_first, stop0, stop1)

    def mask(self, block):
        """[64, columns]: a column's slot is visible and its token is the row's."""
        plgpu, tile = common.mosaic(), self.tile
        base, stop = self.bounds(block)
        row, column = (
            plgpu.broadcasted_iota(
                jnp.int32, (64, tile.columns), axis, layout=plgpu.Layout.WGMMA
            )
            for axis in (0, 1)
        )  # fmt: skip
        if tile.tokens_first:  # the sizes are powers of two
            same_token = (row >> _log2(tile.group)) == (column >> _log2(tile.slots))
            return same_token & ((column & (tile.slots - 1)) >= -base)
        same_token = ((row ^ column) & (tile.tokens - 1)) == 0
        return same_token & (column < (stop - base) * tile.tokens)

    def is_visible(self, slot):
        start0, stop0, start1, stop1 = self.ranges
        return ((slot >= start0) & (slot < stop0)) | ((slot >= start1) & (slot < stop1))


def _log2(n: int) -> int:
    return n.bit_length() - 1


def clear_slots(scratch, tile: Tile, config: DepthConfig) -> None:
    """Zeros in every stage: columns of slots that are not loaded keep what was there, and
    0 · NaN must not come from it.
    """
    if tile.tokens_first:
        return  # every column is loaded
    zeros = jnp.zeros((tile.columns, tile.head_dim), scratch["kd"].dtype)
    for stage in range(config.stages):
        scratch["kd"][stage] = zeros
        scratch["vd"][stage] = zeros
    common.mosaic().commit_smem()


def load_slots(here: Place, blocks: Blocks, kd_ref, vd_ref, scratch, block, stage) -> None:
    """Starts the copies of a block's visible slots; for the others the barrier just counts."""
    plgpu = common.mosaic()
    loaded = scratch["slots_loaded"].at[stage]
    base, stop = blocks.bounds(block)
    for slot, columns, kd, vd in here.slots(base, kd_ref, vd_ref):

        def load(columns=columns, kd=kd, vd=vd):
            plgpu.copy_gmem_to_smem(kd, scratch["kd"].at[stage, columns], loaded)
            plgpu.copy_gmem_to_smem(vd, scratch["vd"].at[stage, columns], loaded)

        def skip():
            plgpu.barrier_arrive(loaded)
            plgpu.barrier_arrive(loaded)

        if here.tile.tokens_first:
            load()
        else:
            lax.cond(slot < stop, load, skip)


def store_slots(here: Place, blocks: Blocks, block, refs, scratch, names, *, add: bool) -> None:
    """Starts writing a block's columns of `scratch[names]` to the visible slots of `refs`."""
    base, stop = blocks.bounds(block)
    for slot, columns, *targets in here.slots(base, *refs):

        def store(columns=columns, targets=targets):
            for name, target in zip(names, targets, strict=True):
                common.store(scratch[name].at[columns], target, add=add)

        if here.tile.tokens_first:
            store()
        else:
            common.when(slot < stop, store)
    common.mosaic().commit_smem_to_gmem_group()


def store_zeros(here: Place, blocks: Blocks, num_slots: int, refs, zeros) -> None:
    """Writes `zeros`, some columns in shared memory, to the slots that are not visible."""
    tile = here.tile
    heads = common.ds(here.head * tile.head_dim, tile.head_dim)
    if tile.tokens_first:
        stop = blocks.ranges[1]

        def store_eight(i, _):
            slots = common.ds(stop + i * 8 + tile.slot_shift, 8)
            for t in range(tile.tokens):
                for ref in refs:
                    target = ref.at[slots, here.row, here.tile_index * tile.tokens + t, heads]
                    common.store(zeros.at[common.ds(0, 8)], target, add=False)

        lax.fori_loop(0, lax.div(num_slots - stop + 7, jnp.int32(8)), store_eight, None)
    else:

        def store_one(slot, _):
            def store():
                for ref in refs:
                    target = ref.at[slot, here.row, here.tokens, heads]
                    common.store(zeros.at[common.ds(0, tile.tokens)], target, add=False)

            common.when(jnp.logical_not(blocks.is_visible(slot)), store)

        lax.fori_loop(0, num_slots, store_one, None)
    common.mosaic().commit_smem_to_gmem_group()


def flat_slots(x: jax.Array, tile: Tile) -> jax.Array:
    """[S, B, T, K, H] -> [S, B, T, K·H], which TMA's five dimensions can tile."""
    flat = x.reshape(*x.shape[:3], -1)
    return jnp.pad(flat, ((tile.slot_shift, 0), (0, 0), (0, 0), (0, 0)))


def unflat_slots(x: jax.Array, tile: Tile) -> jax.Array:
    """The inverse of `flat_slots`."""
    x = x[tile.slot_shift :]
    return x.reshape(*x.shape[:3], -1, tile.head_dim)
