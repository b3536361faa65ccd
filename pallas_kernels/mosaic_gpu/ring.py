"""The ring of stages in kernels whose tiles are query rows: the forward and the one for dq.

The ring has a buffer of keys and one of values per stage. A sequence block fills a stage for all
warpgroups; a depth block gives each its own (slot, token) rows, as their tokens differ.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.row_tiles import RowPlan, RowTile, row_tokens, slot_block, unit
from pallas_kernels.mosaic_gpu.wgmma import (
    NO_SEGMENT,
    ROWS,
    TOKEN_ALIGNMENT,
    div,
    i32,
    iota,
    load_columns,
    rem,
    spread,
)


class RowRefs(NamedTuple):
    """A kernel's global arrays, then shared memory and barriers; None: the kernel has none."""

    query: Any
    d_out: Any = None
    key: Any = None
    value: Any = None
    depth_key: Any = None
    depth_value: Any = None
    slots: Any = None
    query_segments: Any = None
    key_segments: Any = None
    ranges: Any = None
    out: Any = None
    lse: Any = None
    delta: Any = None
    d_depth_key: Any = None
    d_depth_value: Any = None
    q_smem: Any = None
    q_smem_boxes: Any = None  # the same memory as [..., tokens, heads · H]
    do_smem: Any = None
    do_smem_boxes: Any = None
    k_smem: Any = None
    v_smem: Any = None
    k_smem_boxes: Any = None  # the same memory as [stages, warpgroups, slots, tokens, H]
    v_smem_boxes: Any = None
    segment_smem: Any = None
    lse_smem: Any = None
    dq_smem: Any = None
    dq_smem_boxes: Any = None
    weight_smem: Any = None
    d_slot_smem: Any = None
    old_smem: Any = None  # for the interpreter; see `common.store`
    old_full: Any = None
    q_full: Any = None
    q_free: Any = None
    k_full: Any = None
    v_full: Any = None
    kd_full: Any = None  # of depth blocks that come slot by slot
    vd_full: Any = None
    kd_box_full: Any = None  # of depth blocks that come in one piece
    vd_box_full: Any = None
    k_free: Any = None
    v_free: Any = None
    turn: Any = None
    slot_keys: Any = None  # from here on of `depth.slot_warpgroup`
    slot_values: Any = None
    slot_weights: Any = None
    slots_loaded: Any = None
    box_loaded: Any = None
    depth_full: Any = None

    def read_scalars(self) -> "RowRefs":
        """With `slots` in registers: loads from global memory would delay every depth block."""
        if self.slots is None:
            return self
        return self._replace(slots=tuple(self.slots[i] for i in range(4)))


def ring_memory(plan: RowPlan) -> dict[str, Any]:
    """Shared memory and barriers of the ring, by the names of `RowRefs`; see `split_unions`."""
    plgpu = common.mosaic()
    config = plan.config
    ring = common.smem((config.stages, plan.stage_keys, plan.head_dim), plan.dtype)
    barrier = functools.partial(common.barrier, count=config.stages)
    parts = functools.partial(common.barrier, count=config.stages * config.warpgroups)
    memory = {"k_smem": ring, "v_smem": ring, "k_free": parts(1), "v_free": parts(1)}
    if plan.kv_len:
        memory |= {"k_full": barrier(2 if plan.segments else 1), "v_full": barrier(1)}
    if plan.ring_slots:
        memory |= {"kd_full": parts(plan.block_slots), "vd_full": parts(plan.block_slots)}
    if plan.boxes:
        shape = (config.stages, config.warpgroups, plan.block_slots, plan.tokens)
        boxes = common.smem((*shape, plan.head_dim), plan.dtype)
        memory |= dict.fromkeys(("k_smem", "v_smem"), plgpu.RefUnion(ring, boxes))
        memory |= dict.fromkeys(("kd_box_full", "vd_box_full"), parts(1))
    if plan.kv_len and plan.segments:
        memory["segment_smem"] = plgpu.SMEM((config.stages, config.block_kv), jnp.int32)
    return memory


def row_memory(plan: RowPlan, dtype: Any, *leading: int) -> Any:
    """Shared memory for the rows of tiles, [*leading, 64, H] and as `row_pieces` has them.

    Rows are sorted as TMA stores [tokens, heads · H]: 8 tokens of one head, then of the next. The
    interpreter cannot view one memory as two arrays.
    """
    rows = common.smem((*leading, ROWS, plan.head_dim), dtype)
    if platforms.interpreted():
        return rows
    boxes = common.smem((*leading, plan.tokens, plan.heads * plan.head_dim), dtype)
    return common.mosaic().RefUnion(rows, boxes)


