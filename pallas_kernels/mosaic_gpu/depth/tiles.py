"""Tiles of the depth kernels: which rows and columns they have, and how slots come to memory.

A block of the grid takes a tile of tokens of one row and one key/value head, with all query heads
of that head. Rows are (token, query head) pairs, columns (token, slot) pairs, in one of two orders:

- slots first: rows (head, token), columns (slot, token), at least 8 tokens, 64 rows for up to 8
  heads. A block is one copy [slots, tokens, H] if all its slots are visible, else a copy a slot.
- tokens first: rows (token, head), columns (token, slot), copied as 8 slots of a token: a tile of
  few tokens has 64 rows for many heads, and less of the dense product is masked away. Needs a range
  of slots whose ends are multiples of 8.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

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


class SlotTile(NamedTuple):
    """Sizes that follow from a call's shape."""

    group: int  # query heads of a key/value head, a power of two
    tokens: int
    slots: int
    head_dim: int
    tokens_first: bool = False
    boxes: bool = False  # slots first, and a whole block is one copy

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
        """How many pieces `DepthPlace.queries` and `DepthPlace.slots` yield."""
        if self.tokens_first:
            return self.tokens, self.tokens * self.slots // 8
        return self.group, self.slots

    def buffer(self, dtype: Any, *leading: int) -> Any:
        """Shared memory for the keys of a block, or of several."""
        return common.smem((*leading, *self.block_shape), dtype, foldable=self.boxes)

    def matrix(self, block_ref):
        """A block's keys in shared memory as [columns, H]."""
        return block_ref.reshape(self.columns, self.head_dim) if self.boxes else block_ref


