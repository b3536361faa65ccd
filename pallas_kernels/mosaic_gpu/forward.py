"""Fused forward of Mixture-of-Depths Attention for Hopper (Pallas Mosaic GPU, JAX >= 0.11).

One kernel, one online softmax: a tile of 64 rows first reads the depth slots of its own tokens,
then the sequence keys. A row is a (head, token) pair: a tile holds `tile_heads` query heads of one
KV head times 64 / `tile_heads` tokens, so K and V, and a token's depth K and V, are loaded once for
all of them. Depth scores are a dense product of the tile with the slots of all its tokens, of which
only the row's own token is kept: tensor cores do 64 S 4 H FLOP per token and KV head, which costs
less than reading the slots.

One warpgroup issues TMA loads into a ring of stages; the others (two or three) each own a tile and
take turns on the tensor cores, so that one's softmax hides behind another's products. Depth blocks
and sequence blocks pass through the same ring: with `persistent`, the next tile's depth loads are
under way while the last tile computes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common

ROWS = 64  # of a tile: the M of one wgmma
TOKEN_ALIGNMENT = 8  # rows of a swizzled TMA tile; token axes are padded to it
LOG2E = math.log2(math.e)
# Not -inf: exp2(-inf - LOWEST) is 0 and exp2(LOWEST - LOWEST) is 1, so that rows that have seen
# nothing yet need no guard against -inf - (-inf).
L2_BYTES = 24 * 2**20  # of an H100's 50 MB and an H200's 60, what keys and values may take
_LOWEST = float(jnp.finfo(jnp.float32).min)
NO_SEGMENT = -(2**31)  # of a padding query: equals no key's segment


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes of the fused forward."""

    block_kv: int = 128  # keys of a ring stage
    stages: int = 2
    warpgroups: int = 2  # compute warpgroups, a tile each
    persistent: bool = True  # one thread block per multiprocessor, looping over tiles
    turns: bool = True  # warpgroups take turns on the tensor cores
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
        if self.block_kv % 64 or self.stages < 2 or self.warpgroups not in (1, 2, 3):
            raise ValueError(
                "config needs block_kv a multiple of 64, stages >= 2 and 1 to 3 warpgroups,"
                f" got {self}"
            )
        common.check_smem(self.shared_memory(head_dim), "fused forward")


def forward_config(head_dim: int) -> ForwardConfig:
    """The tile sizes for a head size."""
    return ForwardConfig(stages=2 if head_dim == 128 else 4)


def tile_heads(group: int) -> int:
    """Query heads of one KV head in a tile: a power of two, at most 8, that divides the group.

    With 8 heads a tile has 8 tokens, the fewest rows a swizzled TMA tile can have. Larger groups
    are several tiles, of which neighbours read the same depth slots at the same time.
    """
    return math.gcd(group, 8)


class _Plan(NamedTuple):
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
    def heads(self) -> int:
        return tile_heads(self.group)

    @property
    def tokens(self) -> int:
        return ROWS // self.heads

    @property
    def subgroups(self) -> int:
        """Tiles that share a token tile."""
        return self.group // self.heads

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
    def boxes(self) -> bool:
        """Whether whole depth blocks come in one piece: [slots, tokens, H] is then laid out like
        the rows of a ring stage. The interpreter cannot see one memory as two arrays.
        """
        config = self.config
        fits = self.head_dim == 64 and self.depth_keys * config.warpgroups == config.stage_keys
        return fits and config.slot_boxes and self.slots > 0 and not platforms.interpreted()

    @property
    def depth_keys(self) -> int:
        """(slot, token) pairs of a warpgroup's depth block: a part of a ring stage."""
        return self.config.stage_keys // self.config.warpgroups // ROWS * ROWS

    @property
    def block_slots(self) -> int:
        return self.depth_keys // self.tokens


