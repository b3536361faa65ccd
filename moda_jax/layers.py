"""Embedding, RMSNorm, linear maps and rotary positions; parameters by name."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from moda_jax.config import ModelConfig
from pallas_kernels import platforms
from pallas_kernels.varying import vary_like

Axes = tuple[str | None, ...]


def parameter(value: jax.Array, axes: Axes) -> nnx.Param:
    """A float32 parameter whose array axes are named for `sharding.RULES`."""
    assert value.ndim == len(axes)
    # With its dtype said, the value is not weakly typed: a weak one would turn strong with the
    # first optimizer step, and everything that takes parameters would be compiled again.
    return nnx.Param(jnp.asarray(value, jnp.float32), logical_axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last `len(shape)` axes, in float32, then back to x's dtype.

    Without `has_scale` the scale is 1, and there is no parameter.
    """

    def __init__(
        self, shape: Sequence[int], axes: Axes, eps: float, *, has_scale: bool = True
    ) -> None:
        ones = jnp.ones(shape, jnp.float32)
        self.scale = nnx.data(parameter(ones, axes) if has_scale else None)
        self.num_axes = len(shape)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = 1.0 if self.scale is None else self.scale[...]
        over = tuple(range(-self.num_axes, 0))
        x_f32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_f32), axis=over, keepdims=True)
        return (x_f32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


class Linear(nnx.Module):
    """Contracts the last `len(inputs)` axes of x with a kernel [*inputs, *outputs].

    Without `use_bias` the config says whether there is a bias.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        use_bias: bool | None = None,
    ) -> None:
        shape = (*inputs.values(), *outputs.values())
        init = nnx.initializers.truncated_normal(config.init_std, lower=-3.0, upper=3.0)
        self.kernel = parameter(init(rngs.params(), shape, jnp.float32), (*inputs, *outputs))
        zeros = jnp.zeros(tuple(outputs.values()), jnp.float32)
        has_bias = config.use_bias if use_bias is None else use_bias
        self.bias = nnx.data(parameter(zeros, (*outputs,)) if has_bias else None)
        self.num_inputs = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        out = jnp.tensordot(x, kernel, self.num_inputs)
        return out if self.bias is None else add_bias(out, self.bias[...])


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias in x's dtype; the bias's gradient, a sum over all tokens, is summed in float32."""
    return _add_bias(*vary_like((x, bias), (x, bias)))


@jax.custom_vjp
def _add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.astype(x.dtype)


def _add_bias_backward(bias: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    over = tuple(range(d.ndim - bias.ndim))
    return d, jnp.sum(d, axis=over, dtype=jnp.float32).astype(bias.dtype)


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), bias), _add_bias_backward)


class KVProjection(nnx.Module):
    """Keys and values [..., K, H] of x [..., D]."""

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, use_bias: bool | None = None
    ) -> None:
        embed = {"embed": config.embed_dim}
        heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.key = Linear(embed, heads, config, rngs=rngs, use_bias=use_bias)
        self.value = Linear(embed, heads, config, rngs=rngs, use_bias=use_bias)


_CHUNK = 512
"""Tokens whose embedding gradients one matrix product adds up before they are scattered."""


def lookup(table_VxD: jax.Array, ids_BxT: jax.Array, dtype: Any) -> jax.Array:
    """Rows [B, T, D] of a float32 table by int32 ids, in `dtype`; NaN outside of 0 … V−1.

    The table's gradient is summed in float32, whatever `dtype` is: a frequent token's is a sum of
    thousands of rows, to which a bfloat16 sum would soon add nothing more.
    """
    return _lookup(*vary_like((table_VxD, ids_BxT), (table_VxD, ids_BxT)), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table: jax.Array, ids: jax.Array, dtype: Any) -> jax.Array:
    ids = jnp.where(ids < 0, table.shape[0], ids)  # NumPy's -1 would be the last row
    return jnp.take(table.astype(dtype), ids, axis=0, mode="fill")


def _lookup_forward(table: jax.Array, ids: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    # The empty array says how many rows there are.
    return _lookup(table, ids, dtype), (ids, jnp.zeros((table.shape[0], 0), table.dtype))


def _lookup_backward(_: Any, kept: Any, d_BxTxD: jax.Array) -> tuple[jax.Array, None]:
    """On accelerators a scatter whose updates meet at one row waits for each of them in turn.

    Token frequencies follow Zipf's law, so they meet often. Chunks are added up first.
    """
    ids, rows = kept
    ids, d = (ids, d_BxTxD) if platforms.current() == "cpu" else sum_by_id(ids, d_BxTxD, len(rows))
    zeros = vary_like(jnp.zeros((len(rows), d.shape[-1]), jnp.float32), d)
    ids = jnp.where(ids < 0, len(rows), ids)
    return zeros.at[ids].add(d.astype(jnp.float32), mode="drop").astype(rows.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def sum_by_id(
    ids_BxT: jax.Array, d_BxTxD: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Adds up rows of equal ids within chunks of a sequence, in float32, by a matrix product.

    The sum stands where its id comes first in the chunk; everywhere else the id is `vocab_size`,
    and the row means nothing. One row that is not finite reaches every sum of its chunk.

    Returns (ids [B, T′], sums [B, T′, D] float32), with T rounded up to whole chunks.
    """
    (batch, length), chunk = ids_BxT.shape, min(_CHUNK, ids_BxT.shape[1])
    chunks = -(-length // chunk)
    padding = ((0, 0), (0, chunks * chunk - length))
    ids = jnp.pad(ids_BxT, padding, constant_values=vocab_size)
    ids = ids.reshape(batch, chunks, chunk)
    d = jnp.pad(d_BxTxD, (*padding, (0, 0))).reshape(batch, chunks, chunk, -1)
    same = ids[..., :, None] == ids[..., None, :]
    sums = jnp.einsum(
        "bcij,bcjd->bcid",
        same.astype(d.dtype),
        d,
        precision=jax.lax.Precision.HIGHEST,  # TPUs would round a float32 gradient to bfloat16
        preferred_element_type=jnp.float32,
    )
    is_first = jnp.argmax(same, axis=-1) == jnp.arange(chunk)
    firsts = jnp.where(is_first, ids, vocab_size)
    return firsts.reshape(batch, -1), sums.reshape(batch, chunks * chunk, -1)


def stacked(make: Callable[[nnx.Rngs], Any], count: int, rngs: nnx.Rngs) -> Any:
    """`count` modules as one, each parameter with a leading axis of that length."""
    keys = jax.random.split(rngs.params(), count)
    init = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))
    states = jax.jit(init)(keys)  # one compilation instead of one per operation
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    merged = nnx.merge(graph, states)
    for _, param in nnx.iter_graph(merged):
        if isinstance(param, nnx.Param):
            param.set_metadata(logical_axes=("layers", *param.get_metadata()["logical_axes"]))
    return merged


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
