"""Gradients of a few depth slots, gathered from the layers whose queries read them.

A thread block keeps a few slots of some tokens of one key/value head, and walks over the layers,
whose queries and output gradients come through a ring: the kernel for dk and dv, with slots for
keys and layers for query blocks. Nothing is added in memory: a slot's gradient is written once, and
what grows with the layers is only read.

Rows are (slot, token), 64 of them. The 64 columns are queries of one layer, or of two or four and
as many times fewer tokens: (layer, token // 8, head, token % 8), as TMA lays down the rows
[token, heads · H] in tiles of 8 by 64. Pairs of different tokens are masked. A step takes two query
heads: more would leave a tile fewer than the 8 tokens that TMA wants. The last head of an odd group
comes with another group's, or with zeros, whose weights are 0: alone, it would take as many steps,
and with one head a step a tile has room for half the slots, so that queries are read twice.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.depth.tiles import SlotTile
from pallas_kernels.mosaic_gpu.wgmma import (
    LOG2E,
    ROWS,
    TOKEN_ALIGNMENT,
    cdiv,
    divmod_i32,
    i32,
    iota,
    key_products,
    load_columns,
    rem,
    spread,
)
from pallas_kernels.operands import KeptLayers, Operands, num_kv_heads, row_delta

COLUMNS = 64
STAGES = 3


def _heads(group: int) -> int:
    """Query heads of a step."""
    return min(group, 2)


class GatherPlan(NamedTuple):
    """Static numbers of a call."""

    batch: int
    q_len: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: Any
    scale: float
    num_slots: int
    out_dtype: Any
    sum_dtype: Any  # of `so_far`; None: there is none

    @property
    def heads(self) -> int:
        return _heads(self.group)

    @property
    def layers(self) -> int:
        """Layers of a step: the fewest with which a tile has rows for all slots, at most 4."""
        few = (n for n in (1, 2, 4) if self.num_slots * COLUMNS // (n * self.heads) <= ROWS)
        return next(few, 4)

    @property
    def columns(self) -> int:
        """Columns of a layer."""
        return COLUMNS // self.layers

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.columns // self.heads

    @property
    def parts(self) -> int:
        """Steps that a layer's query heads take."""
        return cdiv(self.group, self.heads)

    @property
    def slot_tile(self) -> SlotTile:
        """The tile of the slots that a thread block works on."""
        slots = ROWS // self.tokens
        return SlotTile(1, self.tokens, slots, self.head_dim, boxes=not platforms.interpreted())

    @property
    def boxes(self) -> bool:
        """Whether one copy loads all slots of a tile."""
        return self.slot_tile.boxes and self.num_slots % self.slot_tile.slots == 0

    @property
    def slot_copies(self) -> int:
        """Copies that load a tile's keys; as many load its values."""
        return 1 if self.boxes else min(self.num_slots, self.slot_tile.slots)

    @property
    def slot_blocks(self) -> int:
        return cdiv(self.num_slots, self.slot_tile.slots)

    @property
    def tiles(self) -> int:
        """Token tiles of a row."""
        return cdiv(self.q_len, self.tokens)


class _GatherRefs(NamedTuple):
    """Global arrays, shared memory, barriers; what a call lacks is None."""

    scalars: Any  # [4]: layers start and stop, first slot, offset in so_far
    query: Any  # [R, B·T, N·H]
    d_out: Any
    rows: Any  # [R, B·K·2·parts·T·heads]
    key: Any  # [S, B·T, K·H]
    value: Any
    so_far_key: Any = None  # [C, B·T, K·H]
    so_far_value: Any = None
    d_key: Any = None  # [count, B·T, K·H]
    d_value: Any = None
    key_smem: Any = None
    value_smem: Any = None
    so_far_smem: Any = None
    d_key_smem: Any = None  # None: over the keys and values
    d_value_smem: Any = None
    q_smem: Any = None
    do_smem: Any = None
    q_boxes: Any = None  # the same memory as [stages, layers, tokens, heads·H]
    do_boxes: Any = None
    lse_smem: Any = None
    minus_delta_smem: Any = None
    lse_boxes: Any = None  # the same memory as [stages, layers, tokens·heads]
    minus_delta_boxes: Any = None
    slots_full: Any = None
    so_far_full: Any = None
    full: Any = None
    tail_full: Any = None  # of a last step with fewer layers


