"""Mixture-of-Depths Attention (Zhu et al., arXiv 2603.15619, Alg. 1).

The residual stream is a plain one; attention also reads, under the same softmax, the keys and
values that earlier layers wrote at the query's own token. The attention sublayer writes its own
K, V (rows 3 and 4 of Table 3) or an own projection (row 5), the FFN sublayer a projection of what
it reads (rows 4 and 5). Every key has its layer's key norm and rotation: a query and the depth keys
of its token share a position, so that the rotations cancel.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moda_jax.config import MoDAConfig, ModelConfig
from moda_jax.depth.mechanism import ATTENTION, DepthView, GatherLayout, Mechanism, Output, Step
from moda_jax.layers import KVProjection, parameter, stacked
from moda_jax.ops.depth_cache import DepthCache
from moda_jax.ops.history import Entry, History


class WithEntries(NamedTuple):
    """The carry inside of a layer."""

    x: jax.Array
    """[B, T, D], the residual stream."""
    entries: list[Entry]
    """What attention writes. It goes to the history at the layer's end, with the FFN's entry: a
    barrier in the middle of a layer would keep XLA from fusing across it (1% of a step)."""


class ScoreBias(nnx.Module):
    """What one layer learns to add to its depth scores."""

    def __init__(self, config: ModelConfig) -> None:
        self.score_bias = parameter(jnp.zeros(config.num_heads), ("heads",))


class MoDA(Mechanism[MoDAConfig]):
    """The history has s = 1 or 2 slots for each of the W writing layers."""

    def depth_view(self, step: Step, weights: Any, history: History) -> DepthView | None:
        if not self.num_entries:
            return None
        settings = self.settings
        bias = None
        if settings.score_bias is not None:
            bias = weights.score_bias[...] + settings.score_bias
        if self._is_ring(history):  # a softmax does not care for the order of the slots
            slots = history.buffers[0].shape[0]
            return DepthView(jnp.minimum(self._slots_before(step.layer), slots), score_bias=bias)
        reuses = settings.attention_kv == "reuse" and settings.write_every == 1
        own_slot = self._slot(step) if reuses else None
        visible = self._slots_before(step.layer)
        return DepthView(visible, settings.window, settings.reserved, own_slot, bias)

    def read(self, step, weights, sublayer, carry, history):
        return (carry if sublayer == ATTENTION else carry.x), carry, history

    def write(self, step, weights, sublayer, layer, carry, history, output: Output):
        entries, history = self._entries(step, sublayer, layer, history, output)
        if sublayer == ATTENTION:
            return WithEntries(layer.join(carry, output.branch, sublayer), entries), history
        x = layer.join(carry.x, output.branch, sublayer)
        return self._append(step, history, carry.entries + entries, x)

    def _entries(
        self, step: Step, sublayer: int, layer: Any, history: History, output: Output
    ) -> tuple[list[Entry], History]:
        """The key and value that a sublayer writes: one entry, or none."""
        settings = self.settings
        kind = settings.attention_kv if sublayer == ATTENTION else settings.ffn_kv
        if not self.num_entries or kind == "none":
            return [], history
        if kind == "project":
            name = ("attention_kv", "ffn_kv")[sublayer]
            entry, history = self._project(step, name, layer, history, output.source)
            return [entry], history
        assert output.key is not None
        assert output.value is not None
        return [(output.key, output.value)], history

    def _append(
        self, step: Step, history: History, entries: list[Entry], x: jax.Array
    ) -> tuple[jax.Array, History]:
        """Writes what the layer has to write; x [B, T, D] is the stream after it."""
        if not entries:
            return x, history
        if self._is_ring(history):
            cache = self._ring(history, self._slots_before(step.layer))
            for entry in entries:
                cache = cache.append(*entry, where=self._writes(step.layer))
            return x, dataclasses.replace(history, buffers=(cache.key, cache.value))
        # Attention has read the history by the time that x is there.
        history, x = history.append_after(entries, self._slot(step), x)
        return x, history

    def _is_ring(self, history: History) -> bool:
        """Whether slots turn in a buffer of reserved + window: inference with bounded slots."""
        return history.buffers[0].shape[0] < self.num_entries

    def _ring(self, history: History, length: jax.Array) -> DepthCache:
        settings = self.settings
        key, value = history.buffers
        return DepthCache(key, value, length, settings.window, settings.reserved, ring=True)

    def inference_capacity(self) -> int:
        if self.settings.window is None:
            return self.capacity
        ring = self.settings.reserved + self.settings.window
        return ring if ring < self.num_entries else self.capacity

    def _project(
        self, step: Step, name: str, layer: Any, history: History, source: jax.Array
    ) -> tuple[Entry, History]:
        """Keys and values of an own projection; zeros in layers that do not write."""
        writer = jnp.minimum(step.layer // self.settings.write_every, self.num_writers - 1)
        weights, history = history.parameter(name, writer)
        if self.settings.write_every == 1:  # all but the last write: a conditional costs more
            keep = lambda x: step.keep(x, f"{name}_key")  # noqa: E731
            return layer.depth_keys_values(weights, source, step.rope, keep), history

        def project(weights, source):
            return layer.depth_keys_values(weights, source, step.rope, lambda x: x)

        def nothing(weights, source):
            shapes = jax.eval_shape(project, weights, source)
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        return lax.cond(self._writes(step.layer), project, nothing, weights, source), history

    def _writes(self, layer: jax.Array) -> jax.Array:
        """Whether somebody reads what `layer` writes: every n-th layer, never the last."""
        every, last = self.settings.write_every, self.config.num_layers - 1
        return (layer % every == 0) & (layer < last)

    def _slots_before(self, layer: jax.Array) -> jax.Array:
        """Slots written by the layers before `layer`: what its attention sees."""
        every = self.settings.write_every
        return (layer + every - 1) // every * self.settings.slots_per_writer

    def _slot(self, step: Step) -> jax.Array:
        """The first slot of the layer.

        Layers whose slots nobody reads write to a spare one behind all others, so that a write
        needs no condition: a conditional write would read the slot to keep it.
        """
        slot = self._slots_before(step.layer)
        if self.settings.write_every == 1:  # the last layer's slots are the last ones by themselves
            return slot
        return jnp.where(self._writes(step.layer), slot, self.num_entries)

    @property
    def num_writers(self) -> int:
        """W, layers whose slots somebody reads: of layers 0 … L−2, every n-th."""
        return -(-(self.config.num_layers - 1) // self.settings.write_every)

    @property
    def num_entries(self) -> int:
        return self.num_writers * self.settings.slots_per_writer

    @property
    def capacity(self) -> int:
        return self.num_entries + self.settings.slots_per_writer if self.num_entries else 0

    def entry_shapes(self, batch, length):
        if not self.num_entries:
            return ()
        return ((batch, length, self.config.num_kv_heads, self.config.head_dim),) * 2

    def gather_layout(self) -> GatherLayout | None:
        settings = self.settings
        if not self.num_entries:
            return None
        return GatherLayout(
            settings.slots_per_writer,
            settings.write_every,
            self.num_entries,
            settings.window,
            self._has_score_bias,
        )

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        return ScoreBias(self.config) if self._has_score_bias else None

    @property
    def _has_score_bias(self) -> bool:
        return self.settings.score_bias is not None and self.num_entries > 0

    def shared_parameters(self, rngs: nnx.Rngs) -> dict[str, Any]:
        kinds = {"attention_kv": self.settings.attention_kv, "ffn_kv": self.settings.ffn_kv}
        return {
            name: stacked(lambda rngs: KVProjection(self.config, rngs=rngs), self.num_writers, rngs)
            for name, kind in kinds.items()
            if kind == "project" and self.num_writers
        }

    def _num_projections(self) -> int:
        kinds = (self.settings.attention_kv, self.settings.ffn_kv)
        return self.num_writers * sum(kind == "project" for kind in kinds)

    def num_parameters(self) -> int:
        config = self.config
        width = config.num_kv_heads * config.head_dim
        biases = config.num_layers * config.num_heads * self._has_score_bias
        return self._num_projections() * 2 * width * (config.embed_dim + config.use_bias) + biases

    def projection_flops(self, seq_len: int) -> int:
        width = self.config.num_kv_heads * self.config.head_dim
        return 2 * seq_len * self._num_projections() * 2 * width * self.config.embed_dim

    def read_flops(self, seq_len: int) -> int:
        width = self.config.num_heads * self.config.head_dim
        return 4 * seq_len * width * sum(self.visible_slots())

    def visible_slots(self) -> list[int]:
        """Depth slots that each layer's attention sees."""
        every, per_writer = self.settings.write_every, self.settings.slots_per_writer
        slots = [-(-layer // every) * per_writer for layer in range(self.config.num_layers)]
        if self.settings.window is None:
            return slots
        return [min(n, self.settings.reserved + self.settings.window) for n in slots]

    def describe(self) -> str:
        return f"{self.num_entries} depth slots" if self.num_entries else "no depth slots"

    def slot_labels(self) -> list[str]:
        """The layer that wrote a slot and, with FFN slots, by which sublayer."""
        sublayers = ("a", "f") if self.settings.slots_per_writer == 2 else ("",)
        return [
            f"{writer * self.settings.write_every}{sublayer}"
            for writer in range(self.num_writers)
            for sublayer in sublayers
        ]
