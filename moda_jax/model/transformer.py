"""The language model: embedding, scanned stack, final norm, head (Flax NNX)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moda_jax.config import ExecutionConfig, ModelConfig
from moda_jax.depth import make_mechanism
from moda_jax.depth.mechanism import GatherLayout, Mechanism, Step
from moda_jax.layers import Linear, RMSNorm, lookup, parameter, stacked
from moda_jax.model.execution import resolve_compute_dtype, resolve_execution
from moda_jax.model.layer import Layer, cast
from moda_jax.model.stack import (
    StackParams,
    StackSpec,
    TokenInfo,
    implementation,
    run_stack,
    scan_layers,
)
from moda_jax.ops.checks import check_array, check_integers, check_range, is_concrete
from moda_jax.ops.explicit import left_to_the_compiler, spec_of
from moda_jax.ops.history import History
from moda_jax.ops.sharded_attention import ShardedAttention
from moda_jax.ops.sharding import constrain


class Transformer(nnx.Module):
    """An OLMo2-style decoder with any way of using depth.

    Layers are stacked: their parameters have a leading axis [L, ...].

    Args:
      config: what is computed.
      rngs: for the initial parameters.
      execution: how it is computed; "auto" fields are resolved where the model is called.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        execution: ExecutionConfig = ExecutionConfig(),
    ) -> None:
        self.config, self.execution = config, execution
        mechanism = make_mechanism(config)
        init = nnx.initializers.truncated_normal(config.init_std, lower=-3.0, upper=3.0)
        shape = (config.vocab_size, config.embed_dim)
        table = init(rngs.params(), shape, jnp.float32)
        self.embedding = parameter(table, ("vocab", "embed"))
        self.layers = stacked(lambda rngs: Layer(config, rngs=rngs), config.num_layers, rngs)
        self.depth_layers = nnx.data(_depth_layers(mechanism, config, rngs))
        self.depth = nnx.data(mechanism.shared_parameters(rngs))
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
        tokens stand in their document; None: 0 … T−1. Tokens of segment 0 may have any id; their
        logits mean nothing.

        Raises ValueError on an id outside of 0 … V−1. Where ids are traced it cannot: then such a
        token's embedding is NaN, and so are logits of its row.
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
        tokens, info = self._checked(tokens, segment_ids, positions)
        graph, state = nnx.split(self)

        def run(state, tokens, info):
            model = nnx.merge(graph, state)
            spec, params = model.stack(tokens.shape)
            return model.final_norm(run_stack(spec, params, model.embed(tokens), info))

        return left_to_the_compiler(run, PartitionSpec(*spec_of(tokens), None))(state, tokens, info)

    def _checked(self, tokens, segment_ids, positions) -> tuple[jax.Array, TokenInfo]:
        """Checked tokens, id 0 where there is padding, and where they stand."""
        check_array("tokens", tokens, ("B", "T"))
        real = True if segment_ids is None else segment_ids != 0
        if is_concrete(tokens, real):
            check_range("tokens", tokens, 0, self.config.vocab_size - 1, where=real)
        info = _token_info(tokens, segment_ids, positions)
        tokens = tokens if segment_ids is None else jnp.where(info.segment_ids != 0, tokens, 0)
        return check_integers("tokens", tokens, ("B", "T")), info

    @property
    def compute_dtype(self) -> Any:
        """Of matrix products and of what layers pass on."""
        return jnp.dtype(resolve_compute_dtype(self.execution).compute_dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[B, T, D] in the compute dtype; NaN for ids outside of 0 … V−1, negative ones, too."""
        rows = lookup(self.embedding[...], tokens, self.compute_dtype)
        return constrain(rows, "batch", None, None)

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

    def stack(self, shape: tuple[int, ...] | None = None) -> tuple[StackSpec, StackParams]:
        """The layers as (static structure, parameters), for `moda_jax.model.stack`.

        shape: (B, T) of the batch, from which a remat policy of "auto" is chosen.
        """
        layer, layers = nnx.split(self.layers)
        depth_layer, own = None, None
        if self.depth_layers is not None:
            depth_layer, state = nnx.split(self.depth_layers)
            own = nnx.to_pure_dict(state)
        execution = self._resolve(shape)
        program = LayerProgram(self.config, layer, depth_layer, execution.compute_dtype)
        shared = nnx.to_pure_dict(nnx.state(self)).get("depth", {})
        params = StackParams((nnx.to_pure_dict(layers), own), shared)
        return StackSpec(program, execution), params

    def _resolve(self, shape: tuple[int, ...] | None) -> ExecutionConfig:
        execution = resolve_compute_dtype(self.execution)
        if execution.remat != "auto":
            return execution
        # Without a trainer nothing is known of the mesh and of what else is in memory.
        rows, length = shape or (1, 1)
        return resolve_execution(
            self.config, execution, rows=rows, seq_len=length, memory=None, parameters=0
        ).execution

    def attention_mass(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """[L, 1+S] float32: mean attention mass on the sequence | on each depth slot, by layer.

        Means over heads and real tokens; each row sums to 1 (0 if there is no real token). A slot
        that a layer does not see has mass 0. S is 0 where attention reads no depth slots.
        """
        tokens, token_info = self._checked(tokens, segment_ids, positions)
        spec, params = self.stack(tokens.shape)
        segment_ids = token_info.segment_ids
        real = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
        num_slots = len(make_mechanism(self.config).slot_labels())

        def attend(layer, query, key, value, depth, state):
            out, lse = ShardedAttention.of(
                query,
                key,
                value,
                **depth,
                segment_ids=segment_ids,
                implementation=implementation(spec),
            ).forward()
            return out, state, _mass(query, depth, num_slots, lse, real)

        x = self.embed(tokens)
        return scan_layers(spec, params, x, token_info, attend, keep_entries=True)[2]


@dataclasses.dataclass(frozen=True)
class LayerProgram:
    """What the stack runs for a `Transformer`: its mechanism and its `Layer`."""

    config: ModelConfig
    layer_graph: nnx.GraphDef[Layer]
    depth_graph: nnx.GraphDef[Any] | None
    """Of the mechanism's own parameters of a layer."""
    compute_dtype: str

    @property
    def mechanism(self) -> Mechanism:
        """The way of using depth."""
        return make_mechanism(self.config)

    def layer(self, weights: Any, step: Step, carry: Any, history: History) -> tuple[Any, History]:
        """`Layer`, its matrices in the compute dtype."""
        block, own = cast(weights, jnp.dtype(self.compute_dtype))
        layer = nnx.merge(self.layer_graph, block)
        depth = None if self.depth_graph is None else nnx.merge(self.depth_graph, own)
        return layer(self.mechanism, depth, step, carry, history)

    def start(self, x: jax.Array, history: History) -> tuple[Any, History]:
        """The mechanism's."""
        return self.mechanism.start(x, history)

    def finish(self, carry: Any, history: History) -> tuple[jax.Array, History]:
        """The mechanism's."""
        return self.mechanism.finish(carry, history)

    def entry_shapes(self, batch: int, length: int) -> tuple[tuple[int, ...], ...]:
        """The mechanism's."""
        return self.mechanism.entry_shapes(batch, length)

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def head_dim(self) -> int:
        return self.config.head_dim

    @property
    def rope_theta(self) -> float:
        return self.config.rope_theta

    @property
    def capacity(self) -> int:
        return self.mechanism.capacity

    @property
    def inference_capacity(self) -> int:
        return self.mechanism.inference_capacity()

    @property
    def gathers(self) -> GatherLayout | None:
        return self.mechanism.gather_layout()


def _depth_layers(mechanism: Mechanism, config: ModelConfig, rngs: nnx.Rngs) -> Any:
    """The mechanism's own parameters of all layers, stacked; None if it has none."""
    if nnx.eval_shape(lambda: mechanism.layer_parameters(nnx.Rngs(0))) is None:
        return None
    layers = stacked(mechanism.layer_parameters, config.num_layers, rngs)
    mechanism.initialize(layers)
    return layers


def _mass(query_BxTxNxH, depth, num_slots: int, lse_BxTxN, real_BxT) -> jax.Array:
    """[1+S]: e^(z - lse) of each visible slot, averaged; the rest is the sequence's."""
    count = jnp.maximum(real_BxT.sum() * lse_BxTxN.shape[-1], 1)
    total = real_BxT.sum() * lse_BxTxN.shape[-1] / count
    if not num_slots:
        return total[None].astype(jnp.float32)
    key = depth["depth_key"][:num_slots]
    batch, length, heads, head_dim = query_BxTxNxH.shape
    kv_heads = key.shape[-2]
    grouped = (batch, length, kv_heads, heads // kv_heads)
    scores = jnp.einsum(
        "btkgh,sbtkh->sbtkg",
        query_BxTxNxH.reshape(*grouped, head_dim),
        key,
        preferred_element_type=jnp.float32,
    )
    scores = scores * head_dim**-0.5
    if depth["depth_bias"] is not None:
        scores += depth["depth_bias"].reshape(grouped[2:])
    weight = jnp.exp(scores - lse_BxTxN.reshape(grouped))
    slot = jnp.arange(num_slots)
    seen = slot < depth["depth_length"]
    if depth["depth_window"] is not None:
        newest = slot >= depth["depth_length"] - depth["depth_window"]
        seen &= (slot < depth["depth_reserved"]) | newest
    mask = seen[:, None, None, None, None] & real_BxT[None, :, :, None, None]
    depth_S = jnp.where(mask, weight, 0.0).sum(axis=(1, 2, 3, 4)) / count
    return jnp.concatenate([(total - depth_S.sum())[None], depth_S])


def _token_info(tokens, segment_ids, positions) -> TokenInfo:
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    else:
        positions = check_integers("positions", positions, tokens.shape)
    if segment_ids is not None:
        segment_ids = check_integers("segment_ids", segment_ids, tokens.shape)
    return TokenInfo(positions, segment_ids)
