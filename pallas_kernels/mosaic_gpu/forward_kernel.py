"""The two roles of the fused forward's warpgroups: one loads, the others attend.

The ring has a buffer of keys and one of values per stage. A sequence block fills a stage for all
warpgroups; a depth block gives each its own 64 (slot, token) rows, as their tokens differ.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.forward_tiles import Plan, Tile, locate, rounds, slot_block, unit
from pallas_kernels.mosaic_gpu.wgmma import (
    LOG2E,
    NO_SEGMENT,
    ROWS,
    accumulate,
    div,
    drain,
    i32,
    iota,
    load_columns,
    rem,
    spread,
    wait_free,
)

# Not -inf: exp2(-inf - LOWEST) is 0 and exp2(LOWEST - LOWEST) is 1, so that rows that have seen
# nothing yet need no guard against -inf - (-inf).
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Refs(NamedTuple):
    """What the kernel sees: global arrays, then shared memory and barriers."""

    query: Any
    key: Any
    value: Any
    depth_key: Any
    depth_value: Any
    slots: Any
    query_segments: Any
    key_segments: Any
    ranges: Any
    out: Any
    lse: Any
    q_smem: Any = None
    k_smem: Any = None
    v_smem: Any = None
    k_smem_boxes: Any = None  # the same memory as [stages, warpgroups, slots, tokens, H]
    v_smem_boxes: Any = None
    segment_smem: Any = None
    lse_smem: Any = None
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


def scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers, by the names of `Refs`."""
    plgpu = common.mosaic()
    config, dtype = plan.config, plan.dtype
    ring = common.smem((config.stages, config.stage_keys, plan.head_dim), dtype)
    ring_barrier = functools.partial(common.barrier, count=config.stages)
    slot_copies = config.warpgroups * plan.block_slots
    memory = {
        "q_smem": common.smem((2, config.warpgroups, ROWS, plan.head_dim), dtype),
        "k_smem": ring,
        "v_smem": ring,
        "lse_smem": plgpu.SMEM((config.warpgroups, ROWS), jnp.float32),
        "q_full": common.barrier(config.warpgroups * plan.heads, 2),
        "q_free": common.barrier(config.warpgroups, 2),
        "k_free": ring_barrier(config.warpgroups),
        "v_free": ring_barrier(config.warpgroups),
    }
    if plan.kv_len:
        memory |= {"k_full": ring_barrier(2 if plan.segments else 1), "v_full": ring_barrier(1)}
    if plan.slots:
        memory |= {"kd_full": ring_barrier(slot_copies), "vd_full": ring_barrier(slot_copies)}
    if plan.boxes:
        shape = (config.stages, config.warpgroups, plan.block_slots, plan.half_tokens)
        both = plgpu.RefUnion(ring, common.smem((*shape, plan.head_dim), dtype))
        memory |= {"k_smem": both, "v_smem": both}
        box = ring_barrier(config.warpgroups)
        memory |= {"kd_box_full": box, "vd_box_full": box}
    if plan.kv_len and plan.segments:
        memory["segment_smem"] = plgpu.SMEM((config.stages, config.block_kv), jnp.int32)
    if config.turns:
        memory["turn"] = common.barrier(1, config.warpgroups)
    return memory


def _either(plan: Plan, slots_left: jax.Array, whole: Callable, part: Callable) -> None:
    """`whole` for a depth block that is loaded in one piece, `part` for one slot by slot."""
    if not plan.boxes:
        part()
        return
    common.when(slots_left >= plan.block_slots, whole)
    common.when(slots_left < plan.block_slots, part)


# the warpgroup that loads