def tokens_first_tile(group: int, head_dim: int, config: DepthConfig) -> SlotTile:
    """64 rows of the heads of few tokens."""
    tokens = 64 // group
    return SlotTile(group, tokens, max(8, config.columns // tokens), head_dim, tokens_first=True)


def slots_first_tile(group: int, head_dim: int, config: DepthConfig) -> SlotTile:
    """64 rows, and never less than 8 tokens: the swizzled layout's unit."""
    tokens = max(8, 64 // group)
    slots = max(1, config.columns // tokens)
    # The interpreter does not read through a reshaped buffer.
    return SlotTile(group, tokens, slots, head_dim, boxes=slots > 1 and not platforms.interpreted())


class DepthLaunch(NamedTuple):
    """One launch of a depth kernel: its tile, its slots and the heads of each group it takes."""

    tile: SlotTile
    slots: Any  # [4] int32
    heads: tuple[int, int]


def plan_launches(
    group: int, shape: tuple[int, ...], slots: Any, is_prefix: bool, config: DepthConfig
) -> list[DepthLaunch]:
    """Launches that together cover a call; each continues where the one before stopped.

    With tokens first: the slots up to a multiple of 8, then the rest with slots first. A group
    larger than a tile's is taken in parts.
    """
    length, head_dim = shape[1], shape[3]
    padded = common.next_power_of_two(group)
    wanted = padded >= 16 if config.tokens_first is None else config.tokens_first
    if not (wanted and is_prefix and 8 <= padded <= 64 and length % (64 // padded) == 0):
        return _slots_first(group, head_dim, slots, config)
    stop = slots[1]
    aligned = stop // 8 * 8
    whole = [
        DepthLaunch(tokens_first_tile(padded, head_dim, config), _range(0, aligned), (0, group))
    ]
    if isinstance(slots, np.ndarray) and stop == aligned:
        return whole
    return whole + _slots_first(group, head_dim, _range(aligned, stop), config)


def _slots_first(group, head_dim, slots, config) -> list[DepthLaunch]:
    limit = 32 if head_dim <= 64 else 16  # a tile's results are kept in registers
    return [
        DepthLaunch(
            slots_first_tile(common.next_power_of_two(stop - start), head_dim, config),
            slots,
            (start, stop),
        )
        for start, stop in common.split_heads(group, limit)
    ]


def _range(start: Any, stop: Any) -> jax.Array:
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in (start, stop, stop, stop)])


class DepthPlace(NamedTuple):
    """Where a block of the grid stands."""

    row: jax.Array
    head: jax.Array
    tile_index: jax.Array
    num_tiles: int
    tile: SlotTile

    @classmethod
    def here(cls, num_tiles: int, tile: SlotTile) -> "DepthPlace":
        row, head, index = (lax.axis_index(name) for name in ("row", "head", "tile"))
        return cls(row, head, index, num_tiles, tile)

    @property
    def tokens(self):
        return common.ds(self.tile_index * self.tile.tokens, self.tile.tokens)

    @property
    def flat_tokens(self):
        """The tile's tokens on the axis B·T, whose rows are whole tiles."""
        first = (self.row * self.num_tiles + self.tile_index) * self.tile.tokens
        return common.ds(first, self.tile.tokens)

    @property
    def heads(self):
        """The key/value head's place on the axis K·H."""
        return common.ds(self.head * self.tile.head_dim, self.tile.head_dim)

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
        """(first slot, index in the block, their piece of every [S, B·T, K·H] array)."""
        tile = self.tile
        if tile.tokens_first:
            first = (self.row * self.num_tiles + self.tile_index) * tile.tokens
            for start in range(0, tile.slots, 8):
                slots = common.ds(base + start, 8)
                for t in range(tile.tokens):
                    columns = common.ds(t * tile.slots + start, 8)
                    pieces = (ref.at[slots, first + t, self.heads] for ref in refs)
                    yield base + start, columns, *pieces
        else:
            for i in range(tile.slots):
                index = common.ds(i, 1) if tile.boxes else common.ds(i * tile.tokens, tile.tokens)
                slot = common.ds(base + i, 1) if tile.boxes else base + i
                pieces = (ref.at[slot, self.flat_tokens, self.heads] for ref in refs)
                yield base + i, index, *pieces

    def box(self, base, *refs) -> tuple[Any, ...]:
        """A whole block's piece of every [S, B·T, K·H] array."""
        slots = common.ds(base, self.tile.slots)
        return tuple(ref.at[slots, self.flat_tokens, self.heads] for ref in refs)


class SlotBlocks(NamedTuple):
    """The visible slots in blocks of `tile.slots`: over the first range, then over the second."""

    ranges: tuple[Any, ...]
    first_count: Any
    count: Any
    tile: SlotTile

    @classmethod
    def of(cls, slots_ref, tile: SlotTile) -> Self:
        start0, stop0, start1, stop1 = (slots_ref[i] for i in range(4))
        size = jnp.int32(tile.slots)
        first = lax.div(stop0 - start0 + (size - 1), size)
        second = lax.div(stop1 - start1 + (size - 1), size)
        return cls((start0, stop0, start1, stop1), first, first + second, tile)

    def bounds(self, block):
        """(first slot of a block, end of its range)."""
        start0, stop0, start1, stop1 = self.ranges
        size = self.tile.slots
        if self.tile.tokens_first:  # one range; copies must be known to start at multiples of 8
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
        return same_token & (column < (stop - base) * tile.tokens)

    def is_whole(self, block):
        base, stop = self.bounds(block)
        return base + self.tile.slots <= stop

    def is_visible(self, slot):
        start0, stop0, start1, stop1 = self.ranges
        return ((slot >= start0) & (slot < stop0)) | ((slot >= start1) & (slot < stop1))


def _log2(n: int) -> int:
    return n.bit_length() - 1


def clear_slots(scratch, tile: SlotTile, stages: Iterable[Any]) -> None:
    """Writes zeros to every stage: the columns of slots that are not loaded keep what is there,
    and 0 · NaN is NaN.
    """
    for stage in stages:
        for name in ("kd", "vd"):
            zeros = common.zeros((tile.columns, tile.head_dim)).astype(scratch[name].dtype)
            tile.matrix(scratch[name].at[stage])[...] = zeros
    common.mosaic().commit_smem()


def load_slots(here: DepthPlace, blocks: SlotBlocks, kd_ref, vd_ref, scratch, block, stage) -> None:
    """Starts copying a block's visible slots; for the others it arrives at the barrier itself."""
    plgpu = common.mosaic()
    base, stop = blocks.bounds(block)
    buffers = scratch["kd"].at[stage], scratch["vd"].at[stage]

    def load_box():
        for piece, buffer in zip(here.box(base, kd_ref, vd_ref), buffers, strict=True):
            plgpu.copy_gmem_to_smem(piece, buffer, scratch["box_loaded"].at[stage])

    def load_pieces():
        loaded = scratch["slots_loaded"].at[stage]
        for slot, index, *pieces in here.slots(base, kd_ref, vd_ref):

            def load(index=index, pieces=pieces):
                for piece, name in zip(pieces, ("kd", "vd"), strict=True):
                    plgpu.copy_gmem_to_smem(piece, scratch[name].at[stage, index], loaded)

            def skip():
                plgpu.barrier_arrive(loaded)
                plgpu.barrier_arrive(loaded)

            lax.cond(slot < stop, load, skip)

    if here.tile.boxes:
        lax.cond(blocks.is_whole(block), load_box, load_pieces)
    else:
        load_pieces()


def wait_slots(blocks: SlotBlocks, scratch, block, stage) -> None:
    """Waits for what `load_slots` started."""
    plgpu = common.mosaic()

    def wait(name: str) -> None:
        plgpu.barrier_wait(scratch[name].at[stage])

    if blocks.tile.boxes:
        whole = blocks.is_whole(block)
        lax.cond(whole, lambda: wait("box_loaded"), lambda: wait("slots_loaded"))
    else:
        wait("slots_loaded")


def slot_barriers(tile: SlotTile, stages: int) -> dict[str, Any]:
    """Barriers of `load_slots`, by name."""
    barriers = {"slots_loaded": common.barrier(2 * tile.copies[1], stages)}
    if tile.boxes:
        barriers["box_loaded"] = common.barrier(2, stages)
    return barriers


def store_slots(
    here: DepthPlace, blocks: SlotBlocks, block, refs, scratch, names, *, add: bool
) -> None:
    """Starts writing a block's `scratch[names]` to the visible slots of `refs`."""
    base, stop = blocks.bounds(block)

    def store_box():
        for name, target in zip(names, here.box(base, *refs), strict=True):
            common.store(scratch[name], target, add=add)

    def store_pieces():
        for slot, index, *targets in here.slots(base, *refs):

            def store(index=index, targets=targets):
                for name, target in zip(names, targets, strict=True):
                    common.store(scratch[name].at[index], target, add=add)

            common.when(slot < stop, store)

    if here.tile.boxes:
        lax.cond(blocks.is_whole(block), store_box, store_pieces)
    else:
        store_pieces()
    common.mosaic().commit_smem_to_gmem_group()


def store_zeros(here: DepthPlace, blocks: SlotBlocks, num_slots: int, refs, zeros) -> None:
    """Writes `zeros`, a block in shared memory, to the slots that are not visible."""
    tile = here.tile
    if tile.tokens_first:
        stop = blocks.ranges[1]
        first = (here.row * here.num_tiles + here.tile_index) * tile.tokens

        def store_eight(i, _):
            slots = common.ds(common.multiple_of(stop + i * 8, 8), 8)
            for t in range(tile.tokens):
                for ref in refs:
                    target = ref.at[slots, first + t, here.heads]
                    common.store(zeros.at[common.ds(0, 8)], target, add=False)

        lax.fori_loop(0, lax.div(num_slots - stop + 7, jnp.int32(8)), store_eight, None)
    else:
        source = zeros.at[common.ds(0, 1 if tile.boxes else tile.tokens)]

        def store_one(slot, _):
            def store():
                index = common.ds(slot, 1) if tile.boxes else slot
                for ref in refs:
                    common.store(source, ref.at[index, here.flat_tokens, here.heads], add=False)

            common.when(jnp.logical_not(blocks.is_visible(slot)), store)

        lax.fori_loop(0, num_slots, store_one, None)
    common.mosaic().commit_smem_to_gmem_group()


def flat_slots(x: jax.Array, tile: SlotTile) -> jax.Array:
    """[S, B, T, K, H] -> [S, B·T, K·H], which TMA's five dimensions can tile; T in whole tiles."""
    x = common.pad_tokens(x, 2, tile.tokens)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1)


def unflat_slots(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `flat_slots`, to `shape`."""
    slots, batch, length, kv_heads, head_dim = shape
    return x.reshape(slots, batch, -1, kv_heads, head_dim)[:, :, :length]
