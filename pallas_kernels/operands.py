"""One call of the operator, as every backend receives it: checked, with defaults filled in.

Symbols: B batch, Tq/Tk/Td query, key and depth tokens, N query heads, K key/value heads, G = N/K,
H head size, S depth slots. Query head n reads key/value head n // G.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Operands(NamedTuple):
    """The arrays of a call; what a call does not use is None."""

    query: jax.Array  # [B, Tq, N, H]
    key: jax.Array | None  # [B, Tk, K, H]; None: depth-only
    value: jax.Array | None  # [B, Tk, K, H]
    depth_key: jax.Array | None  # [S, B, Td, K, H]; Td = Tq without depth_chunk
    depth_value: jax.Array | None  # [S, B, Td, K, H]
    depth_length: jax.Array | None = None  # int32 scalar; None: all S slots are visible
    query_segments: jax.Array | None = None  # [B, Tq] int32; 0 is padding
    key_segments: jax.Array | None = None  # [B, Tk] int32 (depth-only: [B, Td])
    query_offset: jax.Array | None = None  # [B] int32; None: 0
    kv_length: jax.Array | None = None  # [B] int32; None: Tk


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a call."""

    scale: float
    is_causal: bool = True
    depth_window: int | None = None  # None: every written slot is visible
    depth_reserved: int = 0
    depth_chunk: int | None = None  # None: a query reads its own token's slots only


class Gradients(NamedTuple):
    """Cotangents of the differentiable operands, in their shapes; None for a missing operand."""

    query: jax.Array
    key: jax.Array | None
    value: jax.Array | None
    depth_key: jax.Array | None
    depth_value: jax.Array | None


class KeptLayers(NamedTuple):
    """What gathering keeps of R layers: enough for the gradients of the slots that they read."""

    query: jax.Array  # [R, B, T, N, H]
    d_out: jax.Array  # [R, B, T, N, H], in the query's dtype
    rows: jax.Array  # [R, B, K, X] float32: lse and delta, in an order that is the backend's own


class MaskTokens(NamedTuple):
    """What a mask needs to know of the query or key tokens."""

    position: jax.Array  # [B or 1, T] int32
    segment: jax.Array | None  # [B, T] int32
    valid: jax.Array | None  # [B or 1, T] bool; None: all


def num_kv_heads(operands: Operands) -> int:
    """K, from the sequence keys or, depth-only, from the depth keys."""
    source = operands.depth_key if operands.key is None else operands.key
    assert source is not None
    return source.shape[-2]


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for the 16-bit types and float32; float64 stays (used by the tests' reference)."""
    return jnp.promote_types(jnp.float32, dtype)


def row_delta(
    out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array | None
) -> jax.Array:
    """rowsum(do o) - dlse [B, Tq, N], float32 or wider: ds = p (do v^T - delta)."""
    dtype = accumulator_dtype(out.dtype)
    delta = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1)
    if d_lse is not None:  # a row that sees nothing has lse = -inf, whatever cotangent it gets
        delta -= jnp.where(jnp.isneginf(lse), 0.0, d_lse.astype(dtype))
    return delta


def _positions(batch_offset: jax.Array | None, length: int) -> jax.Array:
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    return positions if batch_offset is None else batch_offset[:, None] + positions


def query_tokens(operands: Operands) -> MaskTokens:
    """Query i stands at query_offset + i; a query in segment 0 is padding and sees nothing."""
    segment = operands.query_segments
    position = _positions(operands.query_offset, operands.query.shape[1])
    return MaskTokens(position, segment, None if segment is None else segment != 0)


def key_tokens(operands: Operands) -> MaskTokens:
    """Sequence keys: position is the index; those at or after kv_length are invisible."""
    assert operands.key is not None
    position = _positions(None, operands.key.shape[1])
    valid = None if operands.kv_length is None else position < operands.kv_length[:, None]
    return MaskTokens(position, operands.key_segments, valid)


def depth_tokens(operands: Operands, chunk: int) -> MaskTokens:
    """Chunk-visible depth keys: index 0 stands at the start of the first query's chunk."""
    assert operands.depth_key is not None
    batch_size, length = operands.depth_key.shape[1:3]
    offset = operands.query_offset
    start = None if offset is None else offset // chunk * chunk
    position = _positions(start, length)
    segment = operands.key_segments
    if segment is None or start is None:
        # Without an offset the depth token axis is the query axis and has the query's segments.
        return MaskTokens(position, None if segment is None else operands.query_segments, None)
    if operands.key is not None:
        index = jnp.minimum(position, segment.shape[1] - 1)
        segment = jnp.take_along_axis(segment, jnp.broadcast_to(index, (batch_size, length)), 1)
    return MaskTokens(position, segment, None)


def visible_slots(
    operands: Operands, options: Options
) -> list[tuple[jax.Array | int, jax.Array | int]]:
    """Half-open ranges [start, stop) of visible slots: the reserved ones, then the window."""
    assert operands.depth_key is not None
    length = operands.depth_length
    stop: jax.Array | int = operands.depth_key.shape[0] if length is None else length
    if options.depth_window is None:
        return [(0, stop)]
    reserved, start = options.depth_reserved, stop - options.depth_window
    if isinstance(stop, int):
        reserved = min(reserved, stop)
        return [(0, reserved), (max(start, reserved), stop)]
    reserved_stop = jnp.minimum(reserved, stop)
    return [(0, reserved_stop), (jnp.maximum(start, reserved_stop), stop)]
