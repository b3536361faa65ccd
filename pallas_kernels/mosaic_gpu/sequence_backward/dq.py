"""The kernel for dq of the sequence and, fused, of the depth slots, with the slots' gradients.

Tiles are those of the forward: 64 rows, a KV head's query heads times a few tokens. A thread block
walks over the slots of its own tokens, then over the keys. Where a tile has all query heads of its
tokens, no other tile contributes to the gradients of their slots. The kernel then computes these
gradients from the same weights, and no second kernel reads rows and slots.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.depth import slot_warpgroup
from pallas_kernels.mosaic_gpu.depth.slot_warpgroup import depth_dq, depth_rows
from pallas_kernels.mosaic_gpu.ring import (
    RingBlock,
    RowRefs,
    depth_mask,
    drain_parts,
    either,
    key_mask,
    load_blocks,
    load_rows,
    ring_memory,
    row_memory,
    row_pieces,
    row_segments,
    split_unions,
    visit_blocks,
)
from pallas_kernels.mosaic_gpu.row_tiles import (
    RowPlan,
    RowTile,
    flat_heads,
    locate,
    slot_block,
    unit,
)
from pallas_kernels.mosaic_gpu.wgmma import (
    LOG2E,
    ROWS,
    accumulate,
    i32,
    rem,
    split_roles,
    spread,
    two_products,
)


class DqResults(NamedTuple):
    """What the kernel is to compute besides dq."""

    dq_dtype: Any
    slots_dtype: Any = None
    """Of the slots' gradients; None: they are not computed."""
    add: bool = False
    """Whether they are added to running gradients, which other slots keep."""


def dq_kernel(
    plan: RowPlan, inputs: dict[str, jax.Array], results: DqResults, running: tuple = ()
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """(dq [B, Tq, N, H], gradients of the depth keys and values or None).

    inputs: arrays by the names of `RowRefs`; lse (base 2; +inf: sees nothing) and delta as
    `rows_by_tile`. running: the gradients to add to, if `results.add`.
    """
    types = scratch(plan, results)
    query = inputs["query"]
    inputs = inputs | {name: flat_heads(inputs[name]) for name in ("query", "d_out")}
    if plan.depth_warpgroups:
        depth = ("depth_key", "depth_value")
        inputs |= {name: slot_warpgroup.flat(plan, inputs[name]) for name in depth}
    outputs = [jax.ShapeDtypeStruct(inputs["query"].shape, results.dq_dtype)]
    slots = ("d_depth_key", "d_depth_value") if results.slots_dtype is not None else ()
    if slots and not results.add:
        num_slots, batch, length = inputs["depth_key"].shape[:3]
        length += -length % plan.tokens
        flat = (num_slots, batch * length, plan.kv_heads * plan.head_dim)
        outputs += [jax.ShapeDtypeStruct(flat, results.slots_dtype)] * 2
    names = (*inputs, *slots, "out") if results.add else (*inputs, "out", *slots)

    def body(*operands, **memory):
        views = dict(zip(names, operands, strict=True))
        refs = RowRefs(**views, **split_unions(types, memory)).read_scalars()
        split_roles(
            plan.config.warpgroups,
            lambda warpgroup: _compute(plan, refs, results, warpgroup),
            lambda: _load(plan, refs),
            functools.partial(depth_dq, plan, refs) if plan.depth_warpgroups else None,
        )

    refs = [jax.new_ref(_flat(plan, x)) for x in running]
    new = common.launch(
        body,
        name="moda_sequence_dq",
        grid={"block": plan.tiles},
        out_type=outputs,
        scratch=types,
        threads=1 + plan.config.warpgroups * (2 if plan.depth_warpgroups else 1),
    )(*inputs.values(), *refs)
    dq = new[0].reshape(query.shape)
    if not slots:
        return dq, None
    grads = [jax.freeze(ref) for ref in refs] or new[1:]
    shape = (plan.slots, plan.batch, -1, plan.kv_heads, plan.head_dim)
    return dq, (grads[0].reshape(shape), grads[1].reshape(shape))


def _flat(plan: RowPlan, x: jax.Array) -> jax.Array:
    """[S, B, T, K, H] -> [S, B·T, K·H], which TMA's five dimensions can tile; T in whole tiles."""
    x = common.pad_tokens(x, 2, plan.tokens)
    return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4])


