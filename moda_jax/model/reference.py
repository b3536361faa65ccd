"""The specification of the model: what every way of using depth computes, in plain Python.

A loop over the layers, lists of entries in the place of buffers, JAX's own gradients; for reading
and for tests, not for training. `moda_jax.model.stack` computes the same with memory linear in
depth. Symbols: B batch, T tokens, D width, N query and K key/value heads of size H, L layers, V
vocabulary; sublayer i = 2·layer + (0: attention, 1: FFN), M = 2L of them.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moda_jax.config import ModelConfig
from moda_jax.depth.mechanism import ATTENTION, FFN

Params = Mapping[str, Any]
KeyValue = tuple[jax.Array, jax.Array]  # [B, T, K, H] each


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> jax.Array:
    """Logits [B, T, V], in the parameters' dtype, of the token after each of `tokens`.

    Args:
      config: what is computed.
      params: `nnx.to_pure_dict(nnx.state(model))` of a `Transformer`: float32, or float64.
      tokens: [B, T] int32.
      segment_ids: [B, T] int32, packed documents; what stands at padding (0) means nothing.
      positions: [B, T] int32, in the document; None: 0 … T−1.

    Sources: OLMo 2 (arXiv 2501.00656) for the layer; for depth each class below names its own.
    """
    with jax.default_matmul_precision("highest"):
        index = jnp.arange(tokens.shape[1])
        mask = (index <= index[:, None])[None]
        if segment_ids is not None:
            mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
        positions = jnp.broadcast_to(index, tokens.shape) if positions is None else positions

        x = params["embedding"][tokens]
        depth = _MECHANISMS[config.depth.name](config, params, x)
        for i in range(config.num_layers):
            weights, own = _at((params["layers"], params.get("depth_layers")), i)
            _layer(depth, _Layer(i, config, weights, own, positions, mask))
        x = _rms_norm(depth.finish(), config.norm_eps, params["final_norm"]["scale"])
        head = {"kernel": params["embedding"].T} if config.tie_embeddings else params["head"]
        return _linear(head, x)


def _layer(depth: "_Residual", layer: "_Layer") -> None:
    """Read → attention → write → read → FFN → write.

    A branch f(x) is: pre f(norm(x)); reordered norm(f(x)); post f(x), whose sum with x is normed.
    """
    weights, placement = layer.weights, layer.config.norm_placement

    x = depth.read(layer, ATTENTION)
    source = layer.norm(ATTENTION, x) if placement == "pre" else x
    query = layer.rotated_heads("query_norm", _linear(weights["query"], source))
    key_value = layer.keys_values(weights["key_value"], source)
    slots = [(layer.as_read(key), value) for key, value in depth.visible_slots()]
    sequence = layer.as_read(key_value[0]), key_value[1], layer.mask
    out = _attention(query, slots, sequence, depth.score_bias(layer))
    out = _linear(weights["out"], out, num_inputs=2)
    branch = layer.norm(ATTENTION, out) if placement == "reordered" else out
    depth.write(layer, ATTENTION, branch, source, key_value)

    x = depth.read(layer, FFN)
    source = layer.norm(FFN, x) if placement == "pre" else x
    gate, up = (_linear(weights["mlp"][name], source) for name in ("gate", "up"))
    out = _linear(weights["mlp"]["down"], jax.nn.silu(gate) * up)
    branch = layer.norm(FFN, out) if placement == "reordered" else out
    depth.write(layer, FFN, branch, source)


class _Layer(NamedTuple):
    number: int
    config: ModelConfig
    weights: Params
    depth_weights: Any  # the mechanism's own of this layer
    positions: jax.Array  # [B, T]
    mask: jax.Array  # [B or 1, T, T]: which tokens a token sees

    def norm(self, sublayer: int, x: jax.Array) -> jax.Array:
        name = ("attention_norm", "mlp_norm")[sublayer]
        return _rms_norm(x, self.config.norm_eps, self.weights[name]["scale"])

    def keys_values(self, projection: Params, source: jax.Array) -> KeyValue:
        """Keys as they are kept, and values, of x [B, T, D]: normed and rotated, if not read so."""
        key, value = (_linear(projection[name], source) for name in ("key", "value"))
        if self.config.depth.reader_norms_keys:
            return self.normed_heads(key, 1.0), value
        return self.rotated_heads("key_norm", key), value

    def as_read(self, key: jax.Array) -> jax.Array:
        """A key that is kept without scale and rotation, with this layer's: one scale a pair."""
        if not self.config.depth.reader_norms_keys:
            return key
        return self.rotated(key * jnp.concatenate([self.weights["pair_scale"]] * 2, axis=-1))

    def rotated_heads(self, norm: str, x: jax.Array) -> jax.Array:
        """QK-norm, then RoPE."""
        is_normed = self.config.qk_norm != "none"
        return self.rotated(self.normed_heads(x, self.weights[norm]["scale"]) if is_normed else x)

    def normed_heads(self, x: jax.Array, scale: jax.Array | float) -> jax.Array:
        """RMSNorm over all heads together or one by one."""
        over = (-2, -1) if self.config.qk_norm == "full" else (-1,)
        return _rms_norm(x, self.config.norm_eps, scale, over)

    def rotated(self, x: jax.Array) -> jax.Array:
        """RoPE on the pairs (i, i + H/2)."""
        config = self.config
        pair = jnp.arange(config.head_dim // 2, dtype=x.dtype)
        frequency = config.rope_theta ** (-2 * pair / config.head_dim)
        angle = self.positions[..., None, None].astype(x.dtype) * frequency
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class _Residual:
    """h ← h + f(h)."""

    def __init__(self, config: ModelConfig, params: Params, x: jax.Array) -> None:
        self.config, self.shared = config, params.get("depth", {})
        self.settings: Any = config.depth
        self.h: Any = x  # the stream [B, T, D]
        self.history: list[Any] = []  # entries that later sublayers read
        self.start(x)

    def start(self, x: jax.Array) -> None:
        """Sets what else there is before the first layer."""

    def read(self, layer: _Layer, sublayer: int) -> jax.Array:
        """What a sublayer reads [B, T, D]."""
        return self.h

    def visible_slots(self) -> list[KeyValue]:
        """Depth keys and values that attention sees, each at the query's own token."""
        return []

    def score_bias(self, layer: _Layer) -> Any:
        """What is added to the scores of those slots, [N] or 0."""
        return 0.0

    def write(self, layer: _Layer, sublayer: int, branch, source, key_value=None) -> None:
        """Takes f; `source` is what its projections read, `key_value` attention's own."""
        self.h = self.h + branch
        if self.config.norm_placement == "post":
            self.h = layer.norm(sublayer, self.h)

    def finish(self) -> jax.Array:
        """What the final norm reads [B, T, D]."""
        return self.h


class _Dense(_Residual):
    """h_l = Σ_{j ≤ l} a_lj X_j, or X_j W_lj: MoDA's eq. 4 and DenseFormer (arXiv 2402.02622)."""

    def start(self, x):
        self.history = [x]  # X_0, the embedding; X_{l+1}, the output of layer l

    def read(self, layer, sublayer):
        if sublayer == ATTENTION:
            row = layer.number * (layer.number + 1) // 2
            weights = self.shared["weights"][row : row + layer.number + 1]
            product = jnp.multiply if self.settings.form == "scalar" else jnp.matmul
            self.h = sum(product(x, w) for x, w in zip(self.history, weights, strict=True))
        return self.h

    def write(self, layer, sublayer, branch, source, key_value=None):
        super().write(layer, sublayer, branch, source)
        if sublayer == FFN:
            self.history.append(self.h)


class _DepthAttention(_Residual):
    """h_l = softmax_j(q_l·k_j / √H) v_j, j ≤ l; q, k, v projections of X_l (MoDA's eq. 5-6)."""

    def read(self, layer, sublayer):
        if sublayer == ATTENTION:
            own = layer.depth_weights
            query = _linear(own["query"], self.h)
            self.history.append([_linear(own["key_value"][x], self.h) for x in ("key", "value")])
            self.h = _attention(query, self.history).reshape(self.h.shape)
        return self.h


class _MoDA(_Residual):
    """The residual stream, and attention that sees earlier layers' slots (MoDA, Alg. 1)."""

    def visible_slots(self):
        window, reserved = self.settings.window, self.settings.reserved
        newest = 0 if window is None else len(self.history) - window
        return [kv for s, kv in enumerate(self.history) if s < reserved or s >= newest]

    def score_bias(self, layer):
        start = self.settings.score_bias
        if start is None or not self.history:
            return 0.0
        return start + layer.depth_weights["score_bias"]

    def write(self, layer, sublayer, branch, source, key_value=None):
        super().write(layer, sublayer, branch, source)
        writer, skips = divmod(layer.number, self.settings.write_every)
        if skips or layer.number == self.config.num_layers - 1:  # nobody reads the last layer's
            return
        name = ("attention_kv", "ffn_kv")[sublayer]
        kind = getattr(self.settings, name)
        if kind == "reuse":
            self.history.append(key_value)
        elif kind == "project":
            self.history.append(layer.keys_values(_at(self.shared[name], writer), source))


class _AttentionResiduals(_Residual):
    """h_i = Σ_j α_ij v_j, α_i = softmax_j(w_i · RMSNorm_i(v_j)) (arXiv 2603.15031).

    v: the embedding and all outputs; or, in the block form, the embedding, the sums over finished
    blocks of sublayers, and the current block's sum once it has a term.
    """

    def start(self, x):
        is_full, blocks = self.settings.form == "full", self.settings.num_blocks
        self.block_size = 1 if is_full else -(-2 * self.config.num_layers // blocks)
        self.history, self.block = [x], []

    def read(self, layer, sublayer):
        return self.weighted_sum(_at(layer.depth_weights, sublayer))

    def weighted_sum(self, own):
        entries = self.history + ([sum(self.block)] if self.block else [])
        normed = [_rms_norm(v, self.config.norm_eps, own["scale"]) for v in entries]
        scores = [v @ own["query"] for v in normed]
        lse = functools.reduce(jnp.logaddexp, scores)
        return sum(jnp.exp(z - lse)[..., None] * v for z, v in zip(scores, entries, strict=True))

    def write(self, layer, sublayer, branch, source, key_value=None):
        self.block.append(branch)
        if len(self.block) == self.block_size:
            self.history.append(sum(self.block))
            self.block = []

    def finish(self):
        return self.weighted_sum(self.shared["head"])


class _HyperConnections(_Residual):
    """h = A_mᵀ H;  H ← B f(h)ᵀ + A_rᵀ H, for n streams H (arXiv 2409.19606, dynamic)."""

    def start(self, x):
        self.streams = jnp.stack([x] * self.settings.num_streams, axis=2)  # H [B, T, n, D]

    def read(self, layer, sublayer):
        return self.read_streams(self.connection(layer, sublayer, "mix", gate=0))

    def write(self, layer, sublayer, branch, source, key_value=None):
        out = self.connection(layer, sublayer, "out", gate=1)
        residual = self.connection(layer, sublayer, "residual", gate=0)
        self.write_streams(residual.swapaxes(-2, -1), out, branch)

    def connection(self, layer, sublayer, name, gate):
        """a + s · tanh(RMSNorm(H) W): A_m and B [B, T, n], A_r [B, T, n, n]."""
        own = _at(layer.depth_weights, sublayer)
        normed = _rms_norm(self.streams, self.config.norm_eps, own["scale"])
        return own[f"{name}_bias"] + own["gates"][gate] * jnp.tanh(normed @ own[name])

    def read_streams(self, weights):
        return (weights[..., None] * self.streams).sum(axis=2)

    def write_streams(self, mixing, weights, branch):
        self.streams = mixing @ self.streams + weights[..., None] * branch[:, :, None]

    def finish(self):
        return self.streams.sum(axis=2)


class _MHC(_HyperConnections):
    """h = pre · H;  H ← res H + postᵀ f(h), res doubly stochastic (arXiv 2512.24880)."""

    def read(self, layer, sublayer):
        return self.read_streams(jax.nn.sigmoid(self.logits(layer, sublayer, "pre", gate=0)))

    def write(self, layer, sublayer, branch, source, key_value=None):
        n = self.settings.num_streams
        post = 2 * jax.nn.sigmoid(self.logits(layer, sublayer, "post", gate=1))
        residual = jnp.exp(self.logits(layer, sublayer, "residual", gate=2))
        residual = residual.reshape(*post.shape[:2], n, n)
        for _ in range(self.settings.sinkhorn_rounds):
            residual = residual / residual.sum(axis=-2, keepdims=True)
            residual = residual / residual.sum(axis=-1, keepdims=True)
        self.write_streams(residual, post, branch)

    def logits(self, layer, sublayer, name, gate):
        """α · x̃W + b with x̃ = RMSNorm(vec H): [B, T, n or n·n]."""
        own = _at(layer.depth_weights, sublayer)
        vector = self.streams.reshape(*self.streams.shape[:2], -1)
        product = _rms_norm(vector, self.config.norm_eps) @ own[name]
        return own["gates"][gate] * product + own[f"{name}_bias"].reshape(-1)


_MECHANISMS: dict[str, type[_Residual]] = {
    "residual": _Residual,
    "dense": _Dense,
    "depth_attention": _DepthAttention,
    "moda": _MoDA,
    "attention_residuals": _AttentionResiduals,
    "hyper_connections": _HyperConnections,
    "mhc": _MHC,
}


def _attention(
    query: jax.Array, slots: Sequence[KeyValue], sequence=None, bias: Any = 0.0
) -> jax.Array:
    """One softmax over the token's own depth keys and the sequence's: o [B, T, N, H].

    sequence: keys and values [B, T, K, H] and the mask [B, T, T] of what a token sees of them.
    bias: [N], or 0, added to the scores of the depth keys after their scaling.
    """
    heads, head_dim = query.shape[2:]

    def per_query_head(x):  # query head n reads key/value head n // (N/K)
        return jnp.repeat(x, heads // x.shape[2], axis=2)

    query = head_dim**-0.5 * query
    scores = [(query * per_query_head(key)).sum(axis=-1, keepdims=True) for key, _ in slots]
    scores = [score + jnp.reshape(bias, (-1, 1)) for score in scores]
    if sequence is not None:
        *key_value, mask = sequence
        key, value = map(per_query_head, key_value)
        score = jnp.einsum("btnh,bjnh->btnj", query, key)
        scores.append(jnp.where(mask[:, :, None], score, -jnp.inf))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    out = sum(weights[..., s, None] * per_query_head(value) for s, (_, value) in enumerate(slots))
    if sequence is not None:
        out += jnp.einsum("btnj,bjnh->btnh", weights[..., len(slots) :], value)
    return out


def _rms_norm(
    x: jax.Array, eps: float, scale: jax.Array | float = 1.0, over: tuple[int, ...] = (-1,)
) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x * x, axis=over, keepdims=True) + eps) * scale


def _linear(weights: Params, x: jax.Array, num_inputs: int = 1) -> jax.Array:
    return jnp.tensordot(x, weights["kernel"], num_inputs) + weights.get("bias", 0.0)


def _at(tree: Any, index: Any) -> Any:
    """What stacked parameters have at an index."""
    return jax.tree.map(lambda x: x[index], tree)