def load_tiles(plan: Plan, refs: Refs, blocks: int) -> None:
    """Every load of every tile of this thread block, in the ring's order."""
    plgpu = common.mosaic()
    config, stages = plan.config, plan.config.stages
    count, nth = rounds(plan, blocks)
    if config.turns:
        plgpu.barrier_arrive(refs.turn.at[0])  # the first warpgroup starts

    def load_kv(i, step, tile):
        stage, block = rem(step, stages), tile.kv.nth(i)
        keys = common.ds(block * config.block_kv, config.block_kv)
        where, rows = (tile.batch, keys, tile.kv_head), common.ds(0, config.block_kv)
        wait_free(refs.k_free, step, stages)
        k_ref, v_ref = refs.k_smem.at[stage, rows], refs.v_smem.at[stage, rows]
        plgpu.copy_gmem_to_smem(refs.key.at[where], k_ref, refs.k_full.at[stage])
        if plan.segments:
            ids = refs.key_segments.at[tile.batch, keys]
            plgpu.copy_gmem_to_smem(ids, refs.segment_smem.at[stage], refs.k_full.at[stage])
        wait_free(refs.v_free, step, stages)
        plgpu.copy_gmem_to_smem(refs.value.at[where], v_ref, refs.v_full.at[stage])
        return step + 1

    def load_tile(r, step):
        tile = locate(plan, refs.slots, refs.ranges, nth(r))
        wait_free(refs.q_free, r, 2)
        _load_query(plan, refs, tile, rem(r, 2))
        if plan.slots:
            load = functools.partial(_load_depth, plan, refs, tile)
            step = lax.fori_loop(0, tile.depth_blocks, load, step)
        if plan.kv_len:
            load = functools.partial(load_kv, tile=tile)
            step = lax.fori_loop(0, tile.kv.count, load, step)
        return step

    steps = lax.fori_loop(0, count, load_tile, i32(0))
    drain(refs.k_free, steps, stages)
    drain(refs.v_free, steps, stages)
    drain(refs.q_free, count, 2)


def _load_query(plan: Plan, refs: Refs, tile: Tile, buffer: jax.Array) -> None:
    plgpu = common.mosaic()
    for warpgroup in range(plan.config.warpgroups):
        token, head = unit(plan, tile, warpgroup)
        for i in range(plan.heads):
            plgpu.copy_gmem_to_smem(
                refs.query.at[tile.batch, common.ds(token, plan.tokens), head + i],
                refs.q_smem.at[buffer, warpgroup, common.ds(i * plan.tokens, plan.tokens)],
                refs.q_full.at[buffer],
            )


def _load_depth(plan: Plan, refs: Refs, tile: Tile, block: jax.Array, step: jax.Array):
    """A depth block of all warpgroups: one ring stage, or one for each half of the tokens."""
    stages = plan.config.stages
    first, stop = slot_block(plan, refs.slots, tile, block)
    rings = (
        (refs.depth_key, refs.k_smem, refs.k_smem_boxes, refs.kd_full, refs.kd_box_full),
        (refs.depth_value, refs.v_smem, refs.v_smem_boxes, refs.vd_full, refs.vd_box_full),
    )
    for half in range(plan.halves):
        stage = rem(step, stages)
        tokens = [
            common.ds(unit(plan, tile, w)[0] + half * plan.half_tokens, plan.half_tokens)
            for w in range(plan.config.warpgroups)
        ]
        for ring, free in zip(rings, (refs.k_free, refs.v_free), strict=True):
            wait_free(free, step, stages)
            box = functools.partial(_load_box, plan, tile, tokens, ring, stage, first)
            slots = functools.partial(_load_slots, plan, tile, tokens, ring, stage, first, stop)
            _either(plan, stop - first, box, slots)
        step += 1
    return step


def _load_box(plan: Plan, tile: Tile, tokens: list, ring: tuple, stage, first) -> None:
    plgpu = common.mosaic()
    source, _, boxes, _, full = ring
    slots = common.ds(first, plan.block_slots)
    for warpgroup, where in enumerate(tokens):
        plgpu.copy_gmem_to_smem(
            source.at[slots, tile.batch, where, tile.kv_head],
            boxes.at[stage, warpgroup],
            full.at[stage],
        )


