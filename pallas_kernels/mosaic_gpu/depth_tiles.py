"""Tiles of the depth kernels: which rows and columns they have, and how slots come to memory.

A block of the grid takes a tile of tokens of one row and one key/value head, with all query heads
of that head. Rows are (token, query head) pairs, columns (token, slot) pairs, in one of two orders:

- slots first: rows (head, token), columns (slot, token), at least 8 tokens, 64 rows for up to 8
  heads. If the visible slots are a prefix, a block is one copy [slots, tokens, H], and what does
  not fill the first block lies before slot 0, where TMA reads zeros and writes nothing. Otherwise
  it is a copy a slot.
- tokens first: rows (token, head), columns (token, slot), copied as 8 slots of a token: a tile of
  few tokens has 64 rows for many heads, and less of the dense product is masked away. Needs a range
  of slots whose ends are multiples of 8.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    tokens_first: bool = False
    boxes: bool = False  # slots first, a block is one copy

    @property
    def rows(self) -> int:
        return self.tokens * self.group

    @property
    def columns(self) -> int:
        return self.tokens * self.slots

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of a block's keys in shared memory."""
        if self.boxes:
            return self.slots, self.tokens, self.head_dim
        return self.columns, self.head_dim

    @property
    def copies(self) -> tuple[int, int]:
        """How many pieces `Place.queries` and `Place.slots` yield."""
        if self.tokens_first:
            return self.tokens, self.tokens * self.slots // 8
        return self.group, 1 if self.boxes else self.slots

    def buffer(self, dtype: Any, *leading: int) -> Any:
        """Shared memory for the keys of a block, or of several."""
        return common.smem((*leading, *self.block_shape), dtype, foldable=self.boxes)

    def matrix(self, block_ref):
        """A block's keys in shared memory as [columns, H]."""
        return block_ref.reshape(self.columns, self.head_dim) if self.boxes else block_ref


