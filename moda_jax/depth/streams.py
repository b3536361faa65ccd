"""What hyper-connections and mHC have in common: n residual streams, mixed per token."""

import jax
import jax.numpy as jnp

from moda_jax.ops.sharding import constrain


def start_streams(x_BxTxD: jax.Array, num_streams: int) -> jax.Array:
    """[n, B, T, D]: copies of the embedding."""
    return constrain_streams(jnp.broadcast_to(x_BxTxD, (num_streams, *x_BxTxD.shape)))


def mix_streams(
    residual_ijxBxT: jax.Array, write_jxBxT: jax.Array, streams: jax.Array, branch: jax.Array
) -> jax.Array:
    """New stream j = write_j · branch + Σ_i residual_ij · stream_i, float32 sums."""
    mixed = (residual_ijxBxT[..., None] * streams[:, None].astype(jnp.float32)).sum(axis=0)
    new = mixed + write_jxBxT[..., None] * branch.astype(jnp.float32)
    return constrain_streams(new.astype(streams.dtype))


def read_streams(weight_ixBxT: jax.Array, streams: jax.Array) -> jax.Array:
    """Σ_i weight_i · stream_i, [B, T, D]."""
    out = (weight_ixBxT[..., None] * streams.astype(jnp.float32)).sum(axis=0)
    return constrain(out.astype(streams.dtype), "batch", None, None)


def sum_streams(streams: jax.Array) -> jax.Array:
    """What the head reads."""
    return streams.astype(jnp.float32).sum(axis=0).astype(streams.dtype)


def constrain_streams(streams: jax.Array) -> jax.Array:
    """Streams [n, B, T, D] are split as the batch is."""
    return constrain(streams, None, "batch", None, None)


def rms_normalize(x: jax.Array, eps: float, axes: int | tuple[int, ...] = -1) -> jax.Array:
    """x / rms(x) over `axes`, float32, without a scale."""
    x_f32 = x.astype(jnp.float32)
    return x_f32 * jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=axes, keepdims=True) + eps)
