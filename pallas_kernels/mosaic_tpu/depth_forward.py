"""Forward of the depth kernel: a slot's tile is [K·H, tokens], and all arithmetic is per token.

A query meets S keys of its own token only. On the MXU that would be the diagonal of [tokens,
tokens] products: 128 times the work. On the vector unit it is a product per element and a sum over
H, which stands in the sublanes: additions of whole registers, every lane a token, whatever H is.
Bound by memory while G is small: K and V of a slot are read once, for all query heads.

Each slot takes three steps: scores of all heads, one softmax update for them together (so that
its registers are full), and the weighted values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu import common, schedule
from pallas_kernels.mosaic_tpu.common import Blocked


def depth_forward(
    query: jax.Array,
    depth_key: jax.Array,
    depth_value: jax.Array,
    slots: jax.Array,
    segments: jax.Array | None,
    *,
    shape: schedule.CallShape,
    tiles: schedule.Tiles,
    scale: float,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """o [B, K, G, H, T] in `out_dtype` and lse [B, K, G, T] over the visible slots alone.

    query: [B, K, G, H, T]. depth_key, depth_value: [S, B, K, H, T]. slots: see
    `common.slot_scalars`. segments: [B, T] int32; a query in segment 0 sees nothing.
    """
    block, heads = tiles.depth_block, tiles.depth_heads
    specs = DepthBlocks(shape, block, heads)
    queries = query.shape
    lse_shape = (shape.batch, shape.kv_heads // heads, heads * shape.group, shape.q_len)
    out = common.launch(
        functools.partial(_kernel, factor=scale * common.LOG2_E),
        name="moda_depth_forward",
        grid=specs.grid(depth_key.shape[0]),
        parallel=3,
        scalars={"slots": slots},
        inputs={
            "query": specs.queries(query),
            "depth_key": specs.slots(depth_key),
            "depth_value": specs.slots(depth_value),
            "segments": specs.tokens(None if segments is None else segments[:, None]),
        },
        outputs={
            "out": specs.queries(jax.ShapeDtypeStruct(queries, out_dtype)),
            "lse": specs.vectors(jax.ShapeDtypeStruct(lse_shape, jnp.float32)),
        },
        scratch={
            "acc": (heads, shape.group, shape.head_dim, block),
            **dict.fromkeys(("top", "total", "score", "kept"), (heads * shape.group, block)),
        },
        work=schedule.depth_forward_work(
            shape, tiles, depth_key.shape[0], last=out_dtype == query.dtype
        ),
    )
    return out["out"], out["lse"].reshape(*queries[:3], shape.q_len)


class DepthBlocks:
    """Grid (B, head blocks, token blocks, slots), and how each operand is cut along it."""

    def __init__(self, shape: schedule.CallShape, block: int, heads: int):
        self.shape, self.block, self.heads = shape, block, heads

    def grid(self, slots: int) -> tuple[int, ...]:
        blocks = schedule.num_blocks(self.shape.q_len, self.block)
        return self.shape.batch, self.shape.kv_heads // self.heads, blocks, slots

    def queries(self, array: Any) -> Blocked:
        """[B, K, G, H, T]."""
        block = (None, self.heads, self.shape.group, self.shape.head_dim, self.block)
        return Blocked(array, block, lambda b, k, i, s, refs: (b, k, 0, 0, i))

    def slots(self, array: Any) -> Blocked:
        """[S, B, K, H, T]: the visible slots, one after the other."""
        block = (None, None, self.heads, self.shape.head_dim, self.block)

        def index(b, k, i, s, refs):
            return common.slot_index(s, refs.slots), b, k, 0, i

        return Blocked(array, block, index)

    def vectors(self, array: Any) -> Blocked:
        """[B, head blocks, heads of a block, T]."""
        block = (None, None, self.heads * self.shape.group, self.block)
        return Blocked(array, block, lambda b, k, i, s, refs: (b, k, 0, i))

    def tokens(self, array: Any) -> Blocked:
        """[B, 1, T]."""
        return Blocked(array, (None, 1, self.block), lambda b, k, i, s, refs: (b, 0, i))


def _kernel(refs: Any, *, factor: float) -> None:
    s = pl.program_id(3)

    @pl.when(s == 0)
    def _start():
        refs.acc[...] = jnp.zeros_like(refs.acc)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.top[...] = jnp.full_like(refs.top, -jnp.inf)

    @pl.when(s < common.count_slots(refs.slots))
    def _slot():
        write_scores(refs.score, refs.query, refs.depth_key, factor)
        _update_softmax(refs)
        _add_values(refs)

    @pl.when(s == pl.num_programs(3) - 1)
    def _finish():
        total = refs.total[...]
        seen = total > 0
        refs.lse[...] = jnp.where(
            seen, (refs.top[...] + jnp.log2(jnp.where(seen, total, 1.0))) * common.LN_2, -jnp.inf
        )
        refs.kept[...] = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)

        def store(k, g, row):
            refs.out[k, g] = (refs.acc[k, g] * refs.kept[row]).astype(refs.out.dtype)

        for_each_head(refs.out.shape[:2], store)


def for_each_head(heads: tuple[int, int], body: Any) -> None:
    """body(key head, query head of it, its row as a slice of length 1) for all."""
    kv_heads, group = heads

    def of_key_head(k, _):
        for g in range(group):
            body(k, g, pl.ds(k * group + g, 1))

    lax.fori_loop(0, kv_heads, of_key_head, None)


def write_scores(score: Any, query: Any, keys: Any, factor: float) -> None:
    """score [K·G, tokens] = factor · sum over H of query [K, G, H, tokens] keys [K, H, tokens]."""
    kv_heads, group = query.shape[:2]

    def of_key_head(k, _):
        key = keys[k].astype(jnp.float32)
        for g in range(group):
            product = query[k, g].astype(jnp.float32) * key
            score[pl.ds(k * group + g, 1)] = factor * jnp.sum(product, axis=0, keepdims=True)

    lax.fori_loop(0, kv_heads, of_key_head, None)


def _update_softmax(refs: Any) -> None:
    """Turns `score` into the slot's weights and `kept` into what is left of the earlier ones."""
    score, top = refs.score[...], refs.top[...]
    if refs.segments is not None:
        score = jnp.where(refs.segments[...] != 0, score, -jnp.inf)
    new_top = jnp.maximum(top, score)
    shift = jnp.where(jnp.isneginf(new_top), 0.0, new_top)  # -inf - (-inf) is NaN
    weight, kept = jnp.exp2(score - shift), jnp.exp2(top - shift)
    refs.total[...] = kept * refs.total[...] + weight
    refs.top[...] = new_top
    refs.score[...], refs.kept[...] = weight, kept


def _add_values(refs: Any) -> None:
    kv_heads, group = refs.query.shape[:2]

    def of_key_head(k, _):
        value = refs.depth_value[k].astype(jnp.float32)
        for g in range(group):
            row = pl.ds(k * group + g, 1)
            refs.acc[k, g] = refs.kept[row] * refs.acc[k, g] + refs.score[row] * value

    lax.fori_loop(0, kv_heads, of_key_head, None)
