"""Tiles of query rows: sizes, which blocks a thread block works on, how rows lie in memory."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.wgmma import (
    NO_SEGMENT,
    ROWS,
    TOKEN_ALIGNMENT,
    Walk,
    cdiv,
    div,
    divmod_i32,
    heads_together,
    i32,
    place,
    rem,
)
from pallas_kernels.segments import segment_bounds

_FLOP_PER_BYTE = 100  # 500 TFLOP/s that the kernels do with keys, 5 TB/s out of L2


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes of the fused forward."""

    block_kv: int = 128  # keys of a ring stage
    stages: int = 3
    warpgroups: int = 3  # compute warpgroups, a tile each
    persistent: bool = True  # one thread block per multiprocessor, looping over tiles
    turns: bool = True  # warpgroups take turns on the tensor cores
    depth_parts: int = 4  # the slots are read in so many parts, in turn with parts of the keys
    alternate: bool = True  # every second thread block begins with keys
    piles: int = 1  # sorted tiles are dealt from so many piles, so that heavy and light ones mix
    depth_warpgroups: bool = False  # one more for the slots of each compute warpgroup
    slot_stages: int = 3  # blocks of 8 slots that a depth warpgroup has in flight
    slot_boxes: bool = True  # one TMA load for all slots of a depth block, where layouts allow it

    @property
    def stage_keys(self) -> int:
        """Rows of a ring stage: a sequence block, or 64 depth keys for every warpgroup."""
        return max(self.block_kv, ROWS * self.warpgroups)

    def shared_memory(self, head_dim: int) -> int:
        """Bytes of shared memory, barriers rounded up."""
        tile = self.warpgroups * ROWS * head_dim * 2
        ring = 2 * self.stages * self.stage_keys * head_dim * 2
        return 2 * tile + ring + self.stages * self.block_kv * 4 + self.warpgroups * ROWS * 4 + 4096

    def check(self, head_dim: int) -> None:
        """Raises ValueError for a config that the kernel or the chip cannot run."""
        if self.block_kv % 64 or self.block_kv > 256:
            raise ValueError(f"block_kv must be 64, 128, 192 or 256, got {self}")
        if self.stages < 2 or self.warpgroups not in (1, 2, 3):
            raise ValueError(f"config needs stages >= 2 and 1 to 3 warpgroups, got {self}")
        if min(self.depth_parts, self.piles) < 1:
            raise ValueError(f"config needs depth_parts and piles >= 1, got {self}")
        common.check_smem(self.shared_memory(head_dim), "fused forward")


def forward_config(head_dim: int) -> ForwardConfig:
    """The tile sizes for a head size: the fastest of those measured on an H200."""
    if head_dim == 128:
        return ForwardConfig(stages=2, warpgroups=2, persistent=False, alternate=False, piles=2)
    return ForwardConfig()


def tile_heads(group: int) -> int:
    """Query heads of one KV head in a tile: a power of two, at most 8, that divides the group.

    With 8 heads a tile has 8 tokens, the fewest rows a swizzled TMA tile can have. Larger groups
    are several tiles, of which neighbours read the same depth slots at the same time.
    """
    return math.gcd(group, 8)


