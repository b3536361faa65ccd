"""The two roles of the fused forward's warpgroups: one loads, the others attend."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.ring import (
    RingBlock,
    RowRefs,
    drain_parts,
    key_mask,
    load_blocks,
    load_rows,
    ring_memory,
    row_memory,
    row_pieces,
    row_segments,
    visit_blocks,
)
from pallas_kernels.mosaic_gpu.row_tiles import RowPlan, RowTile, locate, rounds, slot_block, unit
from pallas_kernels.mosaic_gpu.wgmma import (
    LOG2E,
    NO_SEGMENT,
    ROWS,
    TOKEN_ALIGNMENT,
    accumulate,
    div,
    drain,
    i32,
    iota,
    rem,
    spread,
    wait_free,
)

# Not -inf: exp2(-inf - LOWEST) is 0 and exp2(LOWEST - LOWEST) is 1, so that rows that have seen
# nothing yet need no guard against -inf - (-inf).
_LOWEST = float(jnp.finfo(jnp.float32).min)


def scratch(plan: RowPlan) -> dict[str, Any]:
    """Shared memory and barriers, by the names of `RowRefs`."""
    plgpu = common.mosaic()
    config = plan.config
    memory = ring_memory(plan) | {
        "q_smem": row_memory(plan, plan.dtype, 2, config.warpgroups),
        "lse_smem": plgpu.SMEM((config.warpgroups, ROWS), jnp.float32),
        "q_full": common.barrier(config.warpgroups * plan.row_copies, 2),
        "q_free": common.barrier(config.warpgroups, 2),
    }
    if config.turns:
        memory["turn"] = common.barrier(1, config.warpgroups)
    return memory


# the warpgroup that loads


def load_tiles(plan: RowPlan, refs: RowRefs, blocks: int) -> None:
    """Every load of every tile of this thread block, in the ring's order."""
    plgpu = common.mosaic()
    config = plan.config
    count, nth = rounds(plan, blocks)
    if config.turns:
        plgpu.barrier_arrive(refs.turn.at[0])  # the first warpgroup starts

    def load_tile(r, step):
        tile = locate(plan, refs.slots, refs.ranges, nth(r))
        wait_free(refs.q_free, r, 2)
        buffer = rem(r, 2)
        boxes = None if refs.q_smem_boxes is None else refs.q_smem_boxes.at[buffer]
        query = refs.query, refs.q_smem.at[buffer], boxes
        load_rows(plan, tile, [query], refs.q_full.at[buffer])
        return load_blocks(plan, refs, tile, step)

    steps = lax.fori_loop(0, count, load_tile, i32(0))
    drain_parts(plan, refs.k_free, steps)
    drain_parts(plan, refs.v_free, steps)
    drain(refs.q_free, count, 2)


# the warpgroups that attend


class _ForwardWorker(NamedTuple):
    """What stays the same over a warpgroup's tile."""

    plan: RowPlan
    refs: RowRefs
    warpgroup: jax.Array
    tile: RowTile
    query: Any
    query_boxes: Any
    token: jax.Array  # the tile's first
    row_segment: jax.Array | None

    def take_turn(self) -> None:
        if self.plan.config.turns:
            common.mosaic().barrier_wait(self.refs.turn.at[self.warpgroup])

    def pass_turn(self) -> None:
        if self.plan.config.turns:
            following = rem(self.warpgroup + 1, self.plan.config.warpgroups)
            common.mosaic().barrier_arrive(self.refs.turn.at[following])


def attend_tiles(plan: RowPlan, refs: RowRefs, blocks: int, warpgroup: jax.Array) -> None:
    """A compute warpgroup: its tile of every thread-block tile."""
    plgpu = common.mosaic()
    count, nth = rounds(plan, blocks)

    def attend_tile(r, step):
        tile = locate(plan, refs.slots, refs.ranges, nth(r))
        buffer = rem(r, 2)
        token, _ = unit(plan, tile, warpgroup)
        row_segment = row_segments(plan, refs, tile, token)
        query, boxes = (
            None if x is None else x.at[buffer, warpgroup] for x in (refs.q_smem, refs.q_smem_boxes)
        )
        worker = _ForwardWorker(plan, refs, warpgroup, tile, query, boxes, token, row_segment)
        plgpu.barrier_wait(refs.q_full.at[buffer])
        plain, edge = (functools.partial(_key_step, worker, masked=m) for m in (False, True))
        depth = functools.partial(_depth_step, worker)
        worker.take_turn()
        carry = visit_blocks(plan, tile, depth, plain, edge, (step, _empty_state(plan.head_dim)))
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


def _depth_step(worker: _ForwardWorker, _, i: jax.Array, carry):
    plan = worker.plan
    step, state = carry
    first, stop = slot_block(plan, worker.refs.slots, worker.tile, i)
    block = RingBlock.at(plan, worker.refs, worker.warpgroup, step, stop - first)
    mask = functools.partial(_own_token_mask, plan, worker.row_segment, stop - first)
    fold, unfold = (functools.partial(f, plan) for f in (_own_octet, _from_own_octet))
    return step + 1, _attend(worker, block, mask, state, fold, unfold)


def _key_step(worker: _ForwardWorker, i: jax.Array, carry, *, masked: bool):
    plan, segments = worker.plan, worker.refs.segment_smem
    step, state = carry
    if segments is not None:
        segments = segments.at[rem(step, plan.config.stages)]
    start = worker.tile.kv.nth(i) * plan.config.block_kv
    mask = functools.partial(key_mask, plan, worker.token, worker.row_segment, start, segments)
    block = RingBlock.at(plan, worker.refs, worker.warpgroup, step)
    return step + 1, _attend(worker, block, mask if masked else None, state)


