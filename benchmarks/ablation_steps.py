"""The steps of `benchmarks.ablation`: one mathematics, five ways to read the depth slots.

The steps in the middle are the kernels of pallas_kernels/triton_gpu for sequences, over the paper's
flat axis of T·S depth keys; what a step does not know yet, it does not use of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.attention import ours, with_gradients
from pallas_kernels.operands import Operands, Options, row_delta
from pallas_kernels.triton_gpu import calls, tiles

Arrays = tuple[jax.Array, ...]

TILE = tiles.TileConfig(rows=64, keys=64, num_warps=4, num_stages=2)
"""Of the depth part: the paper's chunk of 64 query rows."""


class AblationStep(NamedTuple):
    """One way to compute o and the gradients."""

    run: Callable[[Arrays, jax.Array], tuple[jax.Array, Arrays]]
    """((query, key, value, depth_key, depth_value), do) -> (o, gradients)."""
    flat: bool
    """Whether depth keys and values are [B, T·S, K, H], a token's slots side by side, instead of
    the operator's [S, B, T, K, H]."""
    paper: float | None
    """The paper's milliseconds on an A100, forward and backward (Table 7)."""


def flatten(x: jax.Array) -> jax.Array:
    """[S, B, T, K, H] -> [B, T·S, K, H]."""
    slots, batch, length, kv_heads, head_dim = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(batch, length * slots, kv_heads, head_dim)


def unflatten(x: jax.Array, slots: int) -> jax.Array:
    """The inverse of `flatten`."""
    batch, total, *rest = x.shape
    return jnp.moveaxis(x.reshape(batch, total // slots, slots, *rest), 2, 0)


def naive_loop(query, key, value, depth_key, depth_value):
    """o [B, T, N, H]: query token after query token, whose slots are gathered one by one."""
    batch, length, _, head_dim = query.shape
    kv_heads = key.shape[2]
    # In float32 also because the loop's backward adds dk and dv up token by token.
    queries, keys, values, depth_keys, depth_values = (
        x.astype(jnp.float32) for x in (query, key, value, depth_key, depth_value)
    )
    queries = queries.reshape(batch, length, kv_heads, -1, head_dim) * head_dim**-0.5

    def attend(token):
        q, slot_keys, slot_values = (
            lax.dynamic_index_in_dim(x, token, axis, keepdims=False)
            for x, axis in ((queries, 1), (depth_keys, 2), (depth_values, 2))
        )
        seen = jnp.arange(length) <= token
        sequence = jnp.where(seen, jnp.einsum("bkgh,btkh->bkgt", q, keys), -jnp.inf)
        depth = jnp.einsum("bkgh,sbkh->bkgs", q, slot_keys)
        weights = jax.nn.softmax(jnp.concatenate([sequence, depth], axis=-1), axis=-1)
        out = jnp.einsum("bkgt,btkh->bkgh", weights[..., :length], values)
        return out + jnp.einsum("bkgs,sbkh->bkgh", weights[..., length:], slot_values)

    out = lax.map(attend, jnp.arange(length))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape).astype(query.dtype)


class _WholeAxis(calls.KernelCall):
    """Every tile meets every block, and masks it."""

    def _met(self, segments, tile, others, block):
        count = -(-segments.shape[1] // tile)
        bounds = jnp.array([0, -(-others.shape[1] // block), 0, 0], jnp.int32)
        return jnp.broadcast_to(bounds, (self.batch, count, 4))


@dataclasses.dataclass(frozen=True)
class FlatDepth:
    """Depth keys on one flat axis, attended to by the sequence's flash kernels: a token is a
    segment, to which its query rows and its slots belong.
    """

    whole_axis: bool
    """Tiles go along the whole axis, not just along their own tokens' slots."""
    by_group: bool
    """A tile holds the G query heads of a key/value head, not G times as many tokens of one."""

    def __call__(self, arrays: Arrays, d_out: jax.Array) -> tuple[jax.Array, Arrays]:
        query, key, value, depth_key, depth_value = arrays
        scale = query.shape[-1] ** -0.5
        depth = self.part(query, depth_key, depth_value, scale)
        sequence = calls.KernelCall(Operands(query, key, value, None, None), Options(scale), scale)
        out, lse = calls.sequence_forward(depth, None, TILE)
        out, lse = calls.sequence_forward(sequence, (out.astype(jnp.float32), lse))
        rows = calls.QueryRows(query, d_out, lse, row_delta(out, lse, d_out, None))
        d_slots = calls.sequence_dkv(depth, rows, TILE)
        d_query = calls.sequence_dq(depth, rows, None, TILE).astype(jnp.float32)
        d_query = calls.sequence_dq(sequence, rows, d_query)
        grads = d_query, *calls.sequence_dkv(sequence, rows)
        return out, (*grads, *(self.add_copies(x, depth_key.shape) for x in d_slots))

    def part(
        self, query: jax.Array, depth_key: jax.Array, depth_value: jax.Array, scale: float
    ) -> calls.KernelCall:
        batch, length, heads, _ = query.shape
        total, kv_heads = depth_key.shape[1:3]
        if not self.by_group:
            depth_key, depth_value = (
                jnp.repeat(x, heads // kv_heads, axis=2) for x in (depth_key, depth_value)
            )
        tokens = jnp.arange(1, length + 1, dtype=jnp.int32)
        operands = Operands(
            query,
            depth_key,
            depth_value,
            None,
            None,
            query_segments=jnp.broadcast_to(tokens, (batch, length)),
            key_segments=jnp.broadcast_to(jnp.repeat(tokens, total // length), (batch, total)),
        )
        kind: Any = _WholeAxis if self.whole_axis else calls.KernelCall
        return kind(operands, Options(scale, is_causal=False), scale)

    def add_copies(self, gradient: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """[B, T·S, N, H] or [B, T·S, K, H] -> `shape`, the latter."""
        if self.by_group:
            return gradient
        batch, total, kv_heads, head_dim = shape
        copies = gradient.reshape(batch, total, kv_heads, -1, head_dim)
        return copies.sum(3, dtype=jnp.float32).astype(gradient.dtype)


STEPS = {
    "naive loop": AblationStep(with_gradients(naive_loop), False, 2128.9),
    "flash-compatible": AblationStep(FlatDepth(whole_axis=True, by_group=False), True, 13.102),
    "chunk-aware": AblationStep(FlatDepth(whole_axis=False, by_group=False), True, 6.286),
    "group-aware": AblationStep(FlatDepth(whole_axis=False, by_group=True), True, 1.460),
    "as shipped": AblationStep(with_gradients(ours("triton")), False, None),
}
