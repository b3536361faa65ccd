"""Manifold-constrained hyper-connections (arXiv 2512.24880): stream mixing is doubly stochastic.

With streams H [n, D] and x̃ = RMSNorm(vec H) [nD] (without a scale: W has one), for every sublayer

    pre = σ(α₁ x̃W₁ + b₁) [n]     post = 2σ(α₂ x̃W₂ + b₂) [n]
    res = Sinkhorn(exp(α₃ x̃W₃ + b₃)) [n, n]      h = pre · H      H ← res H + postᵀ f(h)

A Sinkhorn round divides by the column sums, then by the row sums. The head reads the streams' sum.
Start: α = 0.01; where the source is silent the choice is ours: W as all matrices, pre = 1/n, post =
1, and b₃ a diagonal of 4, a residual mixing close to the identity.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import MHCConfig, ModelConfig
from moda_jax.depth import streams
from moda_jax.depth.hyper_connections import stream_flops
from moda_jax.depth.mechanism import Mechanism
from moda_jax.layers import parameter


class ConstrainedConnections(nnx.Module):
    """The parameters of both sublayers of a layer, [2, ...]."""

    def __init__(self, config: ModelConfig, num_streams: int, rngs: nnx.Rngs) -> None:
        n, width = num_streams, config.embed_dim
        init = nnx.initializers.truncated_normal(config.init_std, lower=-3.0, upper=3.0)

        def matrix(outputs):
            shape = (2, n * width, outputs)
            return parameter(init(rngs.params(), shape, jnp.float32), (None, None, None))

        def repeat(x):
            return parameter(jnp.broadcast_to(x, (2, *x.shape)), (None,) * (1 + x.ndim))

        self.pre, self.post, self.residual = matrix(n), matrix(n), matrix(n * n)
        even = -math.log(n - 1) if n > 1 else 20.0  # σ of it is 1/n
        self.pre_bias = repeat(jnp.full(n, even))
        self.post_bias = repeat(jnp.zeros(n))
        self.residual_bias = repeat(4.0 * jnp.eye(n))
        self.gates = repeat(jnp.full(3, 0.01))  # α


class MHC(Mechanism[MHCConfig]):
    """The carry is H [n, B, T, D]."""

    def start(self, x, history):
        return streams.start_streams(x, self.settings.num_streams), history

    def read(self, step, weights, sublayer, carry, history):
        logits = self._logits(weights, sublayer, carry, weights.pre, weights.pre_bias, 0)
        return streams.read_streams(jax.nn.sigmoid(logits), carry), carry, history

    def write(self, step, weights, sublayer, layer, carry, history, output):
        n = self.settings.num_streams
        logits = self._logits(weights, sublayer, carry, weights.post, weights.post_bias, 1)
        post = 2 * jax.nn.sigmoid(logits)
        bias = weights.residual_bias[...].reshape(2, n * n)
        logits = self._logits(weights, sublayer, carry, weights.residual, bias, 2)
        residual = sinkhorn(logits.reshape(n, n, *logits.shape[1:]), self.settings.sinkhorn_rounds)
        mixing = residual.swapaxes(0, 1)  # new i = Σ_j res_ij H_j: `mix_streams` sums over axis 0
        return streams.mix_streams(mixing, post, carry, output.branch), history

    def finish(self, carry, history):
        return streams.sum_streams(carry), history

    def _logits(self, weights, sublayer: int, carry, matrix, bias, which: int) -> jax.Array:
        """α x̃W + b, outputs first: [outputs, B, T]."""
        n, width = carry.shape[0], carry.shape[-1]
        normed = streams.rms_normalize(carry, self.config.norm_eps, axes=(0, -1))
        kernel = matrix[sublayer].reshape(n, width, -1)
        product = jnp.einsum("ibtd,ido->obt", normed, kernel, precision="highest")
        return weights.gates[sublayer, which] * product + bias[sublayer][:, None, None]

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        return ConstrainedConnections(self.config, self.settings.num_streams, rngs)

    def _matrix_width(self) -> int:
        n = self.settings.num_streams
        return 2 * n + n * n

    def num_parameters(self) -> int:
        inputs = self.settings.num_streams * self.config.embed_dim
        return 2 * self.config.num_layers * ((inputs + 1) * self._matrix_width() + 3)

    def projection_flops(self, seq_len: int) -> int:
        inputs = self.settings.num_streams * self.config.embed_dim
        return 2 * self.config.num_layers * 2 * seq_len * inputs * self._matrix_width()

    def read_flops(self, seq_len: int) -> int:
        return stream_flops(self.config, self.settings.num_streams, seq_len)

    def describe(self) -> str:
        return f"mHC, {self.settings.num_streams} streams"


def sinkhorn(logits_nxn: jax.Array, rounds: int) -> jax.Array:
    """exp(logits) [n, n, ...] made doubly stochastic over its first two axes, float32."""
    # A common factor does not change the result, and the first division removes it.
    matrix = jnp.exp(logits_nxn - jax.lax.stop_gradient(logits_nxn.max(axis=(0, 1))))
    for _ in range(rounds):
        matrix = matrix / matrix.sum(axis=0, keepdims=True)
        matrix = matrix / matrix.sum(axis=1, keepdims=True)
    return matrix
