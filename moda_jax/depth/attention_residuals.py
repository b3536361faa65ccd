"""Attention residuals (Kimi, arXiv 2603.15031): a softmax over earlier outputs is the residual.

Sublayers f_0 … f_{M−1} (M = 2L), entries v_0 = embedding, v_{i+1} = f_i's output:

    h_i = Σ_{j ≤ i} α_ij v_j      α_i = softmax_j( w_i · RMSNorm_i(v_j) )

and the head reads one more such sum (i = M). w starts at zero, so that h starts as a mean. In the
block form an entry is the sum over a block of consecutive sublayers; the current block's running
sum is read beside the finished ones once it has a term.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import AttentionResidualsConfig
from moda_jax.depth.mechanism import Carry, Mechanism
from moda_jax.depth.weighted_read import softmax_read
from moda_jax.layers import parameter
from moda_jax.ops.history import History


class ReadWeights(nnx.Module):
    """w and the norm's scale of both sublayers."""

    def __init__(self, width: int) -> None:
        self.query = parameter(jnp.zeros((2, width)), (None, None))
        self.scale = parameter(jnp.ones((2, width)), (None, None))


class AttentionResiduals(Mechanism[AttentionResidualsConfig]):
    """The history has the outputs, or the blocks' sums; the carry the current block's sum."""

    def start(self, x, history):
        history = history.append((x,), jnp.int32(0))
        return (jnp.zeros_like(x) if self._is_block else ()), history

    def read(self, step, weights, sublayer, carry, history):
        query = weights.query[sublayer] * weights.scale[sublayer]
        h, history = self._read(query, 2 * step.layer + sublayer, carry, history)
        return h, carry, history

    def write(self, step, weights, sublayer, layer, carry, history, output):
        index = 2 * step.layer + sublayer
        if not self._is_block:
            return carry, history.append((output.branch,), index + 1)
        total = carry + output.branch
        # A block's last sublayer writes the sum to the block's slot. The others write to a spare
        # one that nobody reads (its gradient is zero): a conditional write would read its slot.
        closes = self._closes(index)
        slot = jnp.where(closes, index // self._size + 1, self.num_entries)
        return jnp.where(closes, 0, total), history.append((total,), slot)

    def finish(self, carry, history):
        weights, history = history.parameter("head")
        query = weights["query"] * weights["scale"]
        return self._read(query, jnp.int32(self._num_sublayers), carry, history)

    def _read(
        self, query_D: jax.Array, index: jax.Array, carry: Carry, history: History
    ) -> tuple[jax.Array, History]:
        """What sublayer `index` reads; M is the head."""
        eps = self.config.norm_eps
        if not self._is_block:

            def read_outputs(query, entries):
                return softmax_read(query, entries[0], index + 1, eps)

            return history.read(read_outputs, query_D)

        def read_blocks(arguments, entries):
            query, running = arguments
            return softmax_read(
                query,
                entries[0][: self.num_entries],
                index // self._size + 1,
                eps,
                last_BxTxD=running,
                last_seen=index % self._size != 0,
            )

        return history.read(read_blocks, (query_D, carry))

    def _closes(self, index: jax.Array) -> jax.Array:
        """Whether sublayer `index` is the last of a block of full size."""
        return (index + 1) % self._size == 0

    @property
    def _is_block(self) -> bool:
        return self.settings.form == "block"

    @property
    def _num_sublayers(self) -> int:
        return 2 * self.config.num_layers

    @property
    def _size(self) -> int:
        """Sublayers of a block."""
        return -(-self._num_sublayers // (self.settings.num_blocks or 8))

    @property
    def num_entries(self) -> int:
        if self._is_block:  # the embedding and the blocks of full size
            return 1 + self._num_sublayers // self._size
        return 1 + self._num_sublayers

    @property
    def capacity(self) -> int:
        return self.num_entries + self._is_block  # and a slot for sums that are not final

    def entry_shapes(self, batch, length):
        return ((batch, length, self.config.embed_dim),)

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        return ReadWeights(self.config.embed_dim)

    def shared_parameters(self, rngs: nnx.Rngs) -> dict[str, Any]:
        width = self.config.embed_dim
        query, scale = jnp.zeros(width), jnp.ones(width)
        return {"head": {"query": parameter(query, (None,)), "scale": parameter(scale, (None,))}}

    def num_parameters(self) -> int:
        return 2 * (self._num_sublayers + 1) * self.config.embed_dim

    def read_flops(self, seq_len: int) -> int:
        """A product for the score and one for the sum, for every entry read."""
        return 4 * seq_len * self.config.embed_dim * sum(self.visible_entries())

    def visible_entries(self) -> list[int]:
        """Entries that each sublayer and the head read."""
        indices = range(self._num_sublayers + 1)
        if not self._is_block:
            return [index + 1 for index in indices]
        return [index // self._size + 1 + (index % self._size != 0) for index in indices]

    def describe(self) -> str:
        form = f"{self.settings.form}, {self.num_entries} entries"
        return f"attention residuals ({form})"