class _Refs(NamedTuple):
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
    segment_smem: Any = None
    lse_smem: Any = None
    q_full: Any = None
    q_free: Any = None
    k_full: Any = None
    v_full: Any = None
    kd_full: Any = None
    vd_full: Any = None
    kd_box_full: Any = None
    vd_box_full: Any = None
    k_smem_boxes: Any = None
    v_smem_boxes: Any = None
    k_free: Any = None
    v_free: Any = None
    turn: Any = None


class _Tile(NamedTuple):
    """Where a thread block's tile lies, and which blocks it reads; int32 scalars."""

    batch: jax.Array
    kv_head: jax.Array
    place: jax.Array  # among the tiles of its KV head
    depth_first: jax.Array  # blocks of the first range of slots
    depth_blocks: jax.Array
    kv_start: jax.Array  # sequence blocks [kv_start, kv_stop), masked from kv_masked on
    kv_masked: jax.Array
    kv_stop: jax.Array


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def i32(x) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def div(x: jax.Array, y: int) -> jax.Array:
    return lax.div(x, i32(y))


def rem(x: jax.Array, y: int) -> jax.Array:
    return lax.rem(x, i32(y))


def divmod_i32(x: jax.Array, y: int) -> tuple[jax.Array, jax.Array]:
    return div(x, y), rem(x, y)


def heads_together(count: int, length: int, head_dim: int) -> int:
    """How many of `count` KV heads are worked on side by side: as many as the L2 cache holds.

    Tiles of several heads, sorted by their work, leave the multiprocessors less to wait for.
    """
    fit = max(1, L2_BYTES // max(1, 2 * length * head_dim * 2))
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= fit)


def _unit(plan: _Plan, tile: _Tile, warpgroup) -> tuple[jax.Array, jax.Array]:
    """First token and first query head of a warpgroup's tile."""
    unit = tile.place * plan.config.warpgroups + warpgroup
    token = div(unit, plan.subgroups) * plan.tokens
    head = tile.kv_head * plan.group + rem(unit, plan.subgroups) * plan.heads
    return token, head


def _num_rounds(plan: _Plan, blocks: int) -> tuple[jax.Array, Callable]:
    """How many tiles this thread block computes, and the number of its r-th.

    Tiles go from heavy to light; every second round is dealt in reverse, so that no block gets the
    heavier one each time.
    """
    block = lax.axis_index("block")

    def nth(r: jax.Array) -> jax.Array:
        place = jnp.where(rem(r, 2) == 1, blocks - 1 - block, block)
        return r * blocks + place

    full, rest = divmod(plan.tiles, blocks)
    if not rest:
        return i32(full), nth
    place = blocks - 1 - block if full % 2 else block
    return full + (place < rest).astype(jnp.int32), nth


def _locate(plan: _Plan, refs: _Refs, number: jax.Array) -> _Tile:
    together = plan.heads_together
    span, place = divmod_i32(number, plan.steps_per_head * together)
    index, head = divmod_i32(place, together)
    head = span * together + head
    if plan.causal:
        index = plan.steps_per_head - 1 - index
    batch, kv_head = divmod_i32(head, plan.kv_heads)
    zero = i32(0)
    tile = _Tile(batch, kv_head, index, zero, zero, zero, zero, zero)
    if plan.slots:
        size = plan.block_slots
        first = div(refs.slots[1] - refs.slots[0] + (size - 1), size)
        second = div(refs.slots[3] - refs.slots[2] + (size - 1), size)
        tile = tile._replace(depth_first=first, depth_blocks=first + second)
    if plan.kv_len:
        tile = tile._replace(**_kv_blocks(plan, refs, tile))
    return tile


def _kv_blocks(plan: _Plan, refs: _Refs, tile: _Tile) -> dict[str, jax.Array]:
    block_kv = plan.config.block_kv
    visible_to_all = visible = i32(plan.kv_len)
    if plan.causal:
        first = _unit(plan, tile, 0)[0]
        last = _unit(plan, tile, plan.config.warpgroups - 1)[0] + (plan.tokens - 1)
        visible_to_all = jnp.minimum(first + 1, visible)
        visible = jnp.minimum(last + 1, visible)
    start, masked = i32(0), div(visible_to_all, block_kv)
    stop = div(visible + (block_kv - 1), block_kv)
    if plan.segments:
        start = jnp.minimum(refs.ranges[tile.batch, tile.place, 0], stop)
        stop = jnp.minimum(refs.ranges[tile.batch, tile.place, 1], stop)
        masked = start  # any block may hold a foreign key
    return {"kv_start": start, "kv_masked": masked, "kv_stop": stop}