def _load_slots(plan: Plan, tile: Tile, tokens: list, ring: tuple, stage, first, stop) -> None:
    plgpu = common.mosaic()
    source, rows, _, full, _ = ring
    for warpgroup, where in enumerate(tokens):
        for i in range(plan.block_slots):
            # Past the range the last visible slot again: what nobody wrote may be NaN.
            slot = jnp.minimum(first + i, stop - 1)
            row = warpgroup * plan.depth_keys + i * plan.half_tokens
            plgpu.copy_gmem_to_smem(
                source.at[slot, tile.batch, where, tile.kv_head],
                rows.at[stage, common.ds(row, plan.half_tokens)],
                full.at[stage],
            )


# the warpgroups that attend


class _Block(NamedTuple):
    """One stage of the ring, as a warpgroup reads it."""

    key: Any
    value: Any
    wait_key: Callable[[], None]
    wait_value: Callable[[], None]
    key_free: Any
    value_free: Any


class _Worker(NamedTuple):
    """What stays the same over a warpgroup's tile."""

    plan: Plan
    refs: Refs
    warpgroup: jax.Array
    tile: Tile
    query: Any
    token: jax.Array  # the tile's first
    row_segment: jax.Array | None

    def take_turn(self) -> None:
        if self.plan.config.turns:
            common.mosaic().barrier_wait(self.refs.turn.at[self.warpgroup])

    def pass_turn(self) -> None:
        if self.plan.config.turns:
            following = rem(self.warpgroup + 1, self.plan.config.warpgroups)
            common.mosaic().barrier_arrive(self.refs.turn.at[following])


def attend_tiles(plan: Plan, refs: Refs, blocks: int, warpgroup: jax.Array) -> None:
    """A compute warpgroup: its tile of every thread-block tile."""
    plgpu = common.mosaic()
    count, nth = rounds(plan, blocks)

    def attend_tile(r, step):
        tile = locate(plan, refs.slots, refs.ranges, nth(r))
        buffer = rem(r, 2)
        token, _ = unit(plan, tile, warpgroup)
        row_segment = None
        if plan.segments:
            ids = refs.query_segments.at[tile.batch, div(token, plan.tokens)]
            rows = plgpu.Layout.WGMMA.reduce(1)
            row_segment = plgpu.load(ids, layout=rows, optimized=False)
        query = refs.q_smem.at[buffer, warpgroup]
        worker = _Worker(plan, refs, warpgroup, tile, query, token, row_segment)
        plgpu.barrier_wait(refs.q_full.at[buffer])
        worker.take_turn()
        carry = (step, _empty_state(plan.head_dim))
        if plan.slots:
            carry = _depth_phase(worker, carry)
        if plan.kv_len:
            carry = _sequence_phase(worker, carry)
        worker.pass_turn()
        step, state = carry
        _store(worker, state)
        plgpu.barrier_arrive(refs.q_free.at[buffer])
        return step

    lax.fori_loop(0, count, attend_tile, i32(0))
    if plan.config.turns:  # the last warpgroup passed its turn once more
        common.when(warpgroup == 0, lambda: plgpu.barrier_wait(refs.turn.at[0]))