def scratch(plan: RowPlan, results: DqResults) -> dict[str, Any]:
    """Shared memory and barriers, by the names of `RowRefs`."""
    count = plan.config.warpgroups
    rows = row_memory(plan, plan.dtype, count)
    memory = ring_memory(plan) | {
        "q_smem": rows,
        "do_smem": rows,
        "q_full": common.barrier(2 * count * plan.row_copies, 1),
    }
    if _separate_dq(plan, results):
        memory["dq_smem"] = row_memory(plan, jnp.float32, count)
    if plan.depth_warpgroups:
        memory |= slot_warpgroup.memory(plan)
    if results.slots_dtype is not None:
        shape: tuple[int, ...] = (plan.depth_keys, plan.head_dim)
        if plan.boxes:
            shape = (plan.block_slots, plan.tokens, plan.head_dim)
        memory["weight_smem"] = common.smem((count, 2, ROWS, plan.depth_keys), plan.dtype)
        memory["d_slot_smem"] = common.smem(
            (count, 2, *shape), results.slots_dtype, foldable=plan.boxes
        )
        if results.add and platforms.interpreted():
            memory["old_smem"] = common.smem((count, *shape), results.slots_dtype)
            memory["old_full"] = common.barrier(1, count)
    return memory


def _separate_dq(plan: RowPlan, results: DqResults) -> bool:
    """Whether float32 rows have memory of their own: dq and, before it, the slots' part of dq."""
    return plan.depth_warpgroups or jnp.dtype(results.dq_dtype).itemsize == 4


def dq_shared_memory(plan: RowPlan, results: DqResults) -> int:
    """Bytes that a thread block needs, barriers rounded up."""
    config, dim = plan.config, plan.head_dim
    rows = 2 * config.warpgroups * ROWS * dim * 2
    ring = 2 * config.stages * plan.stage_keys * dim * 2 + config.stages * config.block_kv * 4
    out = config.warpgroups * ROWS * dim * 4 * _separate_dq(plan, results)
    slots = slot_warpgroup.shared_memory(plan) if plan.depth_warpgroups else 0
    if results.slots_dtype is not None:
        size = jnp.dtype(results.slots_dtype).itemsize
        slots = 2 * config.warpgroups * plan.depth_keys * (ROWS * 2 + dim * size)
    return rows + ring + out + slots + 2048


def _load(plan: RowPlan, refs: RowRefs) -> None:
    tile = locate(plan, refs.slots, refs.ranges, lax.axis_index("block"))
    rows = (
        (refs.query, refs.q_smem, refs.q_smem_boxes),
        (refs.d_out, refs.do_smem, refs.do_smem_boxes),
    )
    load_rows(plan, tile, rows, refs.q_full.at[0])
    step = load_blocks(plan, refs, tile, i32(0))
    drain_parts(plan, refs.k_free, step)
    drain_parts(plan, refs.v_free, step)


class _DqWorker(NamedTuple):
    """A warpgroup's tile."""

    plan: RowPlan
    refs: RowRefs
    warpgroup: jax.Array
    tile: RowTile
    token: jax.Array
    row_segment: jax.Array | None
    lse: jax.Array
    delta: jax.Array

    @classmethod
    def of(cls, plan: RowPlan, refs: RowRefs, warpgroup: jax.Array) -> "_DqWorker":
        plgpu = common.mosaic()
        tile = locate(plan, refs.slots, refs.ranges, lax.axis_index("block"))
        token, _ = unit(plan, tile, warpgroup)
        number = tile.place * plan.config.warpgroups + warpgroup
        layout = plgpu.Layout.WGMMA.reduce(1)
        lse, delta = (
            plgpu.load(x.at[tile.batch, tile.kv_head, number], layout=layout, optimized=False)
            for x in (refs.lse, refs.delta)
        )
        segment = row_segments(plan, refs, tile, token)
        return cls(plan, refs, warpgroup, tile, token, segment, lse, delta)

    def has_tokens(self) -> jax.Array:
        """False for a tile that only fills up the last thread block."""
        return self.token < self.plan.q_len

    def place_of_slots(self) -> tuple[Any, Any]:
        """The tile's tokens and its KV head on the axes B·T and K·H of the slots' gradients."""
        plan, tile = self.plan, self.tile
        length = plan.q_len + -plan.q_len % plan.tokens
        tokens = common.ds(tile.batch * length + self.token, plan.tokens)
        return tokens, common.ds(tile.kv_head * plan.head_dim, plan.head_dim)

    def weigh(self, block: RingBlock, shape: tuple[int, int], mask: Any) -> tuple[Any, Any]:
        """p and ds of a block; mask() says what is visible, None: everything."""
        plan, refs = self.plan, self.refs
        plgpu = common.mosaic()

        def weights(scores):
            scores *= plan.scale * LOG2E
            if mask is not None:
                scores = jnp.where(mask(), scores, -jnp.inf)
            return jnp.exp2(scores - spread(self.lse, shape, 0))

        block.wait_key()
        block.wait_value()
        q_ref, do_ref = refs.q_smem.at[self.warpgroup], refs.do_smem.at[self.warpgroup]
        first = q_ref, block.key.transpose((1, 0))
        p, dp = two_products(first, (do_ref, block.value.transpose((1, 0))), shape, weights)
        plgpu.barrier_arrive(block.value_free)
        return p, p * (dp - spread(self.delta, shape, 0))


