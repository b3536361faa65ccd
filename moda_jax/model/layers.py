"""RMSNorm, linear maps, rotary positions and SwiGLU, as OLMo 2 has them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from moda_jax.config import ModelConfig
from pallas_kernels import platforms

Axes = tuple[str | None, ...]


def parameter(value: jax.Array, axes: Axes) -> nnx.Param:
    """A float32 parameter whose array axes are named for `sharding.RULES`."""
    assert value.ndim == len(axes)
    return nnx.Param(value, logical_axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last `len(shape)` axes, in float32, then back to x's dtype."""

    def __init__(self, shape: Sequence[int], axes: Axes, eps: float) -> None:
        self.scale = parameter(jnp.ones(shape, jnp.float32), axes)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...]
        over = tuple(range(-scale.ndim, 0))
        x_f32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_f32), axis=over, keepdims=True)
        return (x_f32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


class Linear(nnx.Module):
    """Contracts the last `len(inputs)` axes of x with a kernel [*inputs, *outputs]."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (*inputs.values(), *outputs.values())
        init = nnx.initializers.truncated_normal(config.init_std, lower=-3.0, upper=3.0)
        self.kernel = parameter(init(rngs.params(), shape, jnp.float32), (*inputs, *outputs))
        zeros = jnp.zeros(tuple(outputs.values()), jnp.float32)
        self.bias = nnx.data(parameter(zeros, (*outputs,)) if config.use_bias else None)
        self.num_inputs = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        out = jnp.tensordot(x, kernel, self.num_inputs)
        return out if self.bias is None else out + self.bias[...].astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        embed, mlp = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        self.gate = Linear(embed, mlp, config, rngs=rngs)
        self.up = Linear(embed, mlp, config, rngs=rngs)
        self.down = Linear(mlp, embed, config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def rope_table(
    positions_BxT: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, H/2], float32, of the angles position · theta^(-2i/H)."""
    exponent = jnp.arange(head_dim // 2, dtype=jnp.float32) * (-2.0 / head_dim)
    frequency = jnp.exp(exponent * math.log(theta))
    angle = positions_BxT[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


@jax.custom_vjp
def rotate(x_BxTxNxH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding, half-rotation: pairs are (i, i + H/2). In float32, back to x's dtype.

    Not differentiated in `rope`.
    """
    cos, sin = rope
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x_BxTxNxH.dtype)


def _rotate_back(rope: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple[jax.Array, None]:
    """The gradient turns the other way round.

    On a GPU the halves change places as an axis that is reversed: XLA makes that part of what reads
    it, the norm's gradient, and would write split halves to memory first. Without a word about the
    layout it would transpose everything up to the next matrix product.
    """
    cos, sin = rope
    if platforms.current() != "gpu":
        return rotate(d, (cos, -sin)), None
    halves = d.reshape(*d.shape[:-1], 2, -1).astype(jnp.float32)
    signs = jnp.asarray([[1.0], [-1.0]], jnp.float32)
    turned = halves * cos[..., None, :] + jnp.flip(halves, -2) * (signs * sin[..., None, :])
    layout = Layout(major_to_minor=tuple(range(d.ndim)))
    return with_layout_constraint(turned.reshape(d.shape).astype(d.dtype), layout), None


rotate.defvjp(lambda x, rope: (rotate(x, rope), rope), _rotate_back)


def compute_dtype(config: ModelConfig) -> Any:
    return jnp.dtype(config.compute_dtype)
