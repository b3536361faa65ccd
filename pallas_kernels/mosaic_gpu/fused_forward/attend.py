"""Fused forward of Mixture-of-Depths Attention for Hopper (Pallas Mosaic GPU, JAX >= 0.11).

One kernel, one online softmax: a tile of 64 rows reads the depth slots of its own tokens and the
sequence keys, both in parts that take turns (`ring.visit_blocks`).
A row is a (head, token) pair: a tile holds `tile_heads` query heads of one
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

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.fused_forward.kernel import attend_tiles, load_tiles, scratch
from pallas_kernels.mosaic_gpu.ring import RowRefs, split_unions
from pallas_kernels.mosaic_gpu.row_tiles import (
    ForwardConfig,
    RowPlan,
    flat_heads,
    forward_config,
    rows_by_token,
    segment_ranges,
    segment_rows,
)
from pallas_kernels.mosaic_gpu.wgmma import (
    ROWS,
    pad_rows,
    pad_tokens,
    split_roles,
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
    source = depth_key if key is None else key
    assert source is not None
    if scale <= 0:  # the kernel takes the maximum before it scales: it needs scale > 0
        query, scale = (-query, -scale) if scale < 0 else (jnp.zeros_like(query), 1.0)
    kv_heads = source.shape[-2]
    if config is None:
        config = forward_config(head_dim)
        if query_segments is not None:  # masks of segments and parts together spill registers
            config = dataclasses.replace(config, depth_parts=1, alternate=False)
    config.check(head_dim)
    plan = RowPlan(
        config,
        batch,
        q_len,
        0 if key is None else key.shape[1],
        kv_heads,
        num_heads // kv_heads,
        head_dim,
        query.dtype,
        scale,
        is_causal,
        query_segments is not None,
        0 if depth_key is None else depth_key.shape[0],
    )
    inputs = {"query": pad_rows(query, plan.tokens)}
    if key is not None and value is not None:
        inputs |= {"key": pad_tokens(key, 1), "value": pad_tokens(value, 1)}
    if plan.slots:
        assert depth_key is not None
        assert depth_value is not None
        assert slots is not None
        inputs |= {"depth_key": pad_tokens(depth_key, 2), "depth_value": pad_tokens(depth_value, 2)}
        inputs["slots"] = slots
    if query_segments is not None:
        inputs["query_segments"] = segment_rows(plan, query_segments)
        if key is not None:
            assert key_segments is not None
            inputs["key_segments"] = pad_tokens(key_segments, 1)
            inputs["ranges"] = segment_ranges(plan, query_segments, key_segments)
    out, lse = _run(plan, inputs)
    return out[:, :q_len], rows_by_token(plan, lse)


def _run(plan: RowPlan, inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    config, types = plan.config, scratch(plan)
    query = inputs["query"]
    inputs = inputs | {"query": flat_heads(query)}
    blocks = min(plan.tiles, _multiprocessors()) if config.persistent else plan.tiles

    def body(*operands, **memory):
        names = (*inputs, "out", "lse")
        views = dict(zip(names, operands, strict=True))
        refs = RowRefs(**views, **split_unions(types, memory)).read_scalars()
        split_roles(
            config.warpgroups,
            lambda warpgroup: attend_tiles(plan, refs, blocks, warpgroup),
            lambda: load_tiles(plan, refs, blocks),
        )

    lse_shape = (plan.batch, plan.kv_heads, plan.steps_per_head * config.warpgroups, ROWS)
    out, lse = common.launch(
        body,
        name="moda_forward",
        grid={"block": blocks},
        out_type=(
            jax.ShapeDtypeStruct(inputs["query"].shape, query.dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ),
        scratch=types,
        threads=config.warpgroups + 1,
    )(*inputs.values())
    return out.reshape(query.shape), lse


def _multiprocessors() -> int:
    """Of the default device; an H100's or H200's 132 when compiling without one."""
    return getattr(jax.devices()[0], "core_count", None) or 132
