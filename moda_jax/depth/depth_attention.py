"""Depth attention: a layer's input is attention over depth alone (MoDA's eq. 5-6).

    q_l, k_l, v_l = X_l W_q, X_l W_k, X_l W_v      h_l = softmax_j(q_l·k_j / √H) v_j,  j ≤ l

per token, with X_0 the embedding, X_{l+1} the output of layer l (0-based) and GQA groups as in
sequence attention. Heads side by side are the layer's input, so N·H = D; no norm and no rotation
(the paper is silent, and a token's position is the same for all entries). The head reads X_L.
"""

from flax import nnx

from moda_jax.config import DepthAttentionConfig
from moda_jax.depth.mechanism import ATTENTION, DepthView, Mechanism
from moda_jax.layers import KVProjection, Linear
from moda_jax.ops.sharding import constrain


class DepthProjections(nnx.Module):
    """W_q, W_k and W_v of one layer."""

    def __init__(self, config, *, rngs: nnx.Rngs) -> None:
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        self.query = Linear({"embed": config.embed_dim}, heads, config, rngs=rngs, use_bias=False)
        self.key_value = KVProjection(config, rngs=rngs, use_bias=False)


class DepthAttention(Mechanism[DepthAttentionConfig]):
    """The carry is the stream inside of a layer; the history has a key and a value per layer."""

    def read(self, step, weights, sublayer, carry, history):
        if sublayer != ATTENTION:
            return carry, carry, history
        query = constrain(weights.query(carry), "batch", None, "heads", None)
        entry = weights.key_value.key(carry), weights.key_value.value(carry)
        history = history.append(entry, step.layer)
        view = DepthView(length=step.layer + 1)
        out, history = step.attend(query, None, None, history, depth=view)
        x = constrain(out.reshape(carry.shape), "batch", None, None)
        return x, x, history

    @property
    def num_entries(self) -> int:
        return self.config.num_layers

    def entry_shapes(self, batch, length):
        return ((batch, length, self.config.num_kv_heads, self.config.head_dim),) * 2

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        return DepthProjections(self.config, rngs=rngs)

    def num_parameters(self) -> int:
        heads = self.config.num_heads + 2 * self.config.num_kv_heads
        return self.config.num_layers * self.config.embed_dim * heads * self.config.head_dim

    def projection_flops(self, seq_len: int) -> int:
        return 2 * seq_len * self.num_parameters()

    def read_flops(self, seq_len: int) -> int:
        layers = self.config.num_layers
        width = self.config.num_heads * self.config.head_dim
        return 4 * seq_len * width * layers * (layers + 1) // 2

    def describe(self) -> str:
        return f"attention over {self.num_entries} entries of depth"

    def own_softmax_labels(self) -> list[str]:
        """The embedding (e), and the layer whose output an entry is."""
        return ["e", *map(str, range(self.num_entries - 1))]