def row_pieces(
    plan: RowPlan,
    tile: RowTile,
    warpgroup: Any,
    array: Any,
    rows: Any,
    boxes: Any,
    *,
    own: bool = True,
) -> Iterator[tuple[Any, Any]]:
    """(piece of an array [B, T, N · H], its place in shared memory) of a warpgroup's tile.

    own: only the group's heads; otherwise a tile with rows for more has the heads after them there,
    of the next group or zeros.
    """
    token, head = unit(plan, tile, warpgroup)
    pads = own and plan.heads > plan.own_heads
    heads = (plan.own_heads if own else plan.heads) * plan.head_dim
    if boxes is not None:
        width = common.ds(head * plan.head_dim, heads)
        if not pads:
            yield array.at[tile.batch, common.ds(token, plan.tokens), width], boxes
            return
        for first in range(0, plan.tokens, TOKEN_ALIGNMENT):  # other heads lie between octets
            piece = array.at[tile.batch, common.ds(token + first, TOKEN_ALIGNMENT), width]
            yield piece, boxes.at[common.ds(first, TOKEN_ALIGNMENT), common.ds(0, heads)]
        return
    for i in range(plan.row_copies):
        octet, nth = divmod(i, plan.heads)
        if pads and nth >= plan.own_heads:
            continue
        tokens = common.ds(token + octet * TOKEN_ALIGNMENT, TOKEN_ALIGNMENT)
        last = plan.kv_heads * plan.group - 1
        width = common.ds(jnp.minimum(head + nth, last) * plan.head_dim, plan.head_dim)
        place = common.ds(i * TOKEN_ALIGNMENT, TOKEN_ALIGNMENT)
        yield array.at[tile.batch, tokens, width], rows.at[place]


def split_unions(types: dict[str, Any], memory: dict[str, Any]) -> dict[str, Any]:
    """The two views of one memory under their own names; `types`: what `memory` was made of."""
    for name, kind in types.items():
        if isinstance(kind, common.mosaic().RefUnion):
            memory[name], memory[name + "_boxes"] = memory[name]
    return memory


def either(plan: RowPlan, slots_left: jax.Array, whole: Callable, part: Callable) -> None:
    """Calls `whole` for a depth block that one copy moves, `part` for one moved slot by slot."""
    if not plan.boxes:
        part()
        return
    common.when(slots_left >= plan.block_slots, whole)
    common.when(slots_left < plan.block_slots, part)


def visit_blocks(
    plan: RowPlan, tile: RowTile, depth: Callable, plain: Callable, edge: Callable, carry
):
    """Calls (block, carry) -> carry for every block of a tile, in the ring's order.

    `depth` takes (first block of this run of depth blocks, block, carry). `plain` takes the key
    blocks that need no mask, `edge` those after them.

    Depth blocks wait for memory, key blocks for the tensor cores. So both are visited in
    `depth_parts` parts, in turn, and with `alternate` every second thread block begins with keys:
    at any time some thread blocks use the memory and others the tensor cores.
    """

    def slots(start, stop, carry):
        if not plan.ring_slots:
            return carry
        return lax.fori_loop(start, stop, functools.partial(depth, start), carry)

    if tile.kv is None:
        return slots(i32(0), tile.depth_blocks, carry)
    plain_stop, stop = tile.kv.plain, tile.kv.count

    def keys(start, end, carry):
        carry = lax.fori_loop(
            jnp.minimum(start, plain_stop), jnp.minimum(end, plain_stop), plain, carry
        )
        return lax.fori_loop(
            jnp.maximum(start, plain_stop), jnp.maximum(end, plain_stop), edge, carry
        )

    parts, alternate = plan.config.depth_parts, plan.config.alternate
    if not plan.ring_slots or (parts == 1 and not alternate):
        return keys(i32(0), stop, slots(i32(0), tile.depth_blocks, carry))
    late = rem(lax.axis_index("block"), 2) if alternate else i32(0)

    def bound(part, count):
        return div(jnp.clip(part, 0, parts) * count, parts)

    def visit_part(part, carry):
        blocks = tile.depth_blocks
        carry = slots(bound(part - late, blocks), bound(part - late + 1, blocks), carry)
        return keys(bound(part, stop), bound(part + 1, stop), carry)

    return lax.fori_loop(0, parts + alternate, visit_part, carry)


