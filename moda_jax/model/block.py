"""One layer in three pieces: before attention, attention (not here), after attention.

The stack differentiates the two outer pieces with JAX and calls the attention's own backward, so
that the slots' gradients need no cache per layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from moda_jax.config import ModelConfig
from moda_jax.model.layers import Linear, RMSNorm, SwiGLU, rotate
from moda_jax.ops.sharding import constrain

KeyValue = tuple[jax.Array, jax.Array]  # [B, T, K, H] each
Rope = tuple[jax.Array, jax.Array]


class AttentionInputs(NamedTuple):
    """What attention reads at a layer, and what it writes to the depth cache."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, T, K, H], after QK-norm and RoPE
    value: jax.Array  # [B, T, K, H]
    depth: KeyValue | None = None  # an own projection's; None: (key, value) are what is written


class KVProjection(nnx.Module):
    """Keys and values of the depth stream that are not the attention's own (Table 3, rows 4-5).

    Only writing layers have one. The block applies its own key norm and rotation to the keys.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        embed = {"embed": config.embed_dim}
        heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.key = Linear(embed, heads, config, rngs=rngs)
        self.value = Linear(embed, heads, config, rngs=rngs)


class Block(nnx.Module):
    """An OLMo2-style layer with the three norm placements."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        embed, size = {"embed": config.embed_dim}, {"head_dim": config.head_dim}
        heads = {"heads": config.num_heads} | size
        self.query = Linear(embed, heads, config, rngs=rngs)
        self.key_value = KVProjection(config, rngs=rngs)
        self.out = Linear(heads, embed, config, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs)
        self.attention_norm = RMSNorm((config.embed_dim,), (None,), config.norm_eps)
        self.mlp_norm = RMSNorm((config.embed_dim,), (None,), config.norm_eps)
        self.query_norm = _qk_norm(config, "heads", config.num_heads)
        self.key_norm = _qk_norm(config, "kv_heads", config.num_kv_heads)
        self.placement = config.norm_placement

    def before_attention(self, x_BxTxD: jax.Array, rope: Rope) -> tuple[AttentionInputs, jax.Array]:
        """Attention's inputs, and the [B, T, D] that they were projected from."""
        source = self.attention_norm(x_BxTxD) if self.placement == "pre" else x_BxTxD
        query = self.query(source)
        query = query if self.query_norm is None else self.query_norm(query)
        query = constrain(rotate(query, rope), "batch", None, "heads", None)
        return AttentionInputs(query, *self.keys_values(self.key_value, source, rope)), source

    def after_attention(
        self, x_BxTxD: jax.Array, out_BxTxNxH: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The layer's output, and the [B, T, D] that its FFN read."""
        x_BxTxD = self._join(x_BxTxD, self.out(out_BxTxNxH), self.attention_norm)
        source = self.mlp_norm(x_BxTxD) if self.placement == "pre" else x_BxTxD
        return self._join(x_BxTxD, self.mlp(source), self.mlp_norm), source

    def keys_values(
        self,
        projection: KVProjection,
        x_BxTxD: jax.Array,
        rope: Rope,
        through: Callable[[jax.Array], jax.Array] = lambda product: product,
    ) -> KeyValue:
        """Sequence and depth keys get the same norm and rotation.

        A query and the depth keys of its token share a position, so their rotations cancel; a key
        cached before its rotation would make depth scores depend on where the token stands.

        `through`: what stands between the keys' product and their norm, to keep it or to have it.
        """
        key, value = through(projection.key(x_BxTxD)), projection.value(x_BxTxD)
        key = key if self.key_norm is None else self.key_norm(key)
        axes = ("batch", None, "kv_heads", None)
        return constrain(rotate(key, rope), *axes), constrain(value, *axes)

    def _join(self, x_BxTxD: jax.Array, branch: jax.Array, norm: RMSNorm) -> jax.Array:
        if self.placement == "reordered":
            branch = norm(branch)
        x_BxTxD = constrain(x_BxTxD + branch, "batch", None, None)
        return norm(x_BxTxD) if self.placement == "post" else x_BxTxD


def _qk_norm(config: ModelConfig, name: str, heads: int) -> RMSNorm | None:
    if config.qk_norm == "none":
        return None
    if config.qk_norm == "head":
        return RMSNorm((config.head_dim,), (None,), config.norm_eps)
    return RMSNorm((heads, config.head_dim), (name, None), config.norm_eps)