def tokens_first_tile(group: int, head_dim: int, config: DepthConfig) -> Tile:
    """64 rows of the heads of few tokens."""
    tokens = 64 // group
    return Tile(group, tokens, max(8, config.columns // tokens), head_dim, tokens_first=True)


def slots_first_tile(group: int, head_dim: int, is_prefix: bool, config: DepthConfig) -> Tile:
    """64 rows, and never less than 8 tokens: the swizzled layout's unit."""
    tokens = max(8, 64 // group)
    # The interpreter reads neither before slot 0 nor through a reshaped buffer.
    boxes = is_prefix and not platforms.interpreted()
    return Tile(group, tokens, max(1, config.columns // tokens), head_dim, boxes=boxes)


class Launch(NamedTuple):
    """One launch of a depth kernel: its tile, its slots and the heads of each group it takes."""

    tile: Tile
    slots: Any  # [4] int32
    heads: tuple[int, int]


def plan(
    group: int, shape: tuple[int, ...], slots: Any, is_prefix: bool, config: DepthConfig
) -> list[Launch]:
    """Launches that together cover a call; each continues where the one before stopped.

    With tokens first: the slots up to a multiple of 8, then the rest with slots first. A group
    larger than a tile's is taken in parts.
    """
    length, head_dim = shape[1], shape[3]
    padded = common.next_power_of_two(group)
    wanted = padded >= 16 if config.tokens_first is None else config.tokens_first
    if not (wanted and is_prefix and 8 <= padded <= 64 and length % (64 // padded) == 0):
        return _slots_first(group, head_dim, slots, is_prefix, config)
    stop = slots[1]
    aligned = stop // 8 * 8
    whole = [Launch(tokens_first_tile(padded, head_dim, config), _range(0, aligned), (0, group))]
    if isinstance(slots, np.ndarray) and stop == aligned:
        return whole
    return whole + _slots_first(group, head_dim, _range(aligned, stop), False, config)


def _slots_first(group, head_dim, slots, is_prefix, config) -> list[Launch]:
    limit = 32 if head_dim <= 64 else 16  # a tile's results are kept in registers
    return [
        Launch(
            slots_first_tile(common.next_power_of_two(stop - start), head_dim, is_prefix, config),
            slots, (start, stop),
        )
        for start, stop in common.split_heads(group, limit)
    ]  # fmt: skip


def _range(start: Any, stop: Any) -> jax.Array:
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in (start, stop, stop, stop)])


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
        """(first slot, index in the block, their piece of every [S, B, T, K·H] array)."""
        tile = self.tile
        heads = common.ds(self.head * tile.head_dim, tile.head_dim)
        if tile.boxes:
            slots = common.ds(base, tile.slots)
            yield base, ..., *(ref.at[slots, self.row, self.tokens, heads] for ref in refs)
        elif tile.tokens_first:
            for start in range(0, tile.slots, 8):
                slots = common.ds(base + start, 8)
                for t in range(tile.tokens):
                    token = self.tile_index * tile.tokens + t
                    columns = common.ds(t * tile.slots + start, 8)
                    pieces = (ref.at[slots, self.row, token, heads] for ref in refs)
                    yield base + start, columns, *pieces
        else:
            for i in range(tile.slots):
                columns = common.ds(i * tile.tokens, tile.tokens)
                pieces = (ref.at[base + i, self.row, self.tokens, heads] for ref in refs)
                yield base + i, columns, *pieces


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
        second = lax.div(stop1 - start1 + (size - 1), size)
        return cls((start0, stop0, start1, stop1), first, first + second, tile)

    def bounds(self, block):
        """(first slot of a block, end of its range); with boxes a slot below 0 is none."""
        start0, stop0, start1, stop1 = self.ranges
        size = self.tile.slots
        if self.tile.boxes:
            return stop0 - (self.count - block) * size, stop0
        if self.tile.tokens_first:  # one range; multiples of 8, which copies must be shown
            return common.multiple_of(block * size, 8), stop0
        in_second = start1 + (block - self.first_count) * size
        is_first = block < self.first_count
        base = jnp.where(is_first, start0 + block * size, in_second)
        return base, jnp.where(is_first, stop0, stop1)

    def mask(self, block):
        """[64, columns]: a column's slot is visible and its token is the row's."""
        plgpu, tile = common.mosaic(), self.tile
        base, stop = self.bounds(block)
        row, column = (
            plgpu.broadcasted_iota(jnp.int32, (64, tile.columns), axis, layout=plgpu.Layout.WGMMA)
            for axis in (0, 1)
        )
        if tile.tokens_first:  # the sizes are powers of two
            same_token = (row >> _log2(tile.group)) == (column >> _log2(tile.slots))
            return same_token & ((column & (tile.slots - 1)) < stop - base)
        same_token = ((row ^ column) & (tile.tokens - 1)) == 0
        if tile.boxes:
            return same_token & (column >= -base * tile.tokens)
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
    if tile.boxes:
        return  # TMA writes the zeros
    zeros = jnp.zeros(tile.block_shape, scratch["kd"].dtype)
    for stage in range(config.stages):
        scratch["kd"][stage] = zeros
        scratch["vd"][stage] = zeros
    common.mosaic().commit_smem()


def load_slots(here: Place, blocks: Blocks, kd_ref, vd_ref, scratch, block, stage) -> None:
    """Starts the copies of a block's visible slots; for the others the barrier just counts."""
    plgpu = common.mosaic()
    loaded = scratch["slots_loaded"].at[stage]
    base, stop = blocks.bounds(block)
    for slot, index, kd, vd in here.slots(base, kd_ref, vd_ref):

        def load(index=index, kd=kd, vd=vd):
            plgpu.copy_gmem_to_smem(kd, scratch["kd"].at[stage, index], loaded)
            plgpu.copy_gmem_to_smem(vd, scratch["vd"].at[stage, index], loaded)

        def skip():
            plgpu.barrier_arrive(loaded)
            plgpu.barrier_arrive(loaded)

        if here.tile.boxes:
            load()
        else:
            lax.cond(slot < stop, load, skip)


def store_slots(here: Place, blocks: Blocks, block, refs, scratch, names, *, add: bool) -> None:
    """Starts writing a block's `scratch[names]` to the visible slots of `refs`."""
    base, stop = blocks.bounds(block)
    for slot, index, *targets in here.slots(base, *refs):

        def store(index=index, targets=targets):
            for name, target in zip(names, targets, strict=True):
                common.store(scratch[name].at[index], target, add=add)

        if here.tile.boxes:
            store()
        else:
            common.when(slot < stop, store)
    common.mosaic().commit_smem_to_gmem_group()


def store_zeros(here: Place, blocks: Blocks, num_slots: int, refs, zeros) -> None:
    """Writes `zeros`, a block in shared memory, to the slots that are not visible."""
    tile = here.tile
    heads = common.ds(here.head * tile.head_dim, tile.head_dim)
    if tile.tokens_first:
        stop = blocks.ranges[1]

        def store_eight(i, _):
            slots = common.ds(common.multiple_of(stop + i * 8, 8), 8)
            for t in range(tile.tokens):
                for ref in refs:
                    target = ref.at[slots, here.row, here.tile_index * tile.tokens + t, heads]
                    common.store(zeros.at[common.ds(0, 8)], target, add=False)

        lax.fori_loop(0, lax.div(num_slots - stop + 7, jnp.int32(8)), store_eight, None)
    else:
        source = zeros.at[common.ds(0, 1 if tile.boxes else tile.tokens)]

        def store_one(slot, _):
            def store():
                index = common.ds(slot, 1) if tile.boxes else slot
                for ref in refs:
                    common.store(source, ref.at[index, here.row, here.tokens, heads], add=False)

            common.when(jnp.logical_not(blocks.is_visible(slot)), store)

        lax.fori_loop(0, num_slots, store_one, None)
    common.mosaic().commit_smem_to_gmem_group()


def flat_slots(x: jax.Array) -> jax.Array:
    """[S, B, T, K, H] -> [S, B, T, K·H], which TMA's five dimensions can tile."""
    return x.reshape(*x.shape[:3], -1)
