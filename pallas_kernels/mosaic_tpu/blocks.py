"""Which pairs of query and key blocks the tokens kernels visit, and the mask within a pair.

The scalars are prefetched: index maps read them before a block is fetched, so that a pair that is
masked wholly costs a grid step of a few scalar operations, and no memory traffic.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic_tpu import schedule

_NO_ID = np.iinfo(np.int32)


class Sides(NamedTuple):
    """What a mask needs to know of the query and key tokens, beyond their indices."""

    q_offset: jax.Array | None  # [B] int32; None: 0
    k_base: jax.Array | None  # [B] int32, position of key 0; None: 0
    k_stop: jax.Array | None  # [B] int32, keys at or after this index are invisible; None: Tk
    q_segments: jax.Array | None  # [B, Tq] int32
    k_segments: jax.Array | None  # [B, Tk] int32


@dataclasses.dataclass(frozen=True)
class PairPlan:
    """The static part: sizes and kinds of masks."""

    q_len: int
    k_len: int
    q_block: int
    k_block: int
    k_step: int
    q_count: int
    """Query blocks of a launch: of the sequence, or of a span of it."""
    k_count: int
    causal: bool = True
    chunk: int | None = None
    has_offsets: bool = False
    has_lengths: bool = False
    has_segments: bool = False

    @property
    def ragged_keys(self) -> bool:
        """Whether blocks contain uninitialized keys, which may be NaN."""
        return self.has_lengths or self.k_len % self.k_block != 0

    @property
    def ragged_queries(self) -> bool:
        return self.q_len % self.q_block != 0


def plan_pairs(
    shape: schedule.CallShape,
    blocks: tuple[int, int],
    sides: Sides,
    *,
    causal: bool,
    chunk: int | None,
    k_step: int = 0,
) -> PairPlan:
    """Of the static part of a call.

    blocks: tokens of a query and of a key block. k_step: keys of a softmax update; 0: none, in the
    backward.
    """
    q_block, k_block = blocks
    return PairPlan(
        shape.q_len,
        shape.k_len,
        q_block,
        k_block,
        min(k_step, k_block),
        q_count=schedule.num_blocks(shape.q_len, q_block),
        k_count=schedule.num_blocks(shape.k_len, k_block),
        causal=causal,
        chunk=chunk,
        has_offsets=sides.q_offset is not None or sides.k_base is not None,
        has_lengths=sides.k_stop is not None,
        has_segments=sides.q_segments is not None,
    )


def block_scalars(
    plan: PairPlan,
    sides: Sides,
    batch: int,
    *,
    by_key: bool,
    span: jax.Array | None = None,
    all_keys: bool = True,
) -> dict[str, jax.Array]:
    """Prefetched int32 vectors: per row, per block, and the hull of the blocks that are needed.

    by_key: `first` and `last` are query blocks of the launch by key block [B * k_count], else key
    blocks by query block [B * q_count]. Where nothing is needed, last = -1 and first = 0.
    span: the launch is for query blocks span * q_count and on. all_keys: `k_end` [B], the last key
    block to visit, is the last one, else the last one that is needed.
    """
    q_blocks = jnp.arange(plan.q_count) + (0 if span is None else span * plan.q_count)
    zeros = jnp.zeros(batch, jnp.int32)
    rows = {
        "q_offset": zeros if sides.q_offset is None else sides.q_offset,
        "k_base": zeros if sides.k_base is None else sides.k_base,
        "k_stop": zeros + plan.k_len
        if sides.k_stop is None
        else jnp.clip(sides.k_stop, 0, plan.k_len),
    }
    column = {name: x[:, None] for name, x in rows.items()}
    q_start, q_stop, k_start, k_stop = _bounds(plan, q_blocks, jnp.arange(plan.k_count), **column)
    ids, lowest = {}, None
    if plan.chunk is not None:
        lowest = q_start // plan.chunk * plan.chunk
        ids = {
            "lowest": lowest.reshape(-1),
            "highest": ((q_stop - 1) // plan.chunk * plan.chunk).reshape(-1),
        }
        lowest = lowest[:, :, None]
    needed = schedule.needed(
        q_start[:, :, None],
        q_stop[:, :, None],
        k_start[:, None],
        k_stop[:, None],
        causal=plan.causal,
        lowest=lowest,
    )
    if plan.has_segments:
        q_ids = _block_ids(sides.q_segments, plan.q_block, _NO_ID.min)
        # A span may reach beyond the last block: nothing is needed there.
        q_ids = jnp.take(q_ids, q_blocks, axis=1, mode="clip")
        k_ids = _block_ids(sides.k_segments, plan.k_block, _NO_ID.min + 1)
        ids |= {"q_ids": q_ids.reshape(-1), "k_ids": k_ids.reshape(-1)}
        q_low, q_high = q_ids[:, :, None, 0], q_ids[:, :, None, 1]
        needed &= (q_low <= k_ids[:, None, :, 1]) & (k_ids[:, None, :, 0] <= q_high)
    seen = needed.any(axis=1)
    k_end = plan.k_count - 1 - jnp.argmax(seen[:, ::-1], axis=1)
    needed = needed.swapaxes(1, 2) if by_key else needed
    last = needed.shape[2] - 1 - jnp.argmax(needed[:, :, ::-1], axis=2)
    hull = {
        "first": jnp.argmax(needed, axis=2).astype(jnp.int32).reshape(-1),
        "last": jnp.where(needed.any(axis=2), last, -1).astype(jnp.int32).reshape(-1),
    }
    end = {
        "span": jnp.full(1, 0 if span is None else span, jnp.int32),
        "k_end": jnp.where(seen.any(axis=1) & (not all_keys), k_end, plan.k_count - 1).astype(
            jnp.int32
        ),
    }
    return rows | ids | hull | end


def _bounds(plan: PairPlan, q_block, k_block, *, q_offset, k_base, k_stop):
    """Positions [start, stop) of a query and a key block, from their indices."""
    q_start, k_start = q_block * plan.q_block, k_block * plan.k_block
    q_stop = jnp.minimum(q_start + plan.q_block, plan.q_len)
    stop = jnp.minimum(k_start + plan.k_block, k_stop)
    return q_start + q_offset, q_stop + q_offset, k_start + k_base, stop + k_base


def _block_ids(segments: jax.Array, block: int, nothing: int) -> jax.Array:
    """[B, blocks, 3]: smallest and largest segment of a block, and the only one or `nothing`.

    The first two leave out padding, segment 0, which no query sees.
    """
    padded = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)))
    ids = padded.reshape(padded.shape[0], -1, block)
    low = jnp.min(jnp.where(ids == 0, _NO_ID.max, ids), axis=2)
    high = jnp.max(jnp.where(ids == 0, _NO_ID.min, ids), axis=2)
    alone = (low == high) & jnp.all(ids != 0, axis=2)
    return jnp.stack([low, high, jnp.where(alone, low, nothing)], axis=2)


def hull_index(step: Any, entry: Any, scalars: Any) -> Any:
    """The step-th block of a hull, and its last one ever after: then nothing is fetched."""
    first, last = scalars.first[entry], scalars.last[entry]
    return jnp.maximum(jnp.minimum(first + step, last), 0)


class BlockPair(NamedTuple):
    """One grid step of a tokens kernel, seen from inside: scalars."""

    row: Any
    """Batch row b."""
    q_step: Any
    """Query block, counted from the first one of the launch."""
    q_block: Any
    """Counted from the first query of the sequence."""
    k_block: Any
    needed: Any
    unmasked: Any


def pair(plan: PairPlan, scalars: Any, row: Any, q_step: Any, k_block: Any) -> BlockPair:
    """Whether the pair has to be computed, and whether without a mask."""
    q_block = q_step + scalars.span[0] * plan.q_count
    bounds = _bounds(
        plan,
        q_block,
        k_block,
        q_offset=scalars.q_offset[row],
        k_base=scalars.k_base[row],
        k_stop=scalars.k_stop[row],
    )
    entry = row * plan.q_count + q_step
    lowest = highest = None
    if plan.chunk is not None:
        lowest, highest = scalars.lowest[entry], scalars.highest[entry]
    needed = schedule.needed(*bounds, causal=plan.causal, lowest=lowest)
    unmasked = schedule.unmasked(*bounds, causal=plan.causal, lowest=highest)
    if plan.ragged_keys:
        unmasked &= bounds[3] - bounds[2] == plan.k_block
    if plan.ragged_queries:
        unmasked &= bounds[1] - bounds[0] == plan.q_block
    if plan.has_segments:
        k_entry = row * plan.k_count + k_block
        q_low, q_high, q_only = (scalars.q_ids[3 * entry + n] for n in range(3))
        k_low, k_high, k_only = (scalars.k_ids[3 * k_entry + n] for n in range(3))
        needed &= (q_low <= k_high) & (k_low <= q_high)
        unmasked &= q_only == k_only
    return BlockPair(row, q_step, q_block, k_block, needed, unmasked)


def mask(plan: PairPlan, refs: Any, at: BlockPair) -> jax.Array:
    """[k_block, q_block] bool: which keys (rows) the queries (columns) see."""
    shape = (plan.k_block, plan.q_block)
    k_index = at.k_block * plan.k_block + lax.broadcasted_iota(jnp.int32, shape, 0)
    q_index = at.q_block * plan.q_block + lax.broadcasted_iota(jnp.int32, (1, plan.q_block), 1)
    k_position = k_index + refs.k_base[at.row]
    visible = k_index < refs.k_stop[at.row]
    if plan.ragged_queries:
        visible &= q_index < plan.q_len
    if plan.causal:
        visible &= k_position <= q_index + refs.q_offset[at.row]
    if plan.chunk is not None:
        visible &= k_position >= refs.chunk_start[...]
    if plan.has_segments:
        q_ids = refs.q_segments[...]
        visible &= (_as_column(refs.k_segments[...], plan) == q_ids) & (q_ids != 0)
    return visible


def _as_column(row: jax.Array, plan: PairPlan) -> jax.Array:
    """[1, k_block] -> [k_block, q_block], constant along the lanes."""
    square = jnp.broadcast_to(row, (schedule.LANES, plan.k_block)).T
    return jnp.tile(square, (1, plan.q_block // schedule.LANES))


def chunk_starts(plan: PairPlan, sides: Sides, batch: int) -> jax.Array | None:
    """[B, 1, Tq] int32: position of the first key that a query's chunk contains."""
    if plan.chunk is None:
        return None
    position = jnp.arange(plan.q_len, dtype=jnp.int32)[None, None]
    if sides.q_offset is not None:
        position = position + sides.q_offset[:, None, None]
    return jnp.broadcast_to(position // plan.chunk * plan.chunk, (batch, 1, plan.q_len))


def valid_lanes(x: jax.Array, start: Any, stop: Any) -> jax.Array:
    """x [rows, lanes] with 0 in the lanes whose index, counted from `start`, is >= stop."""
    lane = start + lax.broadcasted_iota(jnp.int32, x.shape, 1)
    # Selections of 16-bit lanes need masks in another layout; float32 has the common one.
    return jnp.where(lane < stop, x.astype(jnp.float32), 0.0).astype(x.dtype)