def _slot_block(plan: _Plan, refs: _Refs, tile: _Tile, block: jax.Array):
    """First slot of a depth block, and the end of the range it lies in."""
    second = block >= tile.depth_first
    offset = jnp.where(second, block - tile.depth_first, block) * plan.block_slots
    first = jnp.where(second, refs.slots[2], refs.slots[0]) + offset
    return first, jnp.where(second, refs.slots[3], refs.slots[1])


def _either(plan: _Plan, slots_left, whole: Callable, part: Callable) -> None:
    """`whole` for a depth block that is loaded in one piece, `part` for one slot by slot."""
    if not plan.boxes:
        part()
        return
    common.when(slots_left >= plan.block_slots, whole)
    common.when(slots_left < plan.block_slots, part)


def _load_tiles(plan: _Plan, refs: _Refs, blocks: int) -> None:
    """The memory warpgroup: every load of every tile of this thread block, in the ring's order."""
    pl, plgpu = common.pallas(), common.mosaic()
    stages = plan.config.stages
    rounds, nth = _num_rounds(plan, blocks)

    def acquire(barriers, step):
        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(barriers.at[rem(step, stages)])

    def load_slots(first, stop, stage, tile, ring):
        source, name, single, _ = ring
        for warpgroup in range(plan.config.warpgroups):
            token, _ = _unit(plan, tile, warpgroup)
            for i in range(plan.block_slots):
                # Past the range the last visible slot again: what nobody wrote may be NaN.
                slot = jnp.minimum(first + i, stop - 1)
                row = warpgroup * plan.depth_keys + i * plan.tokens
                plgpu.copy_gmem_to_smem(
                    source.at[slot, tile.batch, common.ds(token, plan.tokens), tile.kv_head],
                    getattr(refs, name).at[stage, common.ds(row, plan.tokens)],
                    single.at[stage],
                )

    def load_box(first, stage, tile, ring):
        source, name, _, box = ring
        for warpgroup in range(plan.config.warpgroups):
            token, _ = _unit(plan, tile, warpgroup)
            slots, tokens = common.ds(first, plan.block_slots), common.ds(token, plan.tokens)
            plgpu.copy_gmem_to_smem(
                source.at[slots, tile.batch, tokens, tile.kv_head],
                getattr(refs, name + "_boxes").at[stage, warpgroup],
                box.at[stage],
            )

    def load_depth(block, step, tile):
        first, stop = _slot_block(plan, refs, tile, block)
        stage = rem(step, stages)
        for ring, free in (
            ((refs.depth_key, "k_smem", refs.kd_full, refs.kd_box_full), refs.k_free),
            ((refs.depth_value, "v_smem", refs.vd_full, refs.vd_box_full), refs.v_free),
        ):
            acquire(free, step)
            _either(
                plan,
                stop - first,
                functools.partial(load_box, first, stage, tile, ring),
                functools.partial(load_slots, first, stop, stage, tile, ring),
            )
        return step + 1

    def load_kv(block, step, tile):
        stage = rem(step, stages)
        keys = common.ds(block * plan.config.block_kv, plan.config.block_kv)
        acquire(refs.k_free, step)
        where, rows = (tile.batch, keys, tile.kv_head), common.ds(0, plan.config.block_kv)
        k_ref, v_ref = refs.k_smem.at[stage, rows], refs.v_smem.at[stage, rows]
        plgpu.copy_gmem_to_smem(refs.key.at[where], k_ref, refs.k_full.at[stage])
        if plan.segments:
            plgpu.copy_gmem_to_smem(
                refs.key_segments.at[tile.batch, keys],
                refs.segment_smem.at[stage],
                refs.k_full.at[stage],
            )
        acquire(refs.v_free, step)
        plgpu.copy_gmem_to_smem(refs.value.at[where], v_ref, refs.v_full.at[stage])
        return step + 1

    def load_tile(r, step):
        tile = _locate(plan, refs, nth(r))
        buffer = rem(r, 2)

        @pl.when(r >= 2)
        def _():
            plgpu.barrier_wait(refs.q_free.at[buffer])

        for warpgroup in range(plan.config.warpgroups):
            token, head = _unit(plan, tile, warpgroup)
            for i in range(plan.heads):
                plgpu.copy_gmem_to_smem(
                    refs.query.at[tile.batch, common.ds(token, plan.tokens), head + i],
                    refs.q_smem.at[buffer, warpgroup, common.ds(i * plan.tokens, plan.tokens)],
                    refs.q_full.at[buffer],
                )
        if plan.slots:
            step = lax.fori_loop(
                0, tile.depth_blocks, functools.partial(load_depth, tile=tile), step
            )
        if plan.kv_len:
            step = lax.fori_loop(
                tile.kv_start, tile.kv_stop, functools.partial(load_kv, tile=tile), step
            )
        return step

    def drain(step, _):
        plgpu.barrier_wait(refs.k_free.at[rem(step, stages)])
        plgpu.barrier_wait(refs.v_free.at[rem(step, stages)])

    def drain_query(r, _):
        plgpu.barrier_wait(refs.q_free.at[rem(r, 2)])

    # Every arrival is waited for: no barrier is left in the middle of a phase.
    steps = lax.fori_loop(0, rounds, load_tile, i32(0))
    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)
    lax.fori_loop(jnp.maximum(rounds - 2, 0), rounds, drain_query, None)