def _empty_state(head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    plgpu = common.mosaic()

    def rows(value):
        vector = jnp.full((ROWS,), value, jnp.float32)
        return plgpu.layout_cast(vector, plgpu.Layout.WGMMA.reduce(1))

    return common.zeros((ROWS, head_dim)), rows(_LOWEST), rows(0)


def _stage(worker: _Worker, step: jax.Array, slots_left: jax.Array | None = None) -> _Block:
    """The ring stage of a sequence block or, with `slots_left`, of a depth block."""
    plgpu = common.mosaic()
    plan, refs = worker.plan, worker.refs
    stage = rem(step, plan.config.stages)
    rows = common.ds(0, plan.config.block_kv)
    if slots_left is not None:
        rows = common.ds(worker.warpgroup * plan.depth_keys, plan.depth_keys)

    def waiter(full, slot_full, box_full):
        def wait(barriers):
            plgpu.barrier_wait(barriers.at[stage])

        if slots_left is None:
            return functools.partial(wait, full)
        box, slots = functools.partial(wait, box_full), functools.partial(wait, slot_full)
        return functools.partial(_either, plan, slots_left, box, slots)

    return _Block(
        refs.k_smem.at[stage, rows],
        refs.v_smem.at[stage, rows],
        waiter(refs.k_full, refs.kd_full, refs.kd_box_full),
        waiter(refs.v_full, refs.vd_full, refs.vd_box_full),
        refs.k_free.at[stage],
        refs.v_free.at[stage],
    )


def _depth_phase(worker: _Worker, carry):
    """Depth blocks, two ring stages at a time: fewer, longer steps keep the tensor cores busier.

    With 8 tokens a tile takes two blocks at once. With more, a block's stages hold the slots of one
    half of the tokens each: a row needs the scores of one of them only, so that half as many
    exponentials are computed.
    """
    plan, slots = worker.plan, worker.refs.slots
    blocks = worker.tile.depth_blocks

    def one(block, carry):
        step, state = carry
        first, stop = slot_block(plan, slots, worker.tile, block)
        stages = [_stage(worker, step + half, stop - first) for half in range(plan.halves)]
        masks = [functools.partial(_depth_mask, worker, stop - first)]
        return step + plan.halves, _attend(worker, stages, masks, state)

    def two(pair, carry):
        step, state = carry
        stages, masks = [], []
        for i in range(2):
            first, stop = slot_block(plan, slots, worker.tile, 2 * pair + i)
            stages.append(_stage(worker, step + i, stop - first))
            masks.append(functools.partial(_depth_mask, worker, stop - first))
        return step + 2, _attend(worker, stages, masks, state)

    if plan.halves == 2 or not plan.config.depth_pairs:
        return lax.fori_loop(0, blocks, one, carry)
    pairs = div(blocks, 2)
    carry = lax.fori_loop(0, pairs, two, carry)
    return lax.fori_loop(2 * pairs, blocks, one, carry)


def _sequence_phase(worker: _Worker, carry):
    tile, config = worker.tile, worker.plan.config

    def attend(i, carry, masked: bool):
        step, state = carry
        segments = worker.refs.segment_smem
        if segments is not None:
            segments = segments.at[rem(step, config.stages)]
        mask = functools.partial(_kv_mask, worker, tile.kv.nth(i) * config.block_kv, segments)
        return step + 1, _attend(worker, [_stage(worker, step)], [mask] if masked else [], state)

    plain, edge = (functools.partial(attend, masked=masked) for masked in (False, True))
    carry = lax.fori_loop(0, tile.kv.plain, plain, carry)
    return lax.fori_loop(tile.kv.plain, tile.kv.count, edge, carry)


def _depth_mask(worker: _Worker, slots_left: jax.Array) -> jax.Array:
    """A row sees the slots of its own token, unless it is padding."""
    plan = worker.plan
    shape = (ROWS, plan.depth_keys)
    row, column = iota(shape, 0), iota(shape, 1)
    last = plan.half_tokens - 1  # the number of tokens is a power of two
    mask = ((row & last) == (column & last)) & (column < slots_left * plan.half_tokens)
    if worker.row_segment is not None:
        mask &= spread(worker.row_segment, shape, 0) != NO_SEGMENT
    return mask


def _kv_mask(worker: _Worker, start: jax.Array, segments: Any) -> jax.Array:
    plan = worker.plan
    shape = (ROWS, plan.config.block_kv)
    column = iota(shape, 1) + start
    mask = column < plan.kv_len
    if plan.causal:
        mask &= column <= (iota(shape, 0) & (plan.tokens - 1)) + worker.token
    if worker.row_segment is not None:
        ids = load_columns(segments)
        mask &= spread(worker.row_segment, shape, 0) == spread(ids, shape, 1)
    return mask


def _attend(worker: _Worker, blocks: list[_Block], masks: Sequence[Callable[[], jax.Array]], state):
    """Scores, softmax, weighted values of the blocks. This warpgroup's turn: taken before, after.

    One mask for two blocks means that a row needs the scores of one of them, by its token.
    """
    plgpu = common.mosaic()
    scores = _scores(worker, blocks)
    merged = len(blocks) == 2 and len(masks) == 1
    if merged:
        early = (iota(scores[0].shape, 0) & worker.plan.half_tokens) == 0
        scores = [jnp.where(early, scores[0], scores[1])]
    if masks:
        visible = [mask() for mask in masks]
        scores = [jnp.where(m, s, -jnp.inf) for m, s in zip(visible, scores, strict=True)]
    for block in blocks:
        plgpu.barrier_arrive(block.key_free)
    weights, (acc, row_max, row_sum) = _softmax(scores, worker.plan.scale * LOG2E, state)
    if merged:
        weights = [jnp.where(early, weights[0], 0.0), jnp.where(early, 0.0, weights[0])]
    weights = [w.astype(worker.plan.dtype) for w in weights]
    acc, row_max, row_sum, weights = lax.optimization_barrier((acc, row_max, row_sum, weights))
    for block in blocks:
        block.wait_value()
    worker.take_turn()
    values = [block.value for block in blocks]
    acc = accumulate(acc, *zip(weights, values, strict=True))
    for block in blocks:
        plgpu.barrier_arrive(block.value_free)
    return acc, row_max, row_sum


def _scores(worker: _Worker, blocks: list[_Block]) -> list[jax.Array]:
    pl, plgpu = common.pallas(), common.mosaic()
    for block in blocks:
        block.wait_key()

    def products(*accs):
        for acc, block in zip(accs, blocks, strict=True):
            plgpu.wgmma(acc, worker.query, block.key.transpose((1, 0)))
        worker.pass_turn()
        return [acc[...] for acc in accs]

    shapes = [plgpu.ACC((ROWS, block.key.shape[0]), jnp.float32) for block in blocks]
    return pl.run_scoped(products, *shapes)


def _softmax(scores: list[jax.Array], scale: float, state):
    """Online softmax in base 2: the weights of these blocks, and the state rescaled to them."""
    acc, row_max, row_sum = state
    largest = functools.reduce(jnp.maximum, scores).max(axis=1)
    new_max = jnp.maximum(row_max, largest * scale)
    rescale = jnp.exp2(row_max - new_max)
    weights = [jnp.exp2(s * scale - spread(new_max, s.shape, 0)) for s in scores]
    acc *= spread(rescale, acc.shape, 0)
    row_sum = row_sum * rescale + functools.reduce(jnp.add, weights).sum(axis=1)
    return weights, (acc, new_max, row_sum)


def _store(worker: _Worker, state) -> None:
    """o over the query's buffer, which nobody reads any more; lse as it lies in the tile."""
    plgpu = common.mosaic()
    plan, refs, tile = worker.plan, worker.refs, worker.tile
    acc, row_max, row_sum = state
    lse_ref = refs.lse_smem.at[worker.warpgroup]
    seen = row_sum > 0
    inverse = jnp.where(seen, 1 / jnp.where(seen, row_sum, 1.0), 0.0)
    worker.query[...] = (acc * spread(inverse, acc.shape, 0)).astype(plan.dtype)
    lse_ref[...] = jnp.where(seen, row_max / LOG2E + jnp.log(row_sum), -jnp.inf)
    plgpu.commit_smem()
    token, head = unit(plan, tile, worker.warpgroup)
    for i in range(plan.heads):
        plgpu.copy_smem_to_gmem(
            worker.query.at[common.ds(i * plan.tokens, plan.tokens)],
            refs.out.at[tile.batch, common.ds(token, plan.tokens), head + i],
            commit_group=False,
        )
    number = tile.place * plan.config.warpgroups + worker.warpgroup
    target = refs.lse.at[tile.batch, tile.kv_head, number]
    plgpu.copy_smem_to_gmem(lse_ref, target, commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