_OPERANDS = "scalars", "query", "d_out", "rows", "key", "value"
_SO_FAR = "so_far_key", "so_far_value"


class _GatherPlace(NamedTuple):
    """What a thread block works on."""

    plan: GatherPlan
    first: jax.Array  # of its slots, among the call's
    head: jax.Array
    row: jax.Array
    tile: jax.Array  # in the row

    @classmethod
    def here(cls, plan: GatherPlan) -> "_GatherPlace":
        """Neighbours share what they read: the slots' blocks of a tile, then its heads."""
        rest, block = divmod_i32(lax.axis_index("block"), plan.slot_blocks)
        rest, head = divmod_i32(rest, plan.kv_heads)
        return cls(plan, block * plan.slot_tile.slots, head, *divmod_i32(rest, plan.tiles))

    @property
    def token(self) -> jax.Array:
        """The tile's first, on the axis B·T."""
        return (self.row * self.plan.tiles + self.tile) * self.plan.tokens

    def width(self, head: Any) -> Any:
        """A head on the axis K·H or N·H."""
        return common.ds(head * self.plan.head_dim, self.plan.head_dim)

    def slots(self, start: Any, *arrays: Any) -> Iterator[tuple[Any, ...]]:
        """(whether it is one of the call's, its index in the tile, its piece of each array).

        By slot, or of all slots at once. Past the end it yields the last slot again, since the
        barrier counts copies; that slot must not be written twice.
        """
        plan, tile = self.plan, self.plan.slot_tile
        tokens, head = common.ds(self.token, plan.tokens), self.width(self.head)
        if plan.boxes:
            where = common.ds(start + self.first, tile.slots), tokens, head
            yield True, common.ds(0, tile.slots), *(x.at[where] for x in arrays)
            return
        for i in range(plan.slot_copies):
            slot = start + jnp.minimum(self.first + i, plan.num_slots - 1)
            index = common.ds(i, 1) if tile.boxes else common.ds(i * plan.tokens, plan.tokens)
            where = common.ds(slot, 1) if tile.boxes else slot, tokens, head
            yield self.first + i < plan.num_slots, index, *(x.at[where] for x in arrays)