def wgmma_iota(shape: tuple[int, int], axis: int) -> jax.Array:
    plgpu = common.mosaic()
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def spread(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [axis])


def _depth_mask(plan: _Plan, slots_left: jax.Array, row_segment) -> jax.Array:
    """A row sees the slots of its own token, unless it is padding."""
    shape = (ROWS, plan.depth_keys)
    row, column = wgmma_iota(shape, 0), wgmma_iota(shape, 1)
    last = plan.tokens - 1  # the number of tokens is a power of two
    mask = ((row & last) == (column & last)) & (column < slots_left * plan.tokens)
    if row_segment is not None:
        mask &= spread(row_segment, shape, 0) != NO_SEGMENT
    return mask


def _kv_mask(plan: _Plan, token: jax.Array, start: jax.Array, row_segment, segment_ref):
    plgpu = common.mosaic()
    shape = (ROWS, plan.config.block_kv)
    column = wgmma_iota(shape, 1) + start
    mask = column < plan.kv_len
    if plan.causal:
        mask &= column <= (wgmma_iota(shape, 0) & (plan.tokens - 1)) + token
    if row_segment is not None:
        segment = plgpu.load(segment_ref, layout=plgpu.Layout.WGMMA.reduce(0))
        mask &= spread(row_segment, shape, 0) == spread(segment, shape, 1)
    return mask


def _softmax_step(scores, mask, scale: float, state):
    """Online softmax in base 2: the weights of this block, and the state rescaled to them."""
    acc, row_max, row_sum = state
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    new_max = jnp.maximum(row_max, scores.max(axis=1) * scale)
    rescale = jnp.exp2(row_max - new_max)
    weights = jnp.exp2(scores * scale - spread(new_max, scores.shape, 0))
    acc *= spread(rescale, acc.shape, 0)
    row_sum = row_sum * rescale + weights.sum(axis=1)
    return weights, (acc, new_max, row_sum)


def accumulate(total: jax.Array, a: jax.Array, b: Any) -> jax.Array:
    """total + a @ b by wgmma; a in registers, b in shared memory."""
    if platforms.interpreted():  # which multiplies references only
        return total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return common.multiply_add(total, a, b)


