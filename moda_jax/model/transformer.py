"""The language model: embedding, scanned stack, final norm, head (Flax NNX)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import ModelConfig
from moda_jax.model.block import Block, KVProjection
from moda_jax.model.layers import Linear, RMSNorm, compute_dtype, parameter
from moda_jax.model.stack import StackParams, StackSpec, Tokens, run_stack, scan_layers
from moda_jax.ops.sharded_attention import ShardedAttention
from moda_jax.ops.sharding import constrain


class Transformer(nnx.Module):
    """An OLMo2-style decoder whose attention also reads the depth stream.

    Layers are stacked: their parameters have a leading axis [L, ...], those of the depth
    projections [W, ...] for the W layers that write (arXiv 2603.15619, Table 3).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        init = nnx.initializers.truncated_normal(config.init_std, lower=-3.0, upper=3.0)
        shape = (config.vocab_size, config.embed_dim)
        table = init(rngs.params(), shape, jnp.float32)
        self.embedding = parameter(table, ("vocab", "embed"))
        self.layers = _stacked(Block, config, config.num_layers, rngs)
        writers = config.depth_writers
        own_attention = writers and config.depth_attention_kv == "project"
        own_ffn = writers and config.depth_ffn_kv == "project"
        self.attention_kv = nnx.data(
            _stacked(KVProjection, config, writers, rngs) if own_attention else None
        )
        self.ffn_kv = nnx.data(_stacked(KVProjection, config, writers, rngs) if own_ffn else None)
        self.final_norm = RMSNorm((config.embed_dim,), (None,), config.norm_eps)
        embed, vocab = {"embed": config.embed_dim}, {"vocab": config.vocab_size}
        self.head = nnx.data(
            None if config.tie_embeddings else Linear(embed, vocab, config, rngs=rngs)
        )

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, T, V], float32, of the token after each of `tokens` [B, T] int32.

        segment_ids [B, T] int32: packed documents, 0 is padding; positions [B, T] int32: where the
        tokens stand in their document; None: 0 … T−1.
        """
        return self.logits(self.hidden(tokens, segment_ids=segment_ids, positions=positions))

    def hidden(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """The normed residual stream [B, T, D] that the head reads, in the compute dtype."""
        spec, params = self.stack()
        x = run_stack(spec, params, self.embed(tokens), _tokens(tokens, segment_ids, positions))
        return self.final_norm(x)

    def embed(self, tokens: jax.Array) -> jax.Array:
        table = self.embedding[...].astype(compute_dtype(self.config))
        return constrain(jnp.take(table, tokens, axis=0), "batch", None, None)

    def logits(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """[B, T, V]: products in the compute dtype, accumulated and returned in float32."""
        table, bias = self.head_weights()
        logits = jnp.matmul(
            hidden_BxTxD, table.astype(hidden_BxTxD.dtype), preferred_element_type=jnp.float32
        )
        return constrain(logits if bias is None else logits + bias, "batch", None, "vocab")

    def head_weights(self) -> tuple[jax.Array, jax.Array | None]:
        """The head's matrix [D, V] and bias [V] or None, float32 parameters."""
        if self.head is None:
            return self.embedding[...].T, None
        bias = self.head.bias
        return self.head.kernel[...], None if bias is None else bias[...]

    def stack(self) -> tuple[StackSpec, StackParams]:
        """The layers as (static structure, parameters), for `moda_jax.model.stack`."""
        # A projection's structure is the block's own key_value's, so one graph serves all.
        block, blocks = nnx.split(self.layers)
        projection, _ = nnx.split(self.layers.key_value)
        own = [
            None if module is None else nnx.to_pure_dict(nnx.state(module))
            for module in (self.attention_kv, self.ffn_kv)
        ]
        params = StackParams(nnx.to_pure_dict(blocks), *own)
        return StackSpec(self.config, block, projection), params

    def attention_mass(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """[L, 1+S] float32: mean attention mass on the sequence | on each depth slot, by layer.

        Means over heads and real tokens; each row sums to 1 (0 if there is no real token). A slot
        that a layer does not see has mass 0.
        """
        spec, params = self.stack()
        token_info = _tokens(tokens, segment_ids, positions)
        real = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0

        def attend(layer, inputs, cache, state):
            depth = {} if cache is None else cache.attention_kwargs()
            out, lse = ShardedAttention.of(
                inputs.query, inputs.key, inputs.value, **depth, segment_ids=segment_ids,
                implementation=self.config.attention,
            ).forward()  # fmt: skip
            return out, state, _mass(inputs.query, cache, lse, real)

        x = self.embed(tokens)
        return scan_layers(spec, params, x, token_info, attend, keep_slots=True)[2]


def _mass(query_BxTxNxH, cache, lse_BxTxN, real_BxT) -> jax.Array:
    """[1+S]: e^(z - lse) of each visible slot, averaged; the rest is the sequence's."""
    count = jnp.maximum(real_BxT.sum() * lse_BxTxN.shape[-1], 1)
    total = real_BxT.sum() * lse_BxTxN.shape[-1] / count
    if cache is None:
        return total[None].astype(jnp.float32)
    batch, length, heads, head_dim = query_BxTxNxH.shape
    kv_heads = cache.key.shape[-2]
    grouped = (batch, length, kv_heads, heads // kv_heads)
    scores = jnp.einsum(
        "btkgh,sbtkh->sbtkg", query_BxTxNxH.reshape(*grouped, head_dim), cache.key,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    weight = jnp.exp(scores * head_dim**-0.5 - lse_BxTxN.reshape(grouped))
    seen = cache.visible()[:, None, None, None, None]
    weight = jnp.where(seen & real_BxT[None, :, :, None, None], weight, 0.0)
    depth_S = weight.sum(axis=(1, 2, 3, 4)) / count
    return jnp.concatenate([(total - depth_S.sum())[None], depth_S])


def _tokens(tokens, segment_ids, positions) -> Tokens:
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return Tokens(positions, segment_ids)


def _stacked(module: type[Any], config: ModelConfig, count: int, rngs: nnx.Rngs) -> Any:
    """`count` modules as one, each parameter with a leading axis of that length."""
    keys = jax.random.split(rngs.params(), count)
    init = jax.vmap(lambda key: nnx.state(module(config, rngs=nnx.Rngs(key))))
    states = jax.jit(init)(keys)  # one compilation instead of one per operation
    template = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))
    graph, _ = nnx.split(template)
    merged = nnx.merge(graph, states)
    for _, param in nnx.iter_graph(merged):
        if isinstance(param, nnx.Param):
            param.set_metadata(logical_axes=("layers", *param.get_metadata()["logical_axes"]))
    return merged