def _compute(plan: RowPlan, refs: RowRefs, results: DqResults, warpgroup: jax.Array) -> None:
    plgpu = common.mosaic()
    worker = _DqWorker.of(plan, refs, warpgroup)
    plgpu.barrier_wait(refs.q_full.at[0])
    depth = functools.partial(_depth_step, worker, results)
    plain, edge = (functools.partial(_key_step, worker, masked=m) for m in (False, True))
    carry = (i32(0), common.zeros((ROWS, plan.head_dim)))
    _, dq = visit_blocks(plan, worker.tile, depth, plain, edge, carry)
    if plan.depth_warpgroups:
        dq += depth_rows(refs, warpgroup)
    _store_dq(worker, dq)
    if results.slots_dtype is not None and not results.add:
        _store_zeros(worker)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _key_step(worker: _DqWorker, i: jax.Array, carry, *, masked: bool):
    """One sequence block."""
    plgpu = common.mosaic()
    plan, refs = worker.plan, worker.refs
    step, dq = carry
    block = RingBlock.at(plan, refs, worker.warpgroup, step)

    def mask():
        segments = refs.segment_smem
        if segments is not None:
            segments = segments.at[rem(step, plan.config.stages)]
        start = worker.tile.kv.nth(i) * plan.config.block_kv
        return key_mask(plan, worker.token, worker.row_segment, start, segments)

    shape = (ROWS, plan.config.block_kv)
    _, ds = worker.weigh(block, shape, mask if masked else None)
    dq = accumulate(dq, (ds.astype(plan.dtype), block.key))
    plgpu.barrier_arrive(block.key_free)
    return step + 1, dq


def _depth_step(worker: _DqWorker, results: DqResults, _, i: jax.Array, carry):
    """One depth block: dq, and the gradients of its slots."""
    plgpu = common.mosaic()
    plan, refs = worker.plan, worker.refs
    step, dq = carry
    first, stop = slot_block(plan, refs.slots, worker.tile, i)
    block = RingBlock.at(plan, refs, worker.warpgroup, step, stop - first)
    mask = functools.partial(depth_mask, plan, worker.row_segment, stop - first)
    p, ds = (x.astype(plan.dtype) for x in worker.weigh(block, (ROWS, plan.depth_keys), mask))
    if results.slots_dtype is not None:
        weights = refs.weight_smem.at[worker.warpgroup]
        weights[0] = p
        weights[1] = ds
        plgpu.commit_smem()
    dq = accumulate(dq, (ds, block.key))
    plgpu.barrier_arrive(block.key_free)
    if results.slots_dtype is not None:
        _multiply_slots(worker)
        _store_slots(worker, results, first, stop)
    return step + 1, dq