def _attend(
    worker: _ForwardWorker,
    block: RingBlock,
    mask: Callable[[], jax.Array] | None,
    state: Any,
    fold: Callable = lambda x: x,
    unfold: Callable = lambda x: x,
):
    """Scores, softmax and weighted values of a block; the warpgroup has its turn before and after.

    fold, unfold: the columns that the softmax looks at, and its weights back in their columns.
    """
    plgpu = common.mosaic()
    scores = fold(_scores(worker, block))
    if mask is not None:
        scores = jnp.where(mask(), scores, -jnp.inf)
    plgpu.barrier_arrive(block.key_free)
    weights, (acc, row_max, row_sum) = _softmax(scores, worker.plan.scale * LOG2E, state)
    weights = unfold(weights.astype(worker.plan.dtype))
    acc, row_max, row_sum, weights = lax.optimization_barrier((acc, row_max, row_sum, weights))
    block.wait_value()
    worker.take_turn()
    acc = accumulate(acc, (weights, block.value))
    plgpu.barrier_arrive(block.value_free)
    return acc, row_max, row_sum


def _own_octet(plan: RowPlan, x: jax.Array) -> jax.Array:
    """[64, (slot, token)] to [64, (slot, token of the octet)], of the octet of each row's token.

    The other columns belong to other tokens and would be masked: the softmax skips them.
    """
    if plan.octets == 1:
        return x
    pieces = []
    for slot in range(plan.block_slots):
        octets = [_octet(x, slot * plan.octets + i) for i in range(plan.octets)]
        own = octets[0]
        for i in range(1, plan.octets):
            own = jnp.where(_is_own(plan, i), octets[i], own)
        pieces.append(own)
    return lax.concatenate(pieces, 1) if len(pieces) > 1 else pieces[0]


def _from_own_octet(plan: RowPlan, x: jax.Array) -> jax.Array:
    """Puts what `_own_octet` took back to its place, with zeros for the other tokens."""
    if plan.octets == 1:
        return x
    zero = jnp.zeros((), x.dtype)
    slots = [_octet(x, slot) for slot in range(plan.block_slots)]
    return lax.concatenate(
        [jnp.where(_is_own(plan, i), own, zero) for own in slots for i in range(plan.octets)], 1
    )


def _octet(x: jax.Array, index: int) -> jax.Array:
    start = index * TOKEN_ALIGNMENT
    return lax.slice(x, (0, start), (ROWS, start + TOKEN_ALIGNMENT))


def _is_own(plan: RowPlan, octet: int) -> jax.Array:
    """Whether a row's token is in that octet of the tile."""
    rows = iota((ROWS, TOKEN_ALIGNMENT), 0)
    return div(rows, TOKEN_ALIGNMENT * plan.heads) == octet


def _own_token_mask(
    plan: RowPlan, row_segment: jax.Array | None, slots_left: jax.Array
) -> jax.Array:
    """`depth_mask` of what `_own_octet` returns."""
    shape = (ROWS, plan.block_slots * TOKEN_ALIGNMENT)
    row, column = iota(shape, 0), iota(shape, 1)
    mask = ((row ^ column) & (TOKEN_ALIGNMENT - 1)) == 0
    mask &= column < slots_left * TOKEN_ALIGNMENT
    if row_segment is not None:
        mask &= spread(row_segment, shape, 0) != NO_SEGMENT
    return mask


def _scores(worker: _ForwardWorker, block: RingBlock) -> jax.Array:
    pl, plgpu = common.pallas(), common.mosaic()
    block.wait_key()

    def product(acc):
        plgpu.wgmma(acc, worker.query, block.key.transpose((1, 0)))
        worker.pass_turn()
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, block.key.shape[0]), jnp.float32))


def _softmax(scores: jax.Array, scale: float, state):
    """Online softmax in base 2: the weights of these keys, and the state rescaled to them."""
    acc, row_max, row_sum = state
    new_max = jnp.maximum(row_max, scores.max(axis=1) * scale)
    rescale = jnp.exp2(row_max - new_max)
    weights = jnp.exp2(scores * scale - spread(new_max, scores.shape, 0))
    acc *= spread(rescale, acc.shape, 0)
    row_sum = row_sum * rescale + weights.sum(axis=1)
    return weights, (acc, new_max, row_sum)


def _store(worker: _ForwardWorker, state) -> None:
    """Writes o, through the query's buffer (its last product is done), and lse, in tile order."""
    plgpu = common.mosaic()
    plan, refs, tile = worker.plan, worker.refs, worker.tile
    acc, row_max, row_sum = state
    lse_ref = refs.lse_smem.at[worker.warpgroup]
    seen = row_sum > 0
    inverse = jnp.where(seen, 1 / jnp.where(seen, row_sum, 1.0), 0.0)
    worker.query[...] = (acc * spread(inverse, acc.shape, 0)).astype(plan.dtype)
    lse_ref[...] = jnp.where(seen, row_max / LOG2E + jnp.log(row_sum), -jnp.inf)
    plgpu.commit_smem()
    rows = worker.query, worker.query_boxes
    for piece, place in row_pieces(plan, tile, worker.warpgroup, refs.out, *rows):
        plgpu.copy_smem_to_gmem(place, piece, commit_group=False)
    number = tile.place * plan.config.warpgroups + worker.warpgroup
    target = refs.lse.at[tile.batch, tile.kv_head, number]
    plgpu.copy_smem_to_gmem(lse_ref, target, commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