class _Block(NamedTuple):
    """One block of keys in the ring, as a warpgroup reads it."""

    key: Any
    value: Any
    wait_key: Callable[[], None]
    wait_value: Callable[[], None]
    key_free: Any
    value_free: Any


def _attend_block(plan: _Plan, q_ref, block: _Block, mask_fn, state, take_turn, pass_turn):
    """Scores, softmax, weighted values. Enters and leaves with this warpgroup's turn taken."""
    pl, plgpu = common.pallas(), common.mosaic()
    block.wait_key()

    def product(acc_ref):
        plgpu.wgmma(acc_ref, q_ref, block.key.transpose((1, 0)))
        pass_turn()
        return acc_ref[...]

    scores = pl.run_scoped(product, plgpu.ACC((ROWS, block.key.shape[0]), jnp.float32))
    mask = None if mask_fn is None else mask_fn()
    plgpu.barrier_arrive(block.key_free)
    weights, (acc, row_max, row_sum) = _softmax_step(scores, mask, plan.scale * LOG2E, state)
    acc, row_max, row_sum, weights = lax.optimization_barrier(
        (acc, row_max, row_sum, weights.astype(plan.dtype))
    )
    block.wait_value()
    take_turn()

    acc = accumulate(acc, weights, block.value)
    plgpu.barrier_arrive(block.value_free)
    return acc, row_max, row_sum


def _attend_tiles(plan: _Plan, refs: _Refs, blocks: int, warpgroup: jax.Array) -> None:
    """A compute warpgroup: its tile of every thread-block tile."""
    plgpu = common.mosaic()
    config = plan.config
    rounds, nth = _num_rounds(plan, blocks)

    def take_turn():
        if config.turns:
            plgpu.barrier_wait(refs.turn.at[warpgroup])

    def pass_turn():
        if config.turns:
            plgpu.barrier_arrive(refs.turn.at[rem(warpgroup + 1, config.warpgroups)])

    def ring(step, rows, slots_left=None) -> _Block:
        """A block of the sequence, or with `slots_left` one of depth slots."""
        stage = rem(step, config.stages)

        def wait(name):
            plgpu.barrier_wait(getattr(refs, name).at[stage])

        def wait_for(name):
            if slots_left is None:
                wait(name + "_full")
            else:
                box, single = name + "d_box_full", name + "d_full"
                _either(plan, slots_left, lambda: wait(box), lambda: wait(single))

        return _Block(
            refs.k_smem.at[stage, rows],
            refs.v_smem.at[stage, rows],
            lambda: wait_for("k"),
            lambda: wait_for("v"),
            refs.k_free.at[stage],
            refs.v_free.at[stage],
        )

    def attend_tile(r, step):
        tile = _locate(plan, refs, nth(r))
        buffer = rem(r, 2)
        token, _ = _unit(plan, tile, warpgroup)
        q_ref = refs.q_smem.at[buffer, warpgroup]
        row_segment = None
        if plan.segments:
            row_segment = plgpu.load(
                refs.query_segments.at[tile.batch, div(token, plan.tokens)],
                layout=plgpu.Layout.WGMMA.reduce(1),
                optimized=False,
            )
        plgpu.barrier_wait(refs.q_full.at[buffer])
        attend = functools.partial(_attend_block, take_turn=take_turn, pass_turn=pass_turn)

        def depth_step(block, carry):
            step, state = carry
            first, stop = _slot_block(plan, refs, tile, block)
            rows = common.ds(warpgroup * plan.depth_keys, plan.depth_keys)

            def mask():
                return _depth_mask(plan, stop - first, row_segment)

            return step + 1, attend(plan, q_ref, ring(step, rows, stop - first), mask, state)

        def kv_step(block, carry, masked: bool):
            step, state = carry
            segment_ref = refs.segment_smem.at[rem(step, config.stages)] if plan.segments else None

            def mask():
                return _kv_mask(plan, token, block * config.block_kv, row_segment, segment_ref)

            rows = common.ds(0, config.block_kv)
            return step + 1, attend(plan, q_ref, ring(step, rows), mask if masked else None, state)

        take_turn()
        carry = (step, _empty_state(plan.head_dim))
        if plan.slots:
            carry = lax.fori_loop(0, tile.depth_blocks, depth_step, carry)
        if plan.kv_len:
            if not plan.segments:
                plain = functools.partial(kv_step, masked=False)
                carry = lax.fori_loop(tile.kv_start, tile.kv_masked, plain, carry)
            edge = functools.partial(kv_step, masked=True)
            carry = lax.fori_loop(tile.kv_masked, tile.kv_stop, edge, carry)
        pass_turn()
        step, state = carry
        _store(plan, refs, tile, state, q_ref, refs.lse_smem.at[warpgroup], warpgroup)
        plgpu.barrier_arrive(refs.q_free.at[buffer])
        return step

    lax.fori_loop(0, rounds, attend_tile, i32(0))
    common.when(warpgroup == 0, take_turn)  # the last warpgroup passed its turn once more


