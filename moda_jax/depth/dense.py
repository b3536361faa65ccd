"""Dense connections over depth: a layer's input is a learned sum over all earlier outputs.

    h_l = Σ_{i ≤ l} a_{l,i} X_i   (scalar)      h_l = Σ_{i ≤ l} X_i W_{l,i}   (matrix)

with X_0 the embedding and X_{l+1} the output of layer l (0-based), an ordinary layer with its own
residual connections. The head reads X_L. Sources: MoDA's Fig. 3b and eq. 4 (matrix); DenseFormer,
arXiv 2402.02622 (scalar). Both start as the plain model: weight 1, or the identity, on the newest.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moda_jax.config import DenseConfig
from moda_jax.depth.mechanism import ATTENTION, Carry, Mechanism, Output, Step
from moda_jax.depth.weighted_read import weighted_sum
from moda_jax.layers import parameter
from moda_jax.ops.history import History


class Dense(Mechanism[DenseConfig]):
    """The carry is the stream inside of a layer; the history has X_0 … X_{L−1}."""

    def start(self, x, history):
        return x, history.append((x,), jnp.int32(0))

    def read(self, step, weights, sublayer, carry, history):
        if sublayer != ATTENTION:
            return carry, carry, history
        row = step.layer * (step.layer + 1) // 2
        if self.settings.form == "matrix":
            x, history = _matrix_sum(history, row, step.layer + 1)
        else:
            row_L, history = history.parameter("weights", row, size=self.config.num_layers)

            def read(row_L, entries):
                return weighted_sum(row_L, entries[0], step.layer + 1)

            x, history = history.read(read, row_L)
        return x, x, history

    def write(
        self,
        step: Step,
        weights: Any,
        sublayer: int,
        layer: Any,
        carry: Carry,
        history: History,
        output: Output,
    ) -> tuple[Carry, History]:
        x = layer.join(carry, output.branch, sublayer)
        if sublayer == ATTENTION:
            return x, history
        return x, history.append((x,), step.layer + 1)

    @property
    def num_entries(self) -> int:
        return self.config.num_layers

    @property
    def capacity(self) -> int:
        return self.config.num_layers + 1  # the last layer's output, which only the head reads

    def entry_shapes(self, batch, length):
        return ((batch, length, self.config.embed_dim),)

    def shared_parameters(self, rngs: nnx.Rngs) -> dict[str, Any]:
        layers, width = self.config.num_layers, self.config.embed_dim
        newest = jnp.arange(1, layers + 1) * jnp.arange(2, layers + 2) // 2 - 1
        one_hot = jnp.zeros(layers * (layers + 1) // 2).at[newest].set(1.0)
        if self.settings.form == "scalar":
            return {"weights": parameter(one_hot, (None,))}
        identities = one_hot[:, None, None] * jnp.eye(width)
        return {"weights": parameter(identities, ("layers", "embed", None))}

    def num_parameters(self) -> int:
        pairs = self.config.num_layers * (self.config.num_layers + 1) // 2
        return pairs * (self.config.embed_dim**2 if self.settings.form == "matrix" else 1)

    def projection_flops(self, seq_len: int) -> int:
        return 2 * seq_len * self.num_parameters() if self.settings.form == "matrix" else 0

    def read_flops(self, seq_len: int) -> int:
        if self.settings.form == "matrix":
            return 0
        return 2 * seq_len * self.num_parameters() * self.config.embed_dim

    def describe(self) -> str:
        return f"dense connections over {self.config.num_layers} entries ({self.settings.form})"


def _matrix_sum(history: History, row: jax.Array, count: jax.Array) -> tuple[jax.Array, History]:
    """Σ_{j < count} X_j W_{row + j} [B, T, D]; products in the compute dtype, float32 sums.

    A loop of `count` products, forward and backward: one over all L entries, masked, would cost
    twice as much, and its gradient as many passes over all L²/2 matrices.
    """

    def forward(buffers, shared):
        (entries,) = buffers

        def add(j, total):
            return total + _product("btd,de->bte", _at(entries, j), _at(shared["weights"], row + j))

        zeros = jnp.zeros(entries.shape[1:], jnp.float32)
        return lax.fori_loop(0, count, add, zeros).astype(entries.dtype)

    def backward(buffers, shared, d_out, thread):
        (entries,) = buffers

        def add(j, state):
            d_entries, d_weights = state
            d_entry = _product("bte,de->btd", d_out, _at(shared["weights"], row + j))
            d_weight = _product("btd,bte->de", _at(entries, j), d_out)
            return _add_at(d_entries, d_entry, j), _add_at(d_weights, d_weight, row + j)

        (d_entries,), d_weights = thread.entries, thread.shared["weights"]
        d_entries, d_weights = lax.fori_loop(0, count, add, (d_entries, d_weights))
        return thread._replace(entries=(d_entries,), shared=thread.shared | {"weights": d_weights})

    return history.custom(forward, backward)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


def _add_at(total: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
    new = (_at(total, index).astype(jnp.float32) + x).astype(total.dtype)
    return lax.dynamic_update_index_in_dim(total, new, index, 0)
