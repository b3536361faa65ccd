"""A bias on depth scores, from two calls of the operator that has none.

    z_depth[s] = scale · q·kd[s] + b      b [N], a number for each query head

The softmax over sequence and depth is the two partial ones, merged with their lse; the depth part's
is b larger. Backward each part gets the merged o and lse. The depth part's weights are
e^(scale · q·kd - (lse - b)), so its lse is the merged one without b. It costs a second call
forward and two backward, which read depth slots alone; b lets a trained model without depth slots
begin with weights near zero on them (`MoDAConfig.score_bias`).
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.contract import ArrayPair
from pallas_kernels.operands import Gradients, Operands, Options

if TYPE_CHECKING:
    from moda_jax.ops.sharded_attention import ShardedAttention

Partial = tuple[jax.Array, jax.Array]
"""(o, lse) of a part."""


def forward(call: "ShardedAttention", bias: jax.Array) -> Partial:
    """(o, lse) of both parts under one softmax."""
    sequence, depth = (part.forward() for part in _parts(call))
    lse = jnp.logaddexp(sequence[1], depth[1] + bias)
    weights = _weight(sequence[1], lse), _weight(depth[1] + bias, lse)
    out = sum(
        weight[..., None] * o.astype(weight.dtype)
        for weight, (o, _) in zip(weights, (sequence, depth), strict=True)
    )
    return jnp.asarray(out).astype(sequence[0].dtype), lse


def gradients(
    call: "ShardedAttention",
    bias: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    depth_grads: ArrayPair | None,
) -> Gradients:
    """The backward of `forward` but for the bias."""
    sequence, depth = _parts(call)
    of_sequence = sequence.gradients(out, lse, d_out, None)
    of_depth = depth.gradients(out, lse - bias, d_out, depth_grads)
    query = of_sequence.query.astype(lse.dtype) + of_depth.query.astype(lse.dtype)
    return Gradients(
        query.astype(of_sequence.query.dtype),
        of_sequence.key,
        of_sequence.value,
        of_depth.depth_key,
        of_depth.depth_value,
    )


def bias_gradient(
    call: "ShardedAttention", bias: jax.Array, out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> jax.Array:
    """[N] float32: Σ over tokens of w (do·o_depth - do·o), w the weight of all depth slots."""
    _, depth = _parts(call)
    depth_out, depth_lse = depth.forward()
    weight = _weight(depth_lse + bias, lse)
    difference = depth_out.astype(weight.dtype) - out.astype(weight.dtype)
    per_token = weight * jnp.sum(d_out.astype(weight.dtype) * difference, axis=-1)
    return per_token.sum(axis=(0, 1))


def _weight(part_lse: jax.Array, lse: jax.Array) -> jax.Array:
    """0 where nothing is visible."""
    return jnp.where(
        jnp.isneginf(lse), 0.0, jnp.exp(part_lse - jnp.where(jnp.isneginf(lse), 0.0, lse))
    )


def _parts(call: "ShardedAttention") -> tuple["ShardedAttention", "ShardedAttention"]:
    """The same call over the sequence alone, and over depth alone."""
    operands, options = call.operands, call.options
    sequence = operands._replace(depth_key=None, depth_value=None, depth_length=None)
    depth = Operands(
        operands.query,
        None,
        None,
        operands.depth_key,
        operands.depth_value,
        operands.depth_length,
        operands.query_segments,
        operands.query_segments,
    )
    plain = Options(options.scale, options.is_causal)
    return (
        dataclasses.replace(call, operands=sequence, options=plain, depth_bias=None),
        dataclasses.replace(call, operands=depth, depth_bias=None),
    )
