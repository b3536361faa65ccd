"""Dynamic hyper-connections (arXiv 2409.19606): n streams, connections that depend on them.

With streams H [n, D] and H̄ = RMSNorm(H), row by row, for every sublayer

    A_m = a_m + s_a tanh(H̄ W_m) [n]     A_r = a_r + s_a tanh(H̄ W_r) [n, n]
    B   = b   + s_b tanh(H̄ W_b) [n]     h = A_mᵀ H     H ← B f(h)ᵀ + A_rᵀ H

The head reads the streams' sum. Start: W = 0, a_m the unit vector of stream i mod n for sublayer i,
a_r the identity, b ones, s 0.01: a plain residual stream, n times.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import HyperConnectionsConfig
from moda_jax.depth import streams
from moda_jax.depth.mechanism import Mechanism
from moda_jax.layers import parameter


class Connections(nnx.Module):
    """The parameters of both sublayers of a layer, [2, ...]; a_m is set when layers are stacked."""

    def __init__(self, width: int, num_streams: int) -> None:
        n = num_streams

        def make(shape, value=0.0):
            return parameter(jnp.full((2, *shape), value), (None,) * (1 + len(shape)))

        self.scale = make((width,), 1.0)
        self.mix = make((width,))
        self.residual = make((width, n))
        self.out = make((width,))
        self.mix_bias = make((n,))
        identity = jnp.broadcast_to(jnp.eye(n), (2, n, n))
        self.residual_bias = parameter(identity, (None, None, None))
        self.out_bias = make((n,), 1.0)
        self.gates = make((2,), 0.01)  # s_a, s_b


class HyperConnections(Mechanism[HyperConnectionsConfig]):
    """The carry is H [n, B, T, D]."""

    def start(self, x, history):
        return streams.start_streams(x, self.settings.num_streams), history

    def read(self, step, weights, sublayer, carry, history):
        gate = self._gate(weights, sublayer, carry, weights.mix, 0)  # [n, B, T]
        mix = weights.mix_bias[sublayer][:, None, None] + gate
        return streams.read_streams(mix, carry), carry, history

    def write(self, step, weights, sublayer, layer, carry, history, output):
        gate = self._gate(weights, sublayer, carry, weights.out, 1)
        write = weights.out_bias[sublayer][:, None, None] + gate
        gate = self._gate(weights, sublayer, carry, weights.residual, 0)  # [n, B, T, n]
        residual = weights.residual_bias[sublayer][:, :, None, None] + jnp.moveaxis(gate, -1, 1)
        return streams.mix_streams(residual, write, carry, output.branch), history

    def finish(self, carry, history):
        return streams.sum_streams(carry), history

    def _gate(self, weights, sublayer: int, carry: jax.Array, matrix, which: int) -> jax.Array:
        """s tanh(H̄ W) for W [2, D] or [2, D, n]."""
        normed = streams.rms_normalize(carry, self.config.norm_eps) * weights.scale[sublayer]
        product = jnp.einsum("ibtd,d...->ibt...", normed, matrix[sublayer], precision="highest")
        return weights.gates[sublayer, which] * jnp.tanh(product)

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        return Connections(self.config.embed_dim, self.settings.num_streams)

    def initialize(self, stacked) -> None:
        """Sets a_m, which depends on the layer."""
        n, layers = self.settings.num_streams, self.config.num_layers
        unit = jax.nn.one_hot(jnp.arange(2 * layers) % n, n, dtype=jnp.float32)
        stacked.mix_bias[...] = unit.reshape(layers, 2, n)

    def num_parameters(self) -> int:
        n, width = self.settings.num_streams, self.config.embed_dim
        return 2 * self.config.num_layers * (width * (3 + n) + n * n + 2 * n + 2)

    def projection_flops(self, seq_len: int) -> int:
        n, width = self.settings.num_streams, self.config.embed_dim
        return 2 * self.config.num_layers * 2 * seq_len * n * width * (n + 2)

    def read_flops(self, seq_len: int) -> int:
        return stream_flops(self.config, self.settings.num_streams, seq_len)

    def describe(self) -> str:
        return f"hyper-connections, {self.settings.num_streams} streams"


def stream_flops(config, num_streams: int, seq_len: int) -> int:
    """Reading n streams, mixing them and adding the branch, 2M times."""
    n = num_streams
    return 2 * config.num_layers * 2 * seq_len * config.embed_dim * (n + n * n + n)
