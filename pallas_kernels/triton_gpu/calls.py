"""The kernels as functions of arrays: operands, constants, grid and tile sizes of each.

The modules with kernels import Triton, so they are imported where they are called.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.contract import ArrayPair
from pallas_kernels.operands import Operands, Options, num_kv_heads
from pallas_kernels.segments import segment_bounds
from pallas_kernels.triton_gpu import launch, tiles
from pallas_kernels.triton_gpu.tiles import TileConfig, padded

MAX_HEAD_DIM = 128
MAX_GROUP = 64


class QueryRows(NamedTuple):
    """What a backward knows of the query rows."""

    query: jax.Array  # [B, T, N, H]
    d_out: jax.Array  # [B, T, N, H], in the query's dtype
    lse: jax.Array  # [B, T, N] float32, the unified one
    delta: jax.Array  # [B, T, N] float32, see `operands.row_delta`


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call, its sizes and the constants that every kernel takes."""

    operands: Operands
    options: Options
    scale: float

    @property
    def has_depth(self) -> bool:
        return self.operands.depth_key is not None and self.operands.depth_key.shape[0] > 0

    @property
    def kv_heads(self) -> int:
        return num_kv_heads(self.operands)

    @property
    def group(self) -> int:
        return self.operands.query.shape[2] // self.kv_heads

    @property
    def batch(self) -> int:
        return self.operands.query.shape[0]

    @property
    def q_len(self) -> int:
        return self.operands.query.shape[1]

    @property
    def segments(self) -> ArrayPair:
        """Of queries and keys; placeholders where there are none."""
        query, key = self.operands.query_segments, self.operands.key_segments
        nothing = jnp.zeros(1, jnp.int32)
        return (nothing, nothing) if query is None else (query, nothing if key is None else key)

    def met_by_queries(self, config: TileConfig) -> jax.Array:
        """[B, query tiles, 4]: the key blocks that they meet; see `segment_bounds`."""
        queries, keys = self.segments
        return self._met(queries, self.tokens(config), keys, config.keys)

    def met_by_keys(self, config: TileConfig) -> jax.Array:
        """[B, key blocks, 4]: the query tiles that they meet."""
        queries, keys = self.segments
        return self._met(keys, config.keys, queries, self.tokens(config))

    def _met(self, segments: jax.Array, tile: int, others: jax.Array, block: int) -> jax.Array:
        if self.operands.query_segments is None:
            return _placeholder(jnp.int32)
        segments = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % tile)))
        return segment_bounds(segments.reshape(self.batch, -1, tile), others, block)

    def constants(self) -> dict[str, Any]:
        query = self.operands.query
        return {
            "Q_LEN": self.q_len,
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": query.shape[-1],
            "WIDTH": max(16, padded(query.shape[-1])),
            "GROUP_PAD": padded(self.group),
            "SCALE": self.scale,
            # Products of float32 in full; 16-bit operands have one way to be multiplied.
            "PRECISION": "ieee" if query.dtype == jnp.float32 else "tf32",
            "HAS_SEGMENTS": self.operands.query_segments is not None,
        }

    def sequence_constants(self) -> dict[str, Any]:
        return self.constants() | {
            "K_LEN": self.operands.key.shape[1],
            "CAUSAL": self.options.is_causal,
        }

    def depth_constants(self, bounds: jax.Array) -> dict[str, Any]:
        return self.constants() | {"BATCH": self.batch, "RANGES": bounds.shape[0] // 2}

    def config(self, kernel: str, override: TileConfig | None) -> TileConfig:
        query = self.operands.query
        return override or tiles.choose(
            kernel,
            head_dim=query.shape[-1],
            group=self.group,
            dtype=query.dtype,
            is_causal=self.options.is_causal,
        )

    def tokens(self, config: TileConfig) -> int:
        """Query tokens of a tile."""
        return config.rows // padded(self.group)

    def row_grid(self, config: TileConfig) -> tuple[int, int, int]:
        return -(-self.q_len // self.tokens(config)), self.kv_heads, self.batch

    def slot_grid(self, config: TileConfig) -> tuple[int, int]:
        return -(-self.q_len // self.tokens(config)) * self.kv_heads, self.batch

    def slot_blocks(self, config: TileConfig) -> dict[str, Any]:
        tokens = self.tokens(config)
        return {"BLOCK_T": tokens, "BLOCK_S": max(1, config.keys // tokens)}

    def out_shapes(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        shape = self.operands.query.shape
        return [_like(shape, dtype), _like(shape[:-1], jnp.float32)]


def _like(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _placeholder(dtype: Any) -> jax.Array:
    """For a pointer that the kernel does not follow."""
    return jnp.zeros(1, dtype)


def sequence_forward(
    part: KernelCall, partial: ArrayPair | None, config: TileConfig | None = None
) -> ArrayPair:
    """(o, lse) over the sequence, continuing the softmax `partial` (o, lse; float32) if given."""
    from pallas_kernels.triton_gpu.sequence_forward import sequence_forward_kernel

    config = part.config("sequence_forward", config)
    query, key, value = part.operands[:3]
    before = partial or (_placeholder(jnp.float32), _placeholder(jnp.float32))
    out, lse = launch.call(
        sequence_forward_kernel,
        [query, key, value, *part.segments, part.met_by_queries(config), *before],
        part.out_shapes(query.dtype),
        part.row_grid(config),
        config,
        **part.sequence_constants(),
        HAS_PARTIAL=partial is not None,
        BLOCK_T=part.tokens(config),
        BLOCK_N=config.keys,
    )
    return out, lse


def depth_forward(
    part: KernelCall, bounds: jax.Array, out_dtype: Any, config: TileConfig | None = None
) -> ArrayPair:
    """(o, lse) over the visible slots of every query's own token."""
    from pallas_kernels.triton_gpu.depth_forward import depth_forward_kernel

    config = part.config("depth_forward", config)
    query, _, _, depth_key, depth_value = part.operands[:5]
    out, lse = launch.call(
        depth_forward_kernel,
        [query, depth_key, depth_value, bounds, part.segments[0]],
        part.out_shapes(out_dtype),
        part.slot_grid(config),
        config,
        **part.depth_constants(bounds),
        **part.slot_blocks(config),
    )
    return out, lse


def chunk_forward(
    part: KernelCall, bounds: jax.Array, out_dtype: Any, config: TileConfig | None = None
) -> ArrayPair:
    """(o, lse) over the visible slots of the tokens of every query's chunk."""
    from pallas_kernels.triton_gpu.chunk_forward import chunk_forward_kernel

    config = part.config("chunk_forward", config)
    query, _, _, depth_key, depth_value = part.operands[:5]
    out, lse = launch.call(
        chunk_forward_kernel,
        [query, depth_key, depth_value, bounds, part.segments[0]],
        part.out_shapes(out_dtype),
        part.row_grid(config),
        config,
        **part.depth_constants(bounds),
        CHUNK=part.options.depth_chunk,
        BLOCK_T=part.tokens(config),
        BLOCK_N=config.keys,
    )
    return out, lse


def sequence_dkv(part: KernelCall, rows: QueryRows, config: TileConfig | None = None) -> ArrayPair:
    """(dk, dv) of the sequence."""
    from pallas_kernels.triton_gpu.sequence_backward import sequence_dkv_kernel

    config = part.config("sequence_dkv", config)
    key, value = part.operands.key, part.operands.value
    d_key, d_value = launch.call(
        sequence_dkv_kernel,
        [rows.query, key, value, *rows[1:], *part.segments, part.met_by_keys(config)],
        [_like(key.shape, key.dtype), _like(value.shape, value.dtype)],
        (-(-key.shape[1] // config.keys), part.kv_heads, part.batch),
        config,
        **part.sequence_constants(),
        BLOCK_T=part.tokens(config),
        BLOCK_N=config.keys,
    )
    return d_key, d_value


def sequence_dq(
    part: KernelCall,
    rows: QueryRows,
    partial_dq: jax.Array | None,
    config: TileConfig | None = None,
) -> jax.Array:
    """dq of the sequence, with `partial_dq` (float32) added, in the query's dtype."""
    from pallas_kernels.triton_gpu.sequence_backward import sequence_dq_kernel

    config = part.config("sequence_dq", config)
    key, value = part.operands.key, part.operands.value
    before = _placeholder(jnp.float32) if partial_dq is None else partial_dq
    (d_query,) = launch.call(
        sequence_dq_kernel,
        [rows.query, key, value, *rows[1:], *part.segments, part.met_by_queries(config), before],
        [_like(rows.query.shape, rows.query.dtype)],
        part.row_grid(config),
        config,
        **part.sequence_constants(),
        HAS_PARTIAL=partial_dq is not None,
        BLOCK_T=part.tokens(config),
        BLOCK_N=config.keys,
    )
    return d_query


def depth_backward(
    part: KernelCall,
    rows: QueryRows,
    bounds: jax.Array,
    dq_dtype: Any,
    depth_grads: ArrayPair | None,
    *,
    want_depth: bool,
    config: TileConfig | None = None,
) -> tuple[jax.Array, ArrayPair | None]:
    """(dq in `dq_dtype`; the slots' gradients, in `depth_grads` if given)."""
    from pallas_kernels.triton_gpu.depth_backward import depth_backward_kernel

    config = part.config("depth_backward", config)
    depth_key, depth_value = part.operands.depth_key, part.operands.depth_value
    dq = _like(rows.query.shape, dq_dtype)
    old, new, aliases = _running(part, depth_grads, want_depth, first_input=8, first_output=1)
    static = part.operands.depth_length is None and part.options.depth_window is None
    d_query, *d_depth = launch.call(
        depth_backward_kernel,
        [*rows, depth_key, depth_value, bounds, part.segments[0], *old],
        [dq, *new],
        part.slot_grid(config),
        config,
        aliases=aliases,
        **part.depth_constants(bounds),
        SLOTS=depth_key.shape[0],
        ALL_SLOTS=static,
        WANT_DEPTH=want_depth,
        ADD=bool(aliases),
        **part.slot_blocks(config),
    )
    return d_query, (d_depth[0], d_depth[1]) if want_depth else None


def _running(
    part: KernelCall,
    depth_grads: ArrayPair | None,
    want_depth: bool,
    *,
    first_input: int,
    first_output: int,
) -> tuple[list[jax.Array], list[jax.ShapeDtypeStruct], dict[int, int]]:
    """Inputs, outputs and aliases for the slots' gradients."""
    slots = part.operands.depth_key
    if not want_depth:
        return [_placeholder(slots.dtype)] * 2, [_like((1,), slots.dtype)] * 2, {}
    if depth_grads is None:
        return [_placeholder(slots.dtype)] * 2, [_like(slots.shape, slots.dtype)] * 2, {}
    aliases = {first_input + i: first_output + i for i in range(2)}
    return list(depth_grads), [_like(x.shape, x.dtype) for x in depth_grads], aliases


def chunk_backward(
    part: KernelCall,
    rows: QueryRows,
    bounds: jax.Array,
    dq_dtype: Any,
    depth_grads: ArrayPair | None,
    *,
    want_depth: bool,
) -> tuple[jax.Array, ArrayPair | None]:
    """As `depth_backward`, for chunk-visible slots."""
    d_query = chunk_dq(part, rows, bounds, dq_dtype)
    return d_query, chunk_dkv(part, rows, bounds, depth_grads) if want_depth else None


def chunk_dq(
    part: KernelCall,
    rows: QueryRows,
    bounds: jax.Array,
    dq_dtype: Any,
    config: TileConfig | None = None,
) -> jax.Array:
    from pallas_kernels.triton_gpu.chunk_backward import chunk_dq_kernel

    config = part.config("chunk_dq", config)
    depth_key, depth_value = part.operands.depth_key, part.operands.depth_value
    (d_query,) = launch.call(
        chunk_dq_kernel,
        [*rows, depth_key, depth_value, bounds, part.segments[0]],
        [_like(rows.query.shape, dq_dtype)],
        part.row_grid(config),
        config,
        **part.depth_constants(bounds),
        CHUNK=part.options.depth_chunk,
        BLOCK_T=part.tokens(config),
        BLOCK_N=config.keys,
    )
    return d_query


def chunk_dkv(
    part: KernelCall,
    rows: QueryRows,
    bounds: jax.Array,
    depth_grads: ArrayPair | None,
    config: TileConfig | None = None,
) -> ArrayPair:
    from pallas_kernels.triton_gpu.chunk_backward import chunk_dkv_kernel

    config = part.config("chunk_dkv", config)
    depth_key, depth_value = part.operands.depth_key, part.operands.depth_value
    slots, batch, length, kv_heads, _ = depth_key.shape
    old, new, aliases = _running(part, depth_grads, True, first_input=8, first_output=0)
    d_key, d_value = launch.call(
        chunk_dkv_kernel,
        [*rows, depth_key, depth_value, bounds, part.segments[0], *old],
        new,
        (-(-length // config.keys) * slots, kv_heads, batch),
        config,
        aliases=aliases,
        **part.depth_constants(bounds),
        SLOTS=slots,
        CHUNK=part.options.depth_chunk,
        ADD=bool(aliases),
        BLOCK_T=part.tokens(config),
        BLOCK_N=config.keys,
    )
    return d_key, d_value