def keep_layer(
    operands: Operands,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array | None,
) -> KeptLayers:
    """See `contract.KeepLayer`."""
    delta = row_delta(out, lse, d_out, d_lse)
    kv_heads = num_kv_heads(operands)
    group = operands.query.shape[2] // kv_heads
    heads = _heads(group)
    parts = cdiv(group, heads)
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)  # e^(s - inf) = 0

    def order(x: jax.Array, fill: float) -> jax.Array:
        """[B, T, N] -> [B, K, parts·T·heads]."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % COLUMNS), (0, 0)), constant_values=fill)
        x = common.pad_heads(x, kv_heads=kv_heads, group=parts * heads, fill=fill)
        x = common.tile_rows(x, kv_heads * parts, heads, TOKEN_ALIGNMENT, fill)
        return x.reshape(x.shape[0], kv_heads, -1)

    rows = jnp.concatenate([order(lse, jnp.inf), order(-delta, 0)], axis=2)
    return KeptLayers(operands.query, d_out.astype(operands.query.dtype), rows)


def gather_depth_grads(
    kept: KeptLayers,
    depth_key: jax.Array,
    depth_value: jax.Array,
    layers: tuple[Any, Any],
    first: Any,
    count: int,
    *,
    scale: float,
    dtype: Any,
    so_far: tuple[jax.Array, jax.Array] | None = None,
    offset: Any = 0,
) -> tuple[jax.Array, jax.Array]:
    """See `contract.GatherDepthGrads`; head sizes 64 and 128."""
    _, batch, length, num_heads, head_dim = kept.query.shape
    kv_heads = depth_key.shape[3]
    plan = GatherPlan(
        batch,
        length,
        kv_heads,
        num_heads // kv_heads,
        head_dim,
        kept.query.dtype,
        scale,
        count,
        jnp.dtype(dtype),
        None if so_far is None else so_far[0].dtype,
    )

    def flat(x: jax.Array) -> jax.Array:
        """[R, B, T, N, H] -> [R, B·T, N·H]."""
        x = common.pad_tokens(x, 2, plan.tokens)
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1)

    scalars = jnp.stack([jnp.asarray(x, jnp.int32) for x in (*layers, first, offset)])
    rows = kept.rows.reshape(kept.rows.shape[0], -1)
    arrays = [flat(kept.query), flat(kept.d_out), rows, flat(depth_key), flat(depth_value)]
    arrays += [flat(x) for x in so_far or ()]
    padded = plan.tiles * plan.tokens
    out = jax.ShapeDtypeStruct((count, batch * padded, kv_heads * head_dim), plan.out_dtype)
    names = [*_OPERANDS, *(_SO_FAR if so_far is not None else ()), "d_key", "d_value"]

    def body(*operands, **memory):
        views = dict(zip(names, operands, strict=True))
        _kernel(plan, _GatherRefs(**views, **_split_unions(plan, memory)))

    results = common.launch(
        body,
        name="moda_depth_gather",
        grid={"block": batch * plan.tiles * kv_heads * plan.slot_blocks},
        out_type=[out, out],
        scratch=_scratch(plan),
    )(scalars, *arrays)
    shape = (count, batch, padded, kv_heads, head_dim)
    d_key, d_value = (x.reshape(shape)[:, :, :length] for x in results)
    return d_key, d_value


def _views(plan: GatherPlan) -> list[dict[str, Any]]:
    """Shared memory that is used in several shapes, by the names of `_GatherRefs`."""
    ring = common.smem((STAGES, COLUMNS, plan.head_dim), plan.dtype)
    row = common.mosaic().SMEM((STAGES, COLUMNS), jnp.float32)
    views = [{"q_smem": ring}, {"do_smem": ring}, {"lse_smem": row}, {"minus_delta_smem": row}]
    if plan.slot_tile.boxes:
        shape = STAGES, plan.layers
        boxes = common.smem((*shape, plan.tokens, plan.heads * plan.head_dim), plan.dtype)
        box_rows = common.mosaic().SMEM((*shape, plan.columns), jnp.float32)
        views[0]["q_boxes"] = views[1]["do_boxes"] = boxes
        views[2]["lse_boxes"] = views[3]["minus_delta_boxes"] = box_rows
    if plan.out_dtype != plan.dtype:  # the ring is free by then
        out = plan.slot_tile.buffer(plan.out_dtype)
        views[0]["d_key_smem"] = views[1]["d_value_smem"] = out
    return views


def _scratch(plan: GatherPlan) -> dict[str, Any]:
    """Shared memory and barriers, by the names of `_GatherRefs`; see `_split_unions`."""
    slots = plan.slot_tile.buffer(plan.dtype)
    barrier = common.barrier
    memory = {"key_smem": slots, "value_smem": slots}
    memory["slots_full"] = barrier(2 * plan.slot_copies, 1)
    if plan.sum_dtype is not None:
        memory["so_far_smem"] = plan.slot_tile.buffer(plan.sum_dtype, 2)
        memory["so_far_full"] = barrier(2 * plan.slot_copies, 1)
    if plan.slot_tile.boxes:
        memory["full"] = barrier(4, STAGES)
        memory["tail_full"] = barrier(2 * plan.layers + 2, STAGES)
    else:
        memory["full"] = barrier(2 * (plan.layers + COLUMNS // TOKEN_ALIGNMENT), STAGES)
    for views in _views(plan):
        if plan.slot_tile.boxes:
            memory[next(iter(views))] = common.mosaic().RefUnion(*views.values())
        else:  # the interpreter cannot see one memory as two arrays
            memory |= views
    return memory


def _split_unions(plan: GatherPlan, memory: dict[str, Any]) -> dict[str, Any]:
    """The views of one memory under their own names."""
    if plan.slot_tile.boxes:
        for views in _views(plan):
            memory |= dict(zip(views, [*memory[next(iter(views))]], strict=True))
    return memory


def _kernel(plan: GatherPlan, refs: _GatherRefs) -> None:
    """One warpgroup: a tile of slots and tokens."""
    plgpu = common.mosaic()
    here = _GatherPlace.here(plan)
    start, stop, first, offset = (refs.scalars[i] for i in range(4))
    whole, rest = divmod_i32(stop - start, plan.layers)
    full = whole * plan.parts
    steps = full + jnp.minimum(rest, 1) * plan.parts
    _load_slots(here, refs, first, offset)

    def load(step, stage):
        part = functools.partial(_load_step, here, refs, start, stop, step, stage)
        if refs.tail_full is None:
            part(boxes=False)
            return
        common.when(step < full, functools.partial(part, boxes=True))
        if plan.layers > 1:
            common.when(step >= full, functools.partial(part, boxes=False))

    for stage in range(STAGES):
        common.when(stage < steps, functools.partial(load, i32(stage), stage))
    shape = (ROWS, COLUMNS)
    slots = plan.slot_tile.matrix(refs.key_smem), plan.slot_tile.matrix(refs.value_smem)
    plgpu.barrier_wait(refs.slots_full.at[0])

    def body(step, carry, *, tail=False):
        stage = rem(step, STAGES)
        arrived = refs.tail_full if tail and refs.tail_full is not None else refs.full
        plgpu.barrier_wait(arrived.at[stage])

        def row(memory, otherwise: float) -> jax.Array:
            """A number for every column; the columns of missing layers may hold NaN."""
            numbers = spread(load_columns(memory.at[stage]), shape, 1)
            if tail:
                numbers = jnp.where(iota(shape, 1) < rest * plan.columns, numbers, otherwise)
            return numbers

        def weights(scores):
            scores = jnp.where(_same_token(plan), scores * (plan.scale * LOG2E), -jnp.inf)
            return jnp.exp2(scores - row(refs.lse_smem, jnp.inf))

        tiles = *slots, refs.q_smem.at[stage], refs.do_smem.at[stage]
        carry = key_products(tiles, shape, weights, row(refs.minus_delta_smem, 0), *carry)
        plgpu.commit_smem()  # everyone has read the stage before it is loaded again
        following = step + STAGES
        common.when(following < steps, functools.partial(load, following, stage))
        return carry

    zeros = common.zeros((ROWS, plan.head_dim))
    carry = lax.fori_loop(0, full, body, (zeros, zeros))
    if plan.layers > 1:
        carry = lax.fori_loop(full, steps, functools.partial(body, tail=True), carry)
    dk, dv = carry
    _store(here, refs, (dk * plan.scale, dv))


def _same_token(plan: GatherPlan) -> jax.Array:
    """[rows, columns]: whether both are of one token; all sizes are powers of two."""
    row, column = (iota((ROWS, COLUMNS), axis) for axis in (0, 1))
    tiles = (row // TOKEN_ALIGNMENT) ^ (column // (TOKEN_ALIGNMENT * plan.heads))
    return (
        ((row ^ column) & (TOKEN_ALIGNMENT - 1)) | (tiles & (plan.tokens // TOKEN_ALIGNMENT - 1))
    ) == 0


def _load_slots(here: _GatherPlace, refs: _GatherRefs, first, offset) -> None:
    plgpu = common.mosaic()
    for _, index, key, value in here.slots(first, refs.key, refs.value):
        for source, memory in ((key, refs.key_smem), (value, refs.value_smem)):
            plgpu.copy_gmem_to_smem(source, memory.at[index], refs.slots_full.at[0])
    if refs.so_far_smem is None:
        return
    for _, index, *sources in here.slots(offset, refs.so_far_key, refs.so_far_value):
        for i, source in enumerate(sources):
            memory = refs.so_far_smem.at[i, index]
            plgpu.copy_gmem_to_smem(source, memory, refs.so_far_full.at[0])


def _load_step(
    here: _GatherPlace, refs: _GatherRefs, start, stop, step, stage, *, boxes: bool
) -> None:
    """Some heads of a step's layers: queries, do, lse and delta; boxes: of all layers at once."""
    plgpu = common.mosaic()
    plan = here.plan
    full = refs.full if boxes or refs.tail_full is None else refs.tail_full
    group, part = divmod_i32(step, plan.parts)
    head = here.head * plan.group + part * plan.heads
    row = here.row * plan.kv_heads + here.head
    padded = cdiv(plan.q_len, COLUMNS) * COLUMNS * plan.heads

    def numbers(kind: int) -> Any:
        place = ((row * 2 + kind) * plan.parts + part) * padded + here.tile * plan.columns
        return common.ds(place, plan.columns)

    def copy(source, target):
        plgpu.copy_gmem_to_smem(source, target, full.at[stage])

    def copy_rows(layer, index):
        """`layer` and `index`: of the source and among the step's; a layer or a slice."""
        width = common.ds(head * plan.head_dim, plan.heads * plan.head_dim)
        where = layer, common.ds(here.token, plan.tokens), width
        copy(refs.query.at[where], refs.q_boxes.at[stage, index])
        copy(refs.d_out.at[where], refs.do_boxes.at[stage, index])

    first = start + group * plan.layers
    layers, all_layers = common.ds(first, plan.layers), common.ds(0, plan.layers)
    if refs.q_boxes is not None:
        # One copy even in a step with fewer layers: TMA needs 128 bytes, a layer's may be 64.
        copy(refs.rows.at[layers, numbers(0)], refs.lse_boxes.at[stage])
        copy(refs.rows.at[layers, numbers(1)], refs.minus_delta_boxes.at[stage])
    if boxes:
        copy_rows(layers, all_layers)
        return
    for i in range(plan.layers):
        # Past the last layer it loads that one again; the columns are masked.
        layer = jnp.minimum(first + i, stop - 1)
        if refs.q_boxes is not None:
            copy_rows(layer, i)
            continue
        columns = common.ds(i * plan.columns, plan.columns)
        copy(refs.rows.at[layer, numbers(0)], refs.lse_smem.at[stage, columns])
        copy(refs.rows.at[layer, numbers(1)], refs.minus_delta_smem.at[stage, columns])
        for n in range(plan.columns // TOKEN_ALIGNMENT):
            token, own = divmod(n, plan.heads)
            rows = common.ds(i * plan.columns + n * TOKEN_ALIGNMENT, TOKEN_ALIGNMENT)
            where = (
                layer,
                common.ds(here.token + token * TOKEN_ALIGNMENT, TOKEN_ALIGNMENT),
                here.width(jnp.minimum(head + own, plan.kv_heads * plan.group - 1)),
            )
            copy(refs.query.at[where], refs.q_smem.at[stage, rows])
            copy(refs.d_out.at[where], refs.do_smem.at[stage, rows])


def _store(here: _GatherPlace, refs: _GatherRefs, grads: tuple[jax.Array, jax.Array]) -> None:
    """Adds `so_far` and writes the gradients, through shared memory."""
    plgpu = common.mosaic()
    plan, tile = here.plan, here.plan.slot_tile
    if refs.so_far_smem is not None:
        plgpu.barrier_wait(refs.so_far_full.at[0])
    memories = refs.d_key_smem, refs.d_value_smem
    if refs.d_key_smem is None:
        memories = refs.key_smem, refs.value_smem
    for i, (grad, memory) in enumerate(zip(grads, memories, strict=True)):
        total = grad
        if refs.so_far_smem is not None:
            old = tile.matrix(refs.so_far_smem.at[i])
            old = plgpu.load(old, layout=plgpu.Layout.WGMMA, optimized=False)
            total = grad + old.astype(jnp.float32)
        tile.matrix(memory)[...] = total.astype(plan.out_dtype)
    plgpu.commit_smem()
    for is_own, index, *targets in here.slots(i32(0), refs.d_key, refs.d_value):

        def store(index=index, targets=targets):
            for memory, target in zip(memories, targets, strict=True):
                common.store(memory.at[index], target, add=False)

        if is_own is True:
            store()
        else:
            common.when(is_own, store)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