class RowPlan(NamedTuple):
    """Static numbers of a call."""

    config: ForwardConfig
    batch: int
    q_len: int
    kv_len: int  # before padding; 0: depth-only
    kv_heads: int
    group: int
    head_dim: int
    dtype: Any
    scale: float
    causal: bool
    segments: bool
    slots: int  # 0: no depth part

    @property
    def pads_heads(self) -> bool:
        """Whether a tile has rows for more heads than the group, so that all heads share it.

        Otherwise a group of 3 is three tiles of one head, and each reads all slots again. A tile
        for 4 heads reads them once, but a quarter of its products with the keys is of no use. For
        one row, a key and value have as many bytes as their products take FLOP (4 H each), so
        bytes read again are weighed with `_FLOP_PER_BYTE` against the useless products.

        One copy loads the rows of all 4 heads, and must be shorter than its axis: with one key
        head it would not be.
        """
        padded = common.next_power_of_two(self.group)
        if padded > TOKEN_ALIGNMENT or self.kv_heads == 1 or self.q_len <= TOKEN_ALIGNMENT:
            return False
        read_again = self.group // tile_heads(self.group) - 1
        return read_again * self.slots * _FLOP_PER_BYTE > (padded - self.group) * self.mean_keys

    @property
    def mean_keys(self) -> int:
        """Sequence keys that a row sees, on average."""
        return self.kv_len // 2 if self.causal else self.kv_len

    @property
    def heads(self) -> int:
        """Heads that a tile has rows for."""
        if self.pads_heads:
            return common.next_power_of_two(self.group)
        return tile_heads(self.group)

    @property
    def own_heads(self) -> int:
        """The first so many of `heads` are the group's."""
        return min(self.heads, self.group)

    @property
    def tokens(self) -> int:
        return ROWS // self.heads

    @property
    def octets(self) -> int:
        """Octets of tokens in a tile. TMA stores [tokens, heads · H] by 8 tokens of one head."""
        return self.tokens // TOKEN_ALIGNMENT

    @property
    def subgroups(self) -> int:
        """Tiles that share a token tile."""
        return cdiv(self.group, self.heads)

    @property
    def steps_per_head(self) -> int:
        """Thread-block tiles of one KV head."""
        units = cdiv(self.q_len, self.tokens) * self.subgroups
        return cdiv(units, self.config.warpgroups)

    @property
    def heads_together(self) -> int:
        return heads_together(self.batch * self.kv_heads, self.kv_len, self.head_dim)

    @property
    def tiles(self) -> int:
        return self.batch * self.kv_heads * self.steps_per_head

    @property
    def ring_slots(self) -> int:
        """How many slots' blocks go through the ring."""
        return 0 if self.depth_warpgroups else self.slots

    @property
    def depth_warpgroups(self) -> bool:
        return self.config.depth_warpgroups and self.slots > 0 and self.kv_len > 0

    @property
    def stage_keys(self) -> int:
        """Rows of a ring stage."""
        return self.config.stage_keys if self.ring_slots else self.config.block_kv

    @property
    def depth_keys(self) -> int:
        """(slot, token) pairs that a ring stage holds for one warpgroup."""
        return self.stage_keys // self.config.warpgroups // ROWS * ROWS

    @property
    def block_slots(self) -> int:
        return self.depth_keys // self.tokens

    @property
    def row_copies(self) -> int:
        """How many pieces `ring.row_pieces` yields."""
        return ROWS // TOKEN_ALIGNMENT if platforms.interpreted() else 1

    @property
    def boxes(self) -> bool:
        """Whether one copy loads a whole depth block: [slots, tokens, H] has a ring stage's layout.

        The interpreter cannot view one memory as two arrays.
        """
        config = self.config
        fits = self.head_dim == 64 and self.depth_keys * config.warpgroups == self.stage_keys
        return fits and config.slot_boxes and self.ring_slots > 0 and not platforms.interpreted()


class RowTile(NamedTuple):
    """Where a thread block's tile lies, and which blocks it reads; int32 scalars."""

    batch: jax.Array
    kv_head: jax.Array
    place: jax.Array  # among the tiles of its KV head
    depth_first: jax.Array  # depth blocks of the first range of slots
    depth_blocks: jax.Array  # depth blocks of both ranges
    kv: Walk | None  # sequence blocks


def unit(plan: RowPlan, tile: RowTile, warpgroup: Any) -> tuple[jax.Array, jax.Array]:
    """First token and first query head of a warpgroup's tile."""
    number = tile.place * plan.config.warpgroups + warpgroup
    tokens, part = divmod_i32(number, plan.subgroups)
    return tokens * plan.tokens, tile.kv_head * plan.group + part * plan.heads


def rounds(plan: RowPlan, blocks: int) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """How many tiles this thread block computes, and the number of its r-th.

    Tiles go from heavy to light; every second round is dealt in reverse, so that no block gets the
    heavier one each time.
    """
    block = lax.axis_index("block")

    def nth(r: jax.Array) -> jax.Array:
        return r * blocks + jnp.where(rem(r, 2) == 1, blocks - 1 - block, block)

    full, rest = divmod(plan.tiles, blocks)
    if not rest:
        return i32(full), nth
    last = blocks - 1 - block if full % 2 else block
    return full + (last < rest).astype(jnp.int32), nth


def _dealt(index: jax.Array, count: int, piles: int) -> jax.Array:
    """The index-th of `count` sorted tiles, laid in `piles` piles and taken from one after another.

    So heavy and light tiles are computed at the same time, and the lightest still come last.
    """
    if piles == 1:
        return index
    height = cdiv(count, piles)
    before = (height - 1) * piles
    full = count - before  # piles of that height; the others lack their last tile
    pile = jnp.where(index < before, rem(index, piles), index - before)
    return div(index, piles) + pile * height - jnp.maximum(pile - full, 0)


def locate_rows(plan: RowPlan, number: jax.Array) -> RowTile:
    """The `number`-th tile without its blocks; heavy ones come first."""
    head, index = place(number, plan.heads_together, plan.steps_per_head)
    index = _dealt(index, plan.steps_per_head, plan.config.piles)
    if plan.causal:
        index = plan.steps_per_head - 1 - index
    zero = i32(0)
    return RowTile(*divmod_i32(head, plan.kv_heads), index, zero, zero, None)


def locate(plan: RowPlan, slots: Any, ranges: Any, number: jax.Array) -> RowTile:
    """The `number`-th tile; `slots` and `ranges` are the kernel's references to those inputs."""
    tile = locate_rows(plan, number)
    if plan.ring_slots:
        size = plan.block_slots
        first = div(slots[1] - slots[0] + (size - 1), size)
        second = div(slots[3] - slots[2] + (size - 1), size)
        tile = tile._replace(depth_first=first, depth_blocks=first + second)
    if plan.kv_len:
        tile = tile._replace(kv=_kv_blocks(plan, ranges, tile))
    return tile


