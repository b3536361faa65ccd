"""The backend's functions: which kernels a call takes, and the layouts they ask for."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu import common, schedule
from pallas_kernels.mosaic_tpu.backward import tokens_backward
from pallas_kernels.mosaic_tpu.blocks import Sides
from pallas_kernels.mosaic_tpu.depth_backward import depth_backward
from pallas_kernels.mosaic_tpu.depth_forward import depth_forward
from pallas_kernels.mosaic_tpu.forward import attend
from pallas_kernels.operands import (
    Gradients,
    Operands,
    Options,
    depth_tokens,
    num_kv_heads,
    row_delta,
    visible_slots,
)

_SUBLANES = 16  # rows of a 16-bit register: H, which stands in the rows, is padded to a multiple
_MAX_HEAD_DIM = 256


def unsupported_reason(operands: Operands, options: Options, platform: str) -> str | None:
    """See `contract.UnsupportedReason`."""
    if platform == "gpu":
        return "Mosaic TPU kernels need a TPU"
    dtype = operands.query.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {dtype}"
    head_dim = operands.query.shape[-1]
    if head_dim > _MAX_HEAD_DIM:
        return f"takes head sizes up to {_MAX_HEAD_DIM}, not {head_dim}"
    if 0 in operands.query.shape or (operands.key is not None and operands.key.shape[1] == 0):
        return "needs at least one row and one token"
    try:
        schedule.choose_tiles(_shape(operands, _key_length(operands)), options.depth_chunk)
    except ValueError as error:
        return str(error)
    return None


def forward(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """See `contract.Forward`."""
    return _one_by_one(functools.partial(_forward, options=options))(operands)


def backward(
    operands: Operands,
    options: Options,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array | None,
    depth_grads: tuple[jax.Array, jax.Array] | None = None,
    *,
    depth: bool = True,
) -> Gradients:
    """See `contract.Backward`."""
    assert depth or depth_grads is None
    call = functools.partial(_backward, options, want_depth=depth)
    return _one_by_one(call)(operands, out, lse, d_out, d_lse, depth_grads)


def _one_by_one(function: Any) -> Any:
    """Under vmap, call after call: a mapped prefetched scalar has no place in the grid."""
    return jax.custom_batching.sequential_vmap(function)


def _forward(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    head_dim, kv_heads = operands.query.shape[-1], num_kv_heads(operands)
    dtype, query = operands.query.dtype, _queries(operands.query, kv_heads)
    has_depth = operands.depth_key is not None and operands.depth_key.shape[0] > 0
    state = None
    if has_depth:
        # First, so that its output is read again under the sequence's products.
        state = _depth_forward(
            operands, options, query, dtype if operands.key is None else jnp.float32
        )
    if operands.key is not None:
        shape = _shape(operands, operands.key.shape[1])
        state = attend(
            query,
            _keys(operands.key)[None],
            _keys(operands.value)[None],
            _all_slots(1),
            _sequence_sides(operands),
            state,
            shape=shape,
            tiles=schedule.choose_tiles(shape),
            scale=options.scale,
            causal=options.is_causal,
            out_dtype=dtype,
        )
    if state is None:
        return jnp.zeros_like(operands.query), jnp.full(operands.query.shape[:3], -jnp.inf)
    return common.from_lanes(state[0])[..., :head_dim], common.from_lanes(state[1])


def _depth_forward(operands, options, query, out_dtype) -> tuple[jax.Array, jax.Array]:
    slots = common.slot_scalars(visible_slots(operands, options))
    keys = _keys(operands.depth_key), _keys(operands.depth_value)
    shape = _shape(operands, keys[0].shape[-1])
    settings: dict[str, Any] = {"scale": options.scale, "out_dtype": out_dtype}
    if options.depth_chunk is not None:
        return attend(
            query,
            *keys,
            slots,
            _chunk_sides(operands, options.depth_chunk),
            None,
            causal=True,
            chunk=options.depth_chunk,
            shape=shape,
            tiles=schedule.choose_tiles(shape, options.depth_chunk),
            **settings,
        )
    fold = _Fold(shape)
    state = depth_forward(
        fold(query),
        fold(keys[0], 1),
        fold(keys[1], 1),
        slots,
        fold(operands.query_segments),
        shape=fold.shape,
        tiles=schedule.choose_tiles(fold.shape),
        **settings,
    )
    return fold.undo(state[0]), fold.undo(state[1])


class _Fold:
    """Rows of few tokens side by side in the lanes, for the depth kernels, which mix no tokens.

    [..., B, ..., T] becomes [..., 1, ..., B·T] where rows would leave most lanes empty: decoding.
    """

    def __init__(self, shape: schedule.CallShape):
        self.batch = shape.batch if shape.q_len < schedule.LANES else 1
        self.shape = shape
        if self.batch > 1:
            self.shape = dataclasses.replace(
                shape, batch=1, q_len=shape.batch * shape.q_len, k_len=shape.batch * shape.k_len
            )

    def __call__(self, x: Any, axis: int = 0) -> Any:
        """axis: of B."""
        if x is None or self.batch == 1:
            return x
        moved = jnp.moveaxis(x, axis, -2)
        return jnp.expand_dims(moved.reshape(*moved.shape[:-2], -1), axis)

    def undo(self, x: Any, axis: int = 0) -> Any:
        if x is None or self.batch == 1:
            return x
        flat = jnp.squeeze(x, axis)
        return jnp.moveaxis(flat.reshape(*flat.shape[:-1], self.batch, -1), -2, axis)


def _backward(options, operands, out, lse, d_out, d_lse, depth_grads, *, want_depth) -> Gradients:
    head_dim, kv_heads = operands.query.shape[-1], num_kv_heads(operands)
    dtype, key, depth_key = operands.query.dtype, operands.key, operands.depth_key
    delta = row_delta(out, lse, d_out, d_lse)
    rows = _LaneRows(
        _queries(operands.query, kv_heads),
        _queries(d_out.astype(dtype), kv_heads),
        _blind(common.to_lanes(lse, kv_heads)),
        common.to_lanes(delta, kv_heads),
    )
    d_query = d_keys = new = None
    if key is not None:
        shape = _shape(operands, key.shape[1])
        d_query, d_keys = tokens_backward(
            rows.query,
            _keys(key)[None],
            _keys(operands.value)[None],
            rows.d_out,
            rows.lse,
            rows.delta,
            _all_slots(1),
            _sequence_sides(operands),
            None,
            shape=shape,
            tiles=schedule.choose_tiles(shape),
            scale=options.scale,
            causal=options.is_causal,
        )
    if depth_key is not None and depth_key.shape[0] == 0:
        new = depth_grads or (depth_key, operands.depth_value)
    elif depth_key is not None:
        d_query, new = _depth_backward(operands, options, rows, d_query, depth_grads, want_depth)
    grads = [] if d_keys is None else [_tokens_first(x[0], head_dim) for x in d_keys]
    d_key, d_value = grads or (None, None)
    d_query = jnp.zeros_like(rows.query) if d_query is None else d_query.astype(dtype)
    return Gradients(
        common.from_lanes(d_query)[..., :head_dim],
        d_key,
        d_value,
        *(new if want_depth and new is not None else (None, None)),
    )


class _LaneRows(NamedTuple):
    """Of the queries, with tokens in the lanes."""

    query: jax.Array  # [B, K, G, H, T]
    d_out: jax.Array  # [B, K, G, H, T]
    lse: jax.Array  # [B, K, G, T]; +inf where a query sees nothing
    delta: jax.Array  # [B, K, G, T]


def _depth_backward(operands, options, rows, d_query, depth_grads, want_depth):
    """dq, the sequence part's included, and the slots' gradients [S, B, T, K, H]."""
    slots = common.slot_scalars(visible_slots(operands, options))
    keys = _keys(operands.depth_key), _keys(operands.depth_value)
    shape = _shape(operands, keys[0].shape[-1])
    grads = None
    if depth_grads is not None:
        grads = _keys(depth_grads[0]), _keys(depth_grads[1])
    elif want_depth and not (operands.depth_length is None and options.depth_window is None):
        grads = jnp.zeros_like(keys[0]), jnp.zeros_like(keys[1])  # invisible slots keep gradient 0
    if options.depth_chunk is None:
        fold = _Fold(shape)
        d_query, new = depth_backward(
            fold(rows.query),
            fold(keys[0], 1),
            fold(keys[1], 1),
            fold(rows.d_out),
            fold(rows.lse),
            fold(rows.delta),
            slots,
            fold(d_query),
            grads and (fold(grads[0], 1), fold(grads[1], 1)),
            shape=fold.shape,
            tiles=schedule.choose_tiles(fold.shape),
            scale=options.scale,
            want_depth=want_depth,
        )
        d_query = fold.undo(d_query)
        new = new and (fold.undo(new[0], 1), fold.undo(new[1], 1))
    else:
        chunk = options.depth_chunk
        d_chunk, new = tokens_backward(
            rows.query,
            *keys,
            rows.d_out,
            rows.lse,
            rows.delta,
            slots,
            _chunk_sides(operands, chunk),
            grads,
            causal=True,
            chunk=chunk,
            want_keys=want_depth,
            shape=shape,
            tiles=schedule.choose_tiles(shape, chunk),
            scale=options.scale,
        )
        d_query = d_chunk if d_query is None else d_query + d_chunk
    if new is None:
        return d_query, None
    return d_query, tuple(_tokens_first(x, operands.query.shape[-1]) for x in new)


# --- shapes, layouts and masks --------------------------------------------------------------------


def _shape(operands: Operands, k_len: int) -> schedule.CallShape:
    batch, q_len, heads, head_dim = operands.query.shape
    kv_heads = num_kv_heads(operands)
    return schedule.CallShape(
        batch,
        q_len,
        k_len,
        kv_heads,
        heads // kv_heads,
        head_dim + -head_dim % _SUBLANES,
        operands.query.dtype.itemsize,
    )


def _key_length(operands: Operands) -> int:
    return operands.query.shape[1] if operands.key is None else operands.key.shape[1]


def _pad_head_dim(x: jax.Array) -> jax.Array:
    """Zeros up to a whole number of rows: scores and values do not change."""
    missing = -x.shape[-1] % _SUBLANES
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _queries(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, G, H, T]."""
    return common.to_lanes(_pad_head_dim(x), kv_heads)


def _keys(x: jax.Array | None) -> jax.Array:
    """[..., T, K, H] -> [..., K, H, T]."""
    assert x is not None
    return common.keys_to_lanes(_pad_head_dim(x))


def _tokens_first(x: jax.Array, head_dim: int) -> jax.Array:
    """The inverse of `_keys`."""
    return common.keys_from_lanes(x)[..., :head_dim]


def _blind(lse: jax.Array) -> jax.Array:
    """+inf in place of -inf: the weights 2^(z - lse) of a query that sees nothing are then 0."""
    return jnp.where(jnp.isneginf(lse), jnp.inf, lse)


def _all_slots(count: int) -> jax.Array:
    return common.slot_scalars([(0, count)])


def _sequence_sides(operands: Operands) -> Sides:
    return Sides(
        operands.query_offset,
        None,
        operands.kv_length,
        operands.query_segments,
        operands.key_segments,
    )


def _chunk_sides(operands: Operands, chunk: int) -> Sides:
    offset = operands.query_offset
    base = None if offset is None else offset // chunk * chunk
    segments = depth_tokens(operands, chunk).segment
    return Sides(offset, base, None, operands.query_segments, segments)
