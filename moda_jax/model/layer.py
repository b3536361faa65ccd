"""One layer: read → attention → write → read → FFN → write."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import ModelConfig
from moda_jax.depth.mechanism import ATTENTION, FFN, Carry, Mechanism, Output, Step
from moda_jax.layers import KVProjection, Linear, RMSNorm, parameter, rotate
from moda_jax.ops.history import History
from moda_jax.ops.sharding import constrain

Keep = Callable[[jax.Array, str], jax.Array]
KeyValue = tuple[jax.Array, jax.Array]  # [B, T, K, H] each
Rope = tuple[jax.Array, jax.Array]


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        embed, mlp = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        self.gate = Linear(embed, mlp, config, rngs=rngs)
        self.up = Linear(embed, mlp, config, rngs=rngs)
        self.down = Linear(mlp, embed, config, rngs=rngs)

    def __call__(self, x: jax.Array, keep: Keep) -> jax.Array:
        gate, up = keep(self.gate(x), "gate"), keep(self.up(x), "up")
        return self.down(jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    """An OLMo2-style layer with the three norm placements, for every way of using depth.

    pre: x + f(norm(x)); post: norm(x + f(x)); reordered: x + norm(f(x)), where "x +" is the
    mechanism's word for how a sublayer's output is written.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        embed, size = {"embed": config.embed_dim}, {"head_dim": config.head_dim}
        heads = {"heads": config.num_heads} | size
        self.query = Linear(embed, heads, config, rngs=rngs)
        self.key_value = KVProjection(config, rngs=rngs)
        self.out = Linear(heads, embed, config, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs)
        self.attention_norm = RMSNorm((config.embed_dim,), (None,), config.norm_eps)
        self.mlp_norm = RMSNorm((config.embed_dim,), (None,), config.norm_eps)
        by_reader = config.depth.reader_norms_keys
        self.query_norm = _qk_norm(config, "heads", config.num_heads)
        self.key_norm = _qk_norm(config, "kv_heads", config.num_kv_heads, has_scale=not by_reader)
        self.pair_scale = nnx.data(_pair_scale(config) if by_reader else None)
        self.placement = config.norm_placement

    def __call__(
        self, depth: Mechanism, weights: Any, step: Step, carry: Carry, history: History
    ) -> tuple[Carry, History]:
        """The carry and the history after this layer; `weights` are the mechanism's own."""
        with jax.named_scope("attention"):
            x, carry, history = depth.read(step, weights, ATTENTION, carry, history)
            source = self.attention_norm(x) if self.placement == "pre" else x
            query, key, value = self.query_key_value(source, step)
            view = depth.depth_view(step, weights, history)
            out, history = step.attend(query, key, value, history, depth=view)
            branch = self._branch(self.out(out), self.attention_norm, step.keep, "out")
            output = Output(branch, source, key, value)
            carry, history = depth.write(step, weights, ATTENTION, self, carry, history, output)
        with jax.named_scope("ffn"):
            x, carry, history = depth.read(step, weights, FFN, carry, history)
            source = self.mlp_norm(x) if self.placement == "pre" else x
            branch = self._branch(self.mlp(source, step.keep), self.mlp_norm, step.keep, "down")
            carry, history = depth.write(
                step, weights, FFN, self, carry, history, Output(branch, source)
            )
        return carry, history

    def query_key_value(
        self, source_BxTxD: jax.Array, step: Step
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query [B, T, N, H], key and value [B, T, K, H], normed and rotated."""
        query = step.keep(self.query(source_BxTxD), "query_product")
        query = query if self.query_norm is None else self.query_norm(query)
        query = query if self.pair_scale is None else self._scale_pairs(query)
        query = constrain(rotate(query, step.rope), "batch", None, "heads", None)

        def keep(product):
            return step.keep(product, "key_product")

        return query, *self._keys_values(self.key_value, source_BxTxD, step.rope, keep)

    def _scale_pairs(self, query_BxTxNxH: jax.Array) -> jax.Array:
        """Queries times the scale of the keys that they meet, of the sequence and of depth."""
        assert self.pair_scale is not None
        scale = self.pair_scale[...]  # [H/2] or [K, H/2]
        scale = jnp.concatenate([scale, scale], axis=-1)
        if scale.ndim == 2:
            scale = jnp.repeat(scale, query_BxTxNxH.shape[2] // scale.shape[0], axis=0)
        return (query_BxTxNxH.astype(jnp.float32) * scale).astype(query_BxTxNxH.dtype)

    def depth_keys_values(
        self, weights: Any, source_BxTxD: jax.Array, rope: Rope, keep: Callable
    ) -> KeyValue:
        """Keys and values of an own depth projection with `weights` like `key_value`'s.

        They get the same norm and rotation as the sequence's keys. A query and the depth keys of
        its token share a position, so their rotations cancel; a key without its rotation would make
        depth scores depend on where the token stands.
        """
        graph, _ = nnx.split(self.key_value)
        projection = nnx.merge(graph, cast(weights, source_BxTxD.dtype))
        return self._keys_values(projection, source_BxTxD, rope, keep)

    def join(self, x_BxTxD: jax.Array, branch: jax.Array, sublayer: int) -> jax.Array:
        """x + branch; in post-norm the norm of it."""
        x_BxTxD = constrain(x_BxTxD + branch, "batch", None, None)
        if self.placement != "post":
            return x_BxTxD
        return (self.attention_norm, self.mlp_norm)[sublayer](x_BxTxD)

    def _branch(self, product: jax.Array, norm: RMSNorm, keep: Keep, name: str) -> jax.Array:
        if self.placement != "reordered":
            return product
        return norm(keep(product, name))  # the norm's gradient needs the product

    def _keys_values(
        self, projection: KVProjection, x_BxTxD: jax.Array, rope: Rope, keep: Callable
    ) -> KeyValue:
        key, value = keep(projection.key(x_BxTxD)), projection.value(x_BxTxD)
        key = key if self.key_norm is None else self.key_norm(key)
        axes = ("batch", None, "kv_heads", None)
        return constrain(rotate(key, rope), *axes), constrain(value, *axes)


def cast(weights: Any, dtype: Any) -> Any:
    """Matrices and biases in the compute dtype; norms, gates and sums' weights stay float32."""

    def one(path, leaf):
        is_linear = getattr(path[-1], "key", None) in ("kernel", "bias")
        return leaf.astype(dtype) if is_linear else leaf

    return jax.tree_util.tree_map_with_path(one, weights)


def _qk_norm(
    config: ModelConfig, name: str, heads: int, *, has_scale: bool = True
) -> RMSNorm | None:
    if config.qk_norm == "none":
        return None
    if config.qk_norm == "head":
        return RMSNorm((config.head_dim,), (None,), config.norm_eps, has_scale=has_scale)
    return RMSNorm((heads, config.head_dim), (name, None), config.norm_eps, has_scale=has_scale)


def _pair_scale(config: ModelConfig) -> nnx.Param:
    """The key norm's scale by rotary pair, ones: [H/2], or [K, H/2] with a full QK-norm."""
    pairs = config.head_dim // 2
    if config.qk_norm == "head":
        return parameter(jnp.ones((pairs,), jnp.float32), (None,))
    return parameter(jnp.ones((config.num_kv_heads, pairs), jnp.float32), ("kv_heads", None))
