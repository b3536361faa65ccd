"""Layouts, tile schedule and masks that the forward and the backward share.

Queries are laid out [B, K, T, G, H] so that a tile of tokens, with its G heads as rows, meets a
key tile [B, K, T, H] in one batched matrix product: no copies of K and V per query head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import platforms
from pallas_kernels.operands import MaskTokens, accumulator_dtype


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Tile sizes; `choose_config` picks them from the shapes."""

    q_block: int
    """Tokens of a query tile."""
    k_block: int
    """Tokens of a key tile."""


def choose_config(num_rows: int, q_len: int, k_len: int, chunk: int | None = None) -> XlaConfig:
    """Largest tile whose float32 scores fit the budget. num_rows is B·N.

    A CPU wants the scores in its cache; an accelerator wants few and large products.

    With `chunk` only tiles on the diagonal are needed: a tile is then a few chunks, so that little
    of it is masked.
    """
    on_cpu = platforms.current() == "cpu"
    smallest, bytes_of_scores = (64, 2 * 2**20) if on_cpu else (128, 64 * 2**20)
    block = 1024
    while block > smallest and num_rows * block * block * 4 > bytes_of_scores:
        block //= 2
    if chunk is not None:
        block = min(block, max(128 // chunk, 1) * chunk)
    return XlaConfig(q_block=min(block, q_len), k_block=min(block, k_len))


def to_heads_first(x_BxTxNxH: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, ...] -> [B, K, T, G, ...]."""
    batch, length, heads = x_BxTxNxH.shape[:3]
    grouped = x_BxTxNxH.reshape(batch, length, kv_heads, heads // kv_heads, *x_BxTxNxH.shape[3:])
    return jnp.moveaxis(grouped, 2, 1)


def to_tokens_first(x_BxKxTxGxH: jax.Array) -> jax.Array:
    """[B, K, T, G, ...] -> [B, T, N, ...]."""
    batch, kv_heads, length, group = x_BxKxTxGxH.shape[:4]
    x_BxTxKxGxH = jnp.moveaxis(x_BxKxTxGxH, 1, 2)
    return x_BxTxKxGxH.reshape(batch, length, kv_heads * group, *x_BxKxTxGxH.shape[4:])


def pad_axis(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros at the end of `axis` up to a multiple."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding) if padding[axis][1] else x


def pad_side(tokens: MaskTokens, block: int) -> MaskTokens:
    """Pads tokens to whole tiles; the padding is invalid."""
    length = tokens.position.shape[1]
    valid = tokens.valid
    if length % block:
        valid = jnp.ones((1, length), bool) if valid is None else valid
        valid = pad_axis(valid, 1, block)
    segment = None if tokens.segment is None else pad_axis(tokens.segment, 1, block)
    return MaskTokens(pad_axis(tokens.position, 1, block), segment, valid)


def take_tile(x: jax.Array, axis: int, index: jax.Array | int, block: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * block, block, axis)


def add_tile(x: jax.Array, axis: int, index: jax.Array | int, tile: jax.Array) -> jax.Array:
    """x[tile index] += tile, in place where XLA can."""
    start = index * tile.shape[axis]
    old = lax.dynamic_slice_in_dim(x, start, tile.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(x, old + tile.astype(x.dtype), start, axis)


def take_side(side: MaskTokens, index: jax.Array | int, block: int) -> MaskTokens:
    return MaskTokens(*(None if x is None else take_tile(x, 1, index, block) for x in side))


def tile_mask(
    query: MaskTokens, key: MaskTokens, *, causal: bool, chunk: int | None
) -> jax.Array | None:
    """[B or 1, 1, bq, 1, bk]: which keys of a tile its queries see; None: all of them."""
    q_pos, k_pos = query.position[:, :, None], key.position[:, None, :]
    terms = []
    if causal:
        terms.append(k_pos <= q_pos)
    if chunk is not None:
        terms.append(k_pos // chunk == q_pos // chunk)
    if query.segment is not None and key.segment is not None:
        terms.append(query.segment[:, :, None] == key.segment[:, None, :])
    if query.valid is not None:
        terms.append(query.valid[:, :, None])
    if key.valid is not None:
        terms.append(key.valid[:, None, :])
    if not terms:
        return None
    mask = terms[0]
    for term in terms[1:]:
        mask = mask & term
    return mask[:, None, :, None, :]


def tile_schedule(
    q_len: int,
    k_len: int,
    blocks: tuple[int, int],
    *,
    causal: bool,
    chunk: int | None,
    offset_known: bool,
) -> np.ndarray:
    """[pairs, 2] int32 (query tile, key tile), key-major, without pairs that are masked wholly.

    Key-major, so that the first `n` key tiles are a prefix. With a query offset that is only known
    at run time, every pair is kept.
    """
    q_block, k_block = blocks
    num_q, num_k = -(-q_len // q_block), -(-k_len // k_block)
    pairs = [(i, j) for j in range(num_k) for i in range(num_q)]
    if offset_known and causal:
        pairs = [(i, j) for i, j in pairs if j * k_block < (i + 1) * q_block]
    if offset_known and chunk is not None:  # the last token of tile j must reach tile i's chunk
        pairs = [
            (i, j) for i, j in pairs if ((j + 1) * k_block - 1) // chunk >= i * q_block // chunk
        ]
    return np.asarray(pairs, np.int32).reshape(-1, 2)


def for_each_pair(
    schedule: np.ndarray,
    num_pairs: jax.Array | int,
    body: Callable[[Any, Any, Any], Any],
    init: Any,
) -> Any:
    """Folds body(i, j, carry) over the first `num_pairs` of the schedule."""
    if len(schedule) == 1 and isinstance(num_pairs, int):
        return body(0, 0, init) if num_pairs else init
    if not len(schedule):
        return init
    table = jnp.asarray(schedule)
    return lax.fori_loop(0, num_pairs, lambda n, carry: body(table[n, 0], table[n, 1], carry), init)


def for_each_slot(
    ranges: list[tuple[jax.Array | int, jax.Array | int]],
    body: Callable[[Any, Any], Any],
    init: Any,
) -> Any:
    """Folds body(slot, carry) over the slots of half-open ranges; no other slot is touched."""
    carry = init
    for start, stop in ranges:
        carry = lax.fori_loop(start, stop, body, carry)
    return carry


def dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum with float32 (or wider) accumulation; float32 operands are multiplied in full."""
    accumulator = accumulator_dtype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == accumulator else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=accumulator)


def weights(scores: jax.Array, lse: jax.Array) -> jax.Array:
    """e^(scores - lse), the weights of a softmax; see `contract.Backward` for their error.

    At most 1: where |lse| passes 1e9, rounding alone would make them infinite, and gradients NaN.
    """
    return jnp.exp(jnp.minimum(scores - lse, 0.0))