def _empty_state(head_dim: int):
    plgpu = common.mosaic()

    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    rows = plgpu.Layout.WGMMA.reduce(1)
    return (
        full((ROWS, head_dim), 0, plgpu.Layout.WGMMA),
        full((ROWS,), _LOWEST, rows),
        full((ROWS,), 0, rows),
    )


def _store(plan: _Plan, refs: _Refs, tile: _Tile, state, o_ref, lse_ref, warpgroup) -> None:
    """o over the query's buffer, which nobody reads any more; lse as it lies in the tile."""
    plgpu = common.mosaic()
    acc, row_max, row_sum = state
    seen = row_sum > 0
    inverse = jnp.where(seen, 1 / jnp.where(seen, row_sum, 1.0), 0.0)
    o_ref[...] = (acc * spread(inverse, acc.shape, 0)).astype(plan.dtype)
    lse_ref[...] = jnp.where(seen, row_max / LOG2E + jnp.log(row_sum), -jnp.inf)
    plgpu.commit_smem()
    token, head = _unit(plan, tile, warpgroup)
    for i in range(plan.heads):
        plgpu.copy_smem_to_gmem(
            o_ref.at[common.ds(i * plan.tokens, plan.tokens)],
            refs.out.at[tile.batch, common.ds(token, plan.tokens), head + i],
            commit_group=False,
        )
    unit = tile.place * plan.config.warpgroups + warpgroup
    plgpu.copy_smem_to_gmem(
        lse_ref, refs.lse.at[tile.batch, tile.kv_head, unit], commit_group=False
    )
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _scratch(plan: _Plan) -> dict[str, Any]:
    config, dtype = plan.config, plan.dtype
    plgpu = common.mosaic()
    ring = common.smem((config.stages, config.stage_keys, plan.head_dim), dtype)
    ring_barrier = functools.partial(common.barrier, count=config.stages)
    copies = config.warpgroups * plan.block_slots
    scratch = {
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
        scratch["k_full"] = ring_barrier(2 if plan.segments else 1)
        scratch["v_full"] = ring_barrier(1)
    if plan.slots:
        scratch["kd_full"] = ring_barrier(copies)
        scratch["vd_full"] = ring_barrier(copies)
    if plan.boxes:
        shape = (config.stages, config.warpgroups, plan.block_slots, plan.tokens, plan.head_dim)
        both = plgpu.RefUnion(ring, common.smem(shape, dtype))
        scratch |= {"k_smem": both, "v_smem": both}
        scratch["kd_box_full"] = ring_barrier(config.warpgroups)
        scratch["vd_box_full"] = ring_barrier(config.warpgroups)
    if plan.kv_len and plan.segments:
        scratch["segment_smem"] = plgpu.SMEM((config.stages, config.block_kv), jnp.int32)
    if config.turns:
        scratch["turn"] = common.barrier(1, config.warpgroups)
    return scratch


def _run(plan: _Plan, inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    pl, plgpu = common.pallas(), common.mosaic()
    config = plan.config
    blocks = min(plan.tiles, _multiprocessors()) if config.persistent else plan.tiles
    names = list(inputs)

    def body(*operands, **scratch):
        *arrays, out, lse = operands
        if plan.boxes:
            for name in ("k_smem", "v_smem"):
                scratch[name], scratch[name + "_boxes"] = scratch[name]
        refs = _Refs(**dict.fromkeys(_Refs._fields[:9]) | dict(zip(names, arrays, strict=True)),
                     out=out, lse=lse, **scratch)  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < config.warpgroups)
        def _():
            plgpu.set_max_registers(compute_registers(config.warpgroups), action="increase")
            _attend_tiles(plan, refs, blocks, warpgroup)

        @pl.when(warpgroup == config.warpgroups)
        def _():
            plgpu.set_max_registers(memory_registers(config.warpgroups), action="decrease")
            if config.turns:
                plgpu.barrier_arrive(refs.turn.at[0])
            _load_tiles(plan, refs, blocks)

    units = plan.steps_per_head * config.warpgroups
    query = inputs["query"]
    return common.launch(
        body,
        name="moda_forward",
        grid={"block": blocks},
        out_type=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((plan.batch, plan.kv_heads, units, ROWS), jnp.float32),
        ),
        scratch=_scratch(plan),
        threads=config.warpgroups + 1,
    )(*inputs.values())