# loads


def load_blocks(plan: RowPlan, refs: RowRefs, tile: RowTile, step: jax.Array) -> jax.Array:
    """Every block of a tile; returns the next step of the ring."""
    depth = functools.partial(_load_depth, plan, refs, tile)
    keys = functools.partial(_load_keys, plan, refs, tile)
    return visit_blocks(plan, tile, depth, keys, keys, step)


def wait_parts(plan: RowPlan, free: Any, step: jax.Array) -> None:
    """Waits until all warpgroups have read the previous block in this step's stage, if any."""
    plgpu = common.mosaic()
    stages, count = plan.config.stages, plan.config.warpgroups

    def wait():
        for warpgroup in range(count):
            plgpu.barrier_wait(free.at[rem(step, stages) * count + warpgroup])

    common.when(step >= stages, wait)


def drain_parts(plan: RowPlan, free: Any, steps: jax.Array) -> None:
    """Waits for every arrival, so that no barrier ends in the middle of a phase."""
    stages = plan.config.stages

    def wait(step, _):
        wait_parts(plan, free, step + stages)

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)


def load_rows(plan: RowPlan, tile: RowTile, sources: Any, full: Any) -> None:
    """Starts copying all warpgroups' rows; sources: (array [B, T, N · H], memory, its boxes)."""
    for warpgroup in range(plan.config.warpgroups):
        for source, rows, boxes in sources:
            own = rows.at[warpgroup], None if boxes is None else boxes.at[warpgroup]
            for piece, place in row_pieces(plan, tile, warpgroup, source, *own, own=False):
                common.mosaic().copy_gmem_to_smem(piece, place, full)


def _load_keys(
    plan: RowPlan, refs: RowRefs, tile: RowTile, i: jax.Array, step: jax.Array
) -> jax.Array:
    """The i-th sequence block of the tiles' walk; returns the next step."""
    plgpu = common.mosaic()
    config, stages = plan.config, plan.config.stages
    stage, block = rem(step, stages), tile.kv.nth(i)
    keys = common.ds(block * config.block_kv, config.block_kv)
    where, rows = (tile.batch, keys, tile.kv_head), common.ds(0, config.block_kv)
    wait_parts(plan, refs.k_free, step)
    k_ref, v_ref = refs.k_smem.at[stage, rows], refs.v_smem.at[stage, rows]
    plgpu.copy_gmem_to_smem(refs.key.at[where], k_ref, refs.k_full.at[stage])
    if plan.segments:
        ids = refs.key_segments.at[tile.batch, keys]
        plgpu.copy_gmem_to_smem(ids, refs.segment_smem.at[stage], refs.k_full.at[stage])
    wait_parts(plan, refs.v_free, step)
    plgpu.copy_gmem_to_smem(refs.value.at[where], v_ref, refs.v_full.at[stage])
    return step + 1


def _load_depth(
    plan: RowPlan, refs: RowRefs, tile: RowTile, run, block, step: jax.Array
) -> jax.Array:
    """A depth block of all warpgroups; returns the next step. `run`: the run's first block.

    A warpgroup's part of the stage is filled as soon as that warpgroup has read the depth block
    that was there. Where the stage held keys, all warpgroups must have read them.
    """
    plgpu = common.mosaic()
    config = plan.config
    stage = rem(step, config.stages)
    first, stop = slot_block(plan, refs.slots, tile, block)
    rings = (
        (refs.depth_key, refs.k_smem, refs.k_smem_boxes, refs.kd_full, refs.kd_box_full),
        (refs.depth_value, refs.v_smem, refs.v_smem_boxes, refs.vd_full, refs.vd_box_full),
    )
    own = block - run >= config.stages
    for ring, free in zip(rings, (refs.k_free, refs.v_free), strict=True):
        common.when(jnp.logical_not(own), functools.partial(wait_parts, plan, free, step))
        for warpgroup in range(config.warpgroups):
            part = stage * config.warpgroups + warpgroup
            common.when(own, functools.partial(plgpu.barrier_wait, free.at[part]))
            tokens = common.ds(unit(plan, tile, warpgroup)[0], plan.tokens)
            where = warpgroup, tokens
            box = functools.partial(_load_box, plan, tile, where, ring, stage, first)
            slots = functools.partial(_load_slots, plan, tile, where, ring, stage, first, stop)
            either(plan, stop - first, box, slots)
    return step + 1