def _kv_blocks(plan: RowPlan, ranges: Any, tile: RowTile) -> Walk:
    block_kv = plan.config.block_kv
    to_all = to_any = i32(plan.kv_len)  # keys that every row sees, keys that some row sees
    if plan.causal:
        first = unit(plan, tile, 0)[0]
        last = unit(plan, tile, plan.config.warpgroups - 1)[0] + (plan.tokens - 1)
        to_all, to_any = jnp.minimum(first + 1, to_all), jnp.minimum(last + 1, to_any)
    stop = div(to_any + (block_kv - 1), block_kv)
    bounds = ranges.at[tile.batch, tile.place] if plan.segments else None
    return Walk.of(i32(0), stop, i32(0), div(to_all, block_kv), bounds)


def slot_block(
    plan: RowPlan, slots: Any, tile: RowTile, block: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """First slot of a depth block, and the end of the range it lies in."""
    second = block >= tile.depth_first
    offset = jnp.where(second, block - tile.depth_first, block) * plan.block_slots
    first = jnp.where(second, slots[2], slots[0]) + offset
    return first, jnp.where(second, slots[3], slots[1])


# rows as they lie in tiles: (octet of tokens, head, token of the octet)


def row_tokens(plan: RowPlan, rows: jax.Array) -> jax.Array:
    """The token, counted from the tile's first, of every row; all sizes are powers of two."""
    own = rows & (TOKEN_ALIGNMENT - 1)
    if plan.octets == 1:
        return own
    octet_bits = (TOKEN_ALIGNMENT * plan.heads).bit_length() - 1
    return (rows >> octet_bits) * TOKEN_ALIGNMENT + own


def flat_heads(x: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, T, N · H]."""
    return x.reshape(*x.shape[:2], -1)


def _token_tiles(plan: RowPlan, segments: jax.Array) -> jax.Array:
    """[B, token tiles, tokens], of all tiles that the thread blocks have, padding included."""
    tiles = cdiv(plan.steps_per_head * plan.config.warpgroups, plan.subgroups)
    ids = jnp.pad(segments, ((0, 0), (0, tiles * plan.tokens - segments.shape[1])))
    return ids.reshape(plan.batch, tiles, plan.tokens)


def segment_rows(plan: RowPlan, segments: jax.Array) -> jax.Array:
    """[B, token tiles, 64]: the segment of every row of a tile, padding made unequal to all."""
    ids = _token_tiles(plan, segments)
    ids = jnp.where(ids == 0, NO_SEGMENT, ids)
    ids = ids.reshape(*ids.shape[:2], plan.octets, 1, TOKEN_ALIGNMENT)
    return jnp.tile(ids, (1, 1, 1, plan.heads, 1)).reshape(*ids.shape[:2], ROWS)


def segment_ranges(plan: RowPlan, segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """[B, thread-block tiles, 2]: the blocks of keys that a thread block's tiles may see."""
    units = jnp.arange(plan.steps_per_head * plan.config.warpgroups) // plan.subgroups
    ids = _token_tiles(plan, segments)[:, units].reshape(plan.batch, plan.steps_per_head, -1)
    return segment_bounds(ids, key_segments, plan.config.block_kv)


def rows_by_token(plan: RowPlan, x: jax.Array) -> jax.Array:
    """[B, K, units, 64] as the tiles lie to [B, Tq, N]."""
    tiles = cdiv(plan.q_len, plan.tokens)
    x = x[:, :, : tiles * plan.subgroups].reshape(
        plan.batch, plan.kv_heads, tiles, plan.subgroups, plan.octets, plan.heads, TOKEN_ALIGNMENT
    )
    if plan.heads > plan.own_heads:
        x = x[..., : plan.own_heads, :]
    x = x.transpose(0, 2, 4, 6, 1, 3, 5).reshape(plan.batch, tiles * plan.tokens, -1)
    return x[:, : plan.q_len]


def rows_by_tile(plan: RowPlan, x: jax.Array, fill: float) -> jax.Array:
    """The inverse of `rows_by_token`, for all tiles that the thread blocks have."""
    tiles = cdiv(plan.steps_per_head * plan.config.warpgroups, plan.subgroups)
    missing = tiles * plan.tokens - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)), constant_values=fill)
    x = x.reshape(
        plan.batch, tiles, plan.octets, TOKEN_ALIGNMENT, plan.kv_heads, plan.subgroups, -1
    )
    if missing_heads := plan.heads - plan.own_heads:
        x = jnp.pad(x, ((0, 0),) * 6 + ((0, missing_heads),), constant_values=fill)
    return x.transpose(0, 4, 1, 5, 2, 6, 3).reshape(plan.batch, plan.kv_heads, -1, ROWS)