def compute_registers(warpgroups: int) -> int:
    """Registers of a thread that computes, beside one warpgroup that loads."""
    return {1: 240, 2: 232, 3: 160}[warpgroups]


def memory_registers(warpgroups: int) -> int:
    return 32 if warpgroups == 3 else 40


def _multiprocessors() -> int:
    """Of the default device; an H100's or H200's 132 when compiling without one."""
    return getattr(jax.devices()[0], "core_count", None) or 132


def pad_tokens(x: jax.Array, axis: int) -> jax.Array:
    """The token axis padded with zeros to what TMA tiles need; a copy only where it must be."""
    missing = -x.shape[axis] % TOKEN_ALIGNMENT
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def _segment_rows(plan: _Plan, segments: jax.Array) -> jax.Array:
    """[B, token tiles, 64]: the segment of every row of a tile, padding made unequal to all."""
    tiles = cdiv(plan.steps_per_head * plan.config.warpgroups, plan.subgroups)
    ids = jnp.pad(segments, ((0, 0), (0, tiles * plan.tokens - segments.shape[1])))
    ids = jnp.where(ids == 0, NO_SEGMENT, ids).reshape(plan.batch, tiles, plan.tokens)
    return jnp.tile(ids, (1, 1, plan.heads))


def segment_bounds(tiles: jax.Array, others: jax.Array, block: int) -> jax.Array:
    """[B, tiles, 2]: first and last + 1 block of `others` that a tile may meet.

    Segments of rows in tiles [B, tiles, rows] against those of [B, length] in blocks, 0 being
    padding. By the smallest and largest segment on both sides: exact for packed documents, and
    never too narrow for any ids.
    """
    low, high = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min

    def extremes(x):
        return jnp.where(x == 0, low, x).min(-1), jnp.where(x == 0, high, x).max(-1)

    others = jnp.pad(others, ((0, 0), (0, -others.shape[1] % block)))
    others = others.reshape(*others.shape[:1], -1, block)
    (t_min, t_max), (o_min, o_max) = extremes(tiles), extremes(others)
    meet = (t_min[:, :, None] <= o_max[:, None]) & (o_min[:, None] <= t_max[:, :, None])
    some = meet.any(-1)
    first = jnp.where(some, meet.argmax(-1), 0)
    stop = jnp.where(some, others.shape[1] - meet[..., ::-1].argmax(-1), 0)
    return jnp.stack([first, stop], -1).astype(jnp.int32)