def _multiply_slots(worker: _DqWorker) -> None:
    """dkd = scale dsᵀ q and dvd = pᵀ do of a block, to shared memory."""
    plgpu = common.mosaic()
    plan, refs = worker.plan, worker.refs
    p, ds = (refs.weight_smem.at[worker.warpgroup, i].transpose((1, 0)) for i in (0, 1))
    q_ref, do_ref = refs.q_smem.at[worker.warpgroup], refs.do_smem.at[worker.warpgroup]
    shape = (plan.depth_keys, plan.head_dim)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous block's gradients are copied
    products = two_products((ds, q_ref), (p, do_ref), shape, lambda x: x * plan.scale)
    for i, product in enumerate(products):
        target = refs.d_slot_smem.at[worker.warpgroup, i]
        target = target.reshape(shape) if plan.boxes else target
        target[...] = product.astype(target.dtype)
    plgpu.commit_smem()


def _store_slots(worker: _DqWorker, results: DqResults, first, stop) -> None:
    """Starts writing a block's gradients, or adding them, to its slots first ... stop - 1."""
    plan, refs = worker.plan, worker.refs
    tokens, heads = worker.place_of_slots()
    pairs = [
        (refs.d_slot_smem.at[worker.warpgroup, i], target)
        for i, target in enumerate((refs.d_depth_key, refs.d_depth_value))
    ]

    def whole():
        slots = common.ds(first, plan.block_slots)
        for source, target in pairs:
            common.store(source, target.at[slots, tokens, heads], add=results.add)

    def part():
        for i in range(plan.block_slots):

            def one(i=i):
                rows, slot = _slot_piece(plan, i, first + i)
                old = None
                if refs.old_smem is not None:
                    old = (
                        refs.old_smem.at[worker.warpgroup, rows],
                        refs.old_full.at[worker.warpgroup],
                    )
                for source, target in pairs:
                    where = target.at[slot, tokens, heads]
                    common.store(source.at[rows], where, add=results.add, old=old)

            common.when(first + i < stop, one)

    # Tokens behind a row's last tile belong to the next row.
    common.when(worker.has_tokens(), lambda: either(plan, stop - first, whole, part))
    common.mosaic().commit_smem_to_gmem_group()


def _slot_piece(plan: RowPlan, index: int, slot: Any) -> tuple[Any, Any]:
    """Where a block's `index`-th slot lies in memory, and the slot as its target's index."""
    if plan.boxes:
        return common.ds(index, 1), common.ds(slot, 1)
    return common.ds(index * plan.tokens, plan.tokens), slot


def _store_zeros(worker: _DqWorker) -> None:
    """Zeros to the slots that are not visible."""
    plgpu = common.mosaic()
    plan, refs = worker.plan, worker.refs
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    source = refs.d_slot_smem.at[worker.warpgroup, 0]
    shape = (plan.depth_keys, plan.head_dim)
    matrix = source.reshape(shape) if plan.boxes else source
    matrix[...] = common.zeros(shape).astype(source.dtype)
    plgpu.commit_smem()
    tokens, heads = worker.place_of_slots()
    start0, stop0, start1, stop1 = (refs.slots[i] for i in range(4))

    def store_one(slot, _):
        def store():
            rows, index = _slot_piece(plan, 0, slot)
            for target in (refs.d_depth_key, refs.d_depth_value):
                common.store(source.at[rows], target.at[index, tokens, heads], add=False)

        visible = ((slot >= start0) & (slot < stop0)) | ((slot >= start1) & (slot < stop1))
        common.when(jnp.logical_not(visible), store)

    count = jnp.where(worker.has_tokens(), plan.slots, 0)
    lax.fori_loop(0, count, store_one, None)
    plgpu.commit_smem_to_gmem_group()


def _store_dq(worker: _DqWorker, dq: jax.Array) -> None:
    """Writes dq, through the queries' memory if dq is 16-bit: their last product is done."""
    plgpu = common.mosaic()
    plan, refs, tile = worker.plan, worker.refs, worker.tile
    memories = refs.dq_smem, refs.dq_smem_boxes
    if jnp.dtype(refs.out.dtype).itemsize < 4:
        memories = refs.q_smem, refs.q_smem_boxes
        plgpu.commit_smem()  # every warp's products with the queries are done
    memory, boxes = (None if x is None else x.at[worker.warpgroup] for x in memories)
    memory[...] = (dq * plan.scale).astype(memory.dtype)
    plgpu.commit_smem()
    for piece, place in row_pieces(plan, tile, worker.warpgroup, refs.out, memory, boxes):
        plgpu.copy_smem_to_gmem(place, piece, commit_group=False)
    plgpu.commit_smem_to_gmem_group()