def _load_box(plan: RowPlan, tile: RowTile, where: tuple, ring: tuple, stage, first) -> None:
    plgpu = common.mosaic()
    source, _, boxes, _, full = ring
    warpgroup, tokens = where
    plgpu.copy_gmem_to_smem(
        source.at[common.ds(first, plan.block_slots), tile.batch, tokens, tile.kv_head],
        boxes.at[stage, warpgroup],
        full.at[stage * plan.config.warpgroups + warpgroup],
    )


def _load_slots(
    plan: RowPlan, tile: RowTile, where: tuple, ring: tuple, stage, first, stop
) -> None:
    plgpu = common.mosaic()
    source, rows, _, full, _ = ring
    warpgroup, tokens = where
    for i in range(plan.block_slots):
        # Past the range the last visible slot is loaded again: uninitialized slots may be NaN.
        slot = jnp.minimum(first + i, stop - 1)
        row = warpgroup * plan.depth_keys + i * plan.tokens
        plgpu.copy_gmem_to_smem(
            source.at[slot, tile.batch, tokens, tile.kv_head],
            rows.at[stage, common.ds(row, plan.tokens)],
            full.at[stage * plan.config.warpgroups + warpgroup],
        )


# what a warpgroup reads


class RingBlock(NamedTuple):
    """One stage of the ring, as a warpgroup reads it."""

    key: Any
    value: Any
    wait_key: Callable[[], None]
    wait_value: Callable[[], None]
    key_free: Any
    value_free: Any

    @classmethod
    def at(
        cls, plan: RowPlan, refs: RowRefs, warpgroup, step, slots_left: jax.Array | None = None
    ) -> "RingBlock":
        """The stage of a sequence block or, with `slots_left`, of a depth block."""
        plgpu = common.mosaic()
        stage = rem(step, plan.config.stages)
        part = stage * plan.config.warpgroups + warpgroup
        rows = common.ds(0, plan.config.block_kv)
        if slots_left is not None:
            rows = common.ds(warpgroup * plan.depth_keys, plan.depth_keys)

        def waiter(full, slot_full, box_full):
            if slots_left is None:
                return functools.partial(plgpu.barrier_wait, full.at[stage])
            box, slots = (
                None
                if barriers is None
                else functools.partial(plgpu.barrier_wait, barriers.at[part])
                for barriers in (box_full, slot_full)
            )
            return functools.partial(either, plan, slots_left, box, slots)

        return cls(
            refs.k_smem.at[stage, rows],
            refs.v_smem.at[stage, rows],
            waiter(refs.k_full, refs.kd_full, refs.kd_box_full),
            waiter(refs.v_full, refs.vd_full, refs.vd_box_full),
            refs.k_free.at[part],
            refs.v_free.at[part],
        )


def row_segments(plan: RowPlan, refs: RowRefs, tile: RowTile, token: jax.Array) -> jax.Array | None:
    """The segment of every row of a warpgroup's tile; None: the call has no segments."""
    if not plan.segments:
        return None
    plgpu = common.mosaic()
    ids = refs.query_segments.at[tile.batch, lax.div(token, jnp.int32(plan.tokens))]
    return plgpu.load(ids, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def depth_mask(plan: RowPlan, row_segment: jax.Array | None, slots_left: jax.Array) -> jax.Array:
    """A row sees the slots of its own token, unless it is padding."""
    shape = (ROWS, plan.depth_keys)
    token, column = row_tokens(plan, iota(shape, 0)), iota(shape, 1)
    own = column & (plan.tokens - 1)  # the number of tokens is a power of two
    mask = (token == own) & (column < slots_left * plan.tokens)
    if row_segment is not None:
        mask &= spread(row_segment, shape, 0) != NO_SEGMENT
    return mask


def key_mask(plan: RowPlan, token, row_segment, start: jax.Array, segments: Any) -> jax.Array:
    """Which of the keys from `start` on each row sees; `token`: the tile's first."""
    shape = (ROWS, plan.config.block_kv)
    column = iota(shape, 1) + start
    mask = None
    if plan.causal:
        mask = column <= row_tokens(plan, iota(shape, 0)) + token
    if not plan.causal or plan.kv_len < plan.q_len:  # else no real query sees past the end
        inside = column < plan.kv_len
        mask = inside if mask is None else mask & inside
    if row_segment is not None:
        ids = load_columns(segments)
        mask &= spread(row_segment, shape, 0) == spread(ids, shape, 1)
    return mask