def _segment_ranges(plan: _Plan, segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """[B, thread-block tiles, 2]: the blocks of keys that a thread block's tiles may see."""
    count = plan.config.warpgroups
    tiles = cdiv(plan.steps_per_head * count, plan.subgroups)
    ids = jnp.pad(segments, ((0, 0), (0, tiles * plan.tokens - segments.shape[1])))
    units = jnp.arange(plan.steps_per_head * count) // plan.subgroups
    ids = ids.reshape(plan.batch, tiles, plan.tokens)[:, units]
    return segment_bounds(
        ids.reshape(plan.batch, plan.steps_per_head, -1), key_segments, plan.config.block_kv
    )


def attend(
    query: jax.Array,
    key: jax.Array | None,
    value: jax.Array | None,
    depth_key: jax.Array | None,
    depth_value: jax.Array | None,
    slots: jax.Array | None,
    *,
    scale: float,
    is_causal: bool,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    config: ForwardConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mixture-of-Depths Attention, forward (Zhu et al., arXiv 2603.15619, eq. 7-9).

    Args:
        query: [B, Tq, N, H], bfloat16 or float16, H 64 or 128. N / K may be anything; groups with
            a large power of two (up to 8) as a divisor share most loads.
        key, value: [B, Tk, K, H], or None for depth-only.
        depth_key, depth_value: [S, B, Tq, K, H], or None.
        slots: int32 [4], (start0, stop0, start1, stop1): two half-open, possibly empty ranges of
            visible slots. No other slot is read, except where Tq is not a multiple of 8: then the
            arrays are copied to pad them, but still no other slot enters a product.
        scale: factor of the scores.
        is_causal: whether query i sees only keys j <= i.
        query_segments, key_segments: [B, Tq], [B, Tk] int32; 0 is padding.
        config: tile sizes; None takes `forward_config`'s.

    Returns:
        o [B, Tq, N, H] in the query's dtype and lse [B, Tq, N] float32 (natural logarithm). A query
        that sees nothing gets o = 0 and lse = -inf.

    Raises:
        ValueError: the config does not fit the head size or the shared memory.
    """
    batch, q_len, num_heads, head_dim = query.shape
    config = forward_config(head_dim) if config is None else config
    config.check(head_dim)
    source = depth_key if key is None else key
    assert source is not None
    if scale <= 0:  # the kernel takes the largest score before it scales
        query, scale = (-query, -scale) if scale < 0 else (jnp.zeros_like(query), 1.0)
    kv_heads = source.shape[-2]
    plan = _Plan(
        config, batch, q_len, 0 if key is None else key.shape[1], kv_heads, num_heads // kv_heads,
        head_dim, query.dtype, scale, is_causal, query_segments is not None,
        0 if depth_key is None else depth_key.shape[0],
    )  # fmt: skip
    inputs = {"query": pad_tokens(query, 1)}
    if key is not None and value is not None:
        inputs |= {"key": pad_tokens(key, 1), "value": pad_tokens(value, 1)}
    if plan.slots:
        assert depth_key is not None
        assert depth_value is not None
        assert slots is not None
        inputs |= {"depth_key": pad_tokens(depth_key, 2), "depth_value": pad_tokens(depth_value, 2)}
        inputs["slots"] = slots
    if query_segments is not None:
        inputs["query_segments"] = _segment_rows(plan, query_segments)
        if key is not None:
            assert key_segments is not None
            inputs["key_segments"] = pad_tokens(key_segments, 1)
            inputs["ranges"] = _segment_ranges(plan, query_segments, key_segments)
    out, lse = _run(plan, inputs)
    return out[:, :q_len], _lse_by_token(plan, lse)


def _lse_by_token(plan: _Plan, lse: jax.Array) -> jax.Array:
    """[B, K, units, 64] as the tiles lie to [B, Tq, N]."""
    token_tiles = cdiv(plan.q_len, plan.tokens)
    lse = lse[:, :, : token_tiles * plan.subgroups].reshape(
        plan.batch, plan.kv_heads, token_tiles, plan.subgroups, plan.heads, plan.tokens
    )
    lse = lse.transpose(0, 2, 5, 1, 3, 4).reshape(plan.batch, token_tiles * plan.tokens, -1)
    return lse[:, : plan.q_len]
