"""The two ways to come by the gradients of history entries.

*Adding* keeps one running buffer. Layer l adds the gradients of the entries that it read; the
gradient of an entry that it wrote is final then, since every later layer has been replayed.

*Gathering*, for keys and values that attention reads, keeps no running buffer. Every layer leaves
its queries and output gradients; a layer's replay begins with what all later layers contribute to
the slots that it wrote: the layers after its block of b layers in one pass for all slots of the
block, when the block is reached, then the layers of its own block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moda_jax.config import ExecutionConfig
from moda_jax.depth.mechanism import GatherLayout
from moda_jax.ops import backends
from moda_jax.ops.history import Entry
from moda_jax.ops.memory import uninitialized_entries, zero_entries
from moda_jax.ops.sharded_attention import ShardedAttention, ShardedGathering
from pallas_kernels.operands import Gradients, KeptLayers, num_kv_heads


@dataclasses.dataclass(frozen=True, eq=False)
class Adding:
    """One running buffer like each of the history's buffers, which is the state."""

    dtype: Any
    buffers: Entry
    """The final history."""

    def start(self) -> Entry:
        """Zeros."""
        return zero_entries(self.buffers, self.dtype)

    def begin(self, state: Entry, layer: jax.Array) -> tuple["Adding", Entry]:
        """Called before `layer` is replayed: the strategy and the state for it."""
        return self, state

    def end(self, state: Entry) -> Entry:
        """Called after a layer was replayed: what the next one needs."""
        return state

    def take(self, state: Entry, slot: jax.Array, offset: int) -> tuple[Entry, Entry]:
        """A slot that no layer read has gradient 0."""
        own = tuple(lax.dynamic_index_in_dim(g, slot + offset, 0, keepdims=False) for g in state)
        # The barrier orders reading this slot before the next addition to the buffer: without it
        # XLA keeps a copy of the whole buffer.
        state, own = lax.optimization_barrier((state, own))
        return own, state

    def add(self, state: Entry, gradients: Entry) -> Entry:
        """Adds in float32 and rounds once."""
        return tuple(
            (total + g.astype(jnp.float32)).astype(total.dtype)
            for total, g in zip(state, gradients, strict=True)
        )

    def attention(
        self, call: ShardedAttention, out: jax.Array, lse: jax.Array, d_out: jax.Array, state: Entry
    ) -> tuple[Gradients, Entry]:
        """The backward of an attention call that reads keys and values of the history."""
        running_key, running_value = state
        d = call.gradients(out, lse, d_out, (running_key, running_value))
        assert d.depth_key is not None
        assert d.depth_value is not None
        return d, (d.depth_key, d.depth_value)


class GatherState(NamedTuple):
    """What gathering carries from the last layer to the first."""

    kept: KeptLayers
    """[L, ...], written layer by layer; None for the queries where they are saved anyway."""
    block: Any
    """What the layers after the block contribute to the block's slots; None for blocks of 1."""
    own: Any = None
    """Final gradients of the slots of the layer that is replayed, each [s, B, T, K, H]."""


@dataclasses.dataclass(frozen=True, eq=False)
class Gathering:
    """Gradients from the layers that read a slot, when the layer that wrote it is reached."""

    gathered: ShardedGathering
    call: ShardedAttention
    """Every layer's attention has its shapes."""
    layout: GatherLayout
    num_layers: int
    block: int
    dtype: Any
    """Of what the layers after a block contribute."""
    buffers: Entry
    """The final history, keys and values."""
    query: jax.Array | None
    """[L, B, T, N, H] if the forward saved the queries."""
    layer: jax.Array | None = None
    """The layer that is replayed."""

    @property
    def _block_slots(self) -> int:
        writers = -(-min(self.block, self.num_layers) // self.layout.write_every)
        return min(writers * self.layout.per_layer, self.layout.num_slots)

    def start(self) -> GatherState:
        """Uninitialized memory: every part is written before it is read."""
        kept = self._without_saved(self.gathered.empty(self.call, self.num_layers))
        block = None
        if min(self.block, self.num_layers) > 1:
            block = uninitialized_entries(self.buffers, self.dtype, count=self._block_slots)
        return GatherState(kept, block)

    def begin(self, state: GatherState, layer: jax.Array) -> tuple["Gathering", GatherState]:
        """Computes the final gradients of the slots that `layer` wrote."""
        per_layer, every, num_slots, *_ = self.layout
        last = self.num_layers
        size = min(self.block, self.num_layers)
        first = layer // size * size
        stop = jnp.minimum(first + size, last)
        base = jnp.clip(self._slots_before(first), 0, num_slots - self._block_slots)
        block = state.block
        if block is not None:
            block = lax.cond(
                layer == stop - 1,
                lambda kept, _: self._gather(
                    kept,
                    layers=(stop, last),
                    first=base,
                    count=self._block_slots,
                    dtype=self.dtype,
                ),
                lambda _, block: block,
                state.kept,
                block,
            )
        writes = (layer % every == 0) & (layer < last - 1)
        until = last if block is None else stop
        writer = jnp.minimum(layer // every, num_slots // per_layer - 1)
        slot = writer * per_layer
        own = self._gather(
            state.kept,
            layers=(jnp.where(writes, layer + 1, until), until),
            first=slot,
            count=per_layer,
            dtype=self.buffers[0].dtype,
            so_far=block,
            offset=jnp.clip(slot - base, 0, self._block_slots - per_layer),
        )
        if every > 1:  # else only the last layer's slots are unread, and zero layers sum to 0
            own = tuple(jnp.where(writes, g, 0) for g in own)
        # The barrier orders gathering before this layer's results are kept: later, XLA would copy
        # those of all layers. The slots are split behind it, so that who uses a slot's gradient
        # reads it where it is.
        state = GatherState(*lax.optimization_barrier((state.kept, block, own)))
        return dataclasses.replace(self, layer=layer), state

    def end(self, state: GatherState) -> GatherState:
        """The layer's own slots have served."""
        return state._replace(own=None)

    def take(self, state: GatherState, slot: jax.Array, offset: int) -> tuple[Entry, GatherState]:
        """One of the layer's own slots: `begin` has computed them."""
        return tuple(g[offset] for g in state.own), state

    def add(self, state: GatherState, gradients: Entry) -> GatherState:
        """Only attention's gradient can be gathered."""
        raise NotImplementedError("gathering: the history is read by other means than attention")

    def attention(
        self,
        call: ShardedAttention,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
        state: GatherState,
    ) -> tuple[Gradients, GatherState]:
        """The backward without the slots' gradients; keeps what those need of this layer."""
        # Without a barrier XLA computes d_out twice, for its place in `kept` and for the kernel.
        d_out = lax.optimization_barrier(d_out)
        d, kept = self.gathered.gradients(call, out, lse, d_out)
        kept = jax.tree.map(
            lambda layers, x: lax.dynamic_update_index_in_dim(layers, x, self.layer, 0),
            state.kept,
            self._without_saved(kept),
        )
        return d, state._replace(kept=kept)

    def _slots_before(self, layer: jax.Array) -> jax.Array:
        every = self.layout.write_every
        return (layer + every - 1) // every * self.layout.per_layer

    def _without_saved(self, kept: KeptLayers) -> KeptLayers:
        none: Any = None
        return kept if self.query is None else kept._replace(query=none)

    def _gather(self, kept: KeptLayers, **settings: Any) -> Entry:
        kept = kept if self.query is None else kept._replace(query=self.query)
        return self.gathered.gather(kept, *self.buffers, **settings)


class Choice(NamedTuple):
    """How a stack gets the gradients of its entries, and why."""

    gathers: bool
    block: int
    dtype: str
    reason: str


GATHER_BELOW = 4
"""Query heads per key/value head from which adding is chosen: gathering keeps 2 L N H numbers of 16
bits a token, adding 2 S K H of 32. Measured on an H200, tokens/s: G = 2 and 3 gather faster (by 8%
of the step), at G = 8 adding is (by 2%)."""


def choose(
    layout: GatherLayout | None, execution: ExecutionConfig, call: ShardedAttention | None
) -> Choice:
    """The strategy for a stack whose layers' attention is `call`; None: it reads no history."""
    adds, reason = execution.slot_gradients == "add", "asked for"
    if not adds:
        unsupported = _why_not_gather(layout, call)
        if unsupported is None and execution.slot_gradients == "auto":
            unsupported = _why_slower(call)
        adds = unsupported is not None
        reason = unsupported or (
            "asked for" if execution.slot_gradients == "gather" else "few query heads a KV head"
        )
        if adds and call is not None and execution.slot_gradients == "gather":
            backends.warn_once(f"slot_gradients=gather: {reason}; they are added instead")
    if adds:
        fell_back = execution.slot_gradients == "gather"
        asked = "auto" if fell_back else execution.slot_gradient_dtype
        return Choice(False, 1, "float32" if asked == "auto" else asked, reason)
    block, dtype = execution.slot_gradient_block, execution.slot_gradient_dtype
    default = "bfloat16" if execution.compute_dtype == "bfloat16" else "float32"
    return Choice(
        True, 4 if block == "auto" else block, default if dtype == "auto" else dtype, reason
    )


def choose_strategy(
    layout: GatherLayout | None,
    execution: ExecutionConfig,
    num_layers: int,
    buffers: Entry,
    query: jax.Array | None,
    call: Callable[[], ShardedAttention],
) -> Adding | Gathering:
    """`call` makes the first layer's attention call; `query`: queries of all layers, if saved."""
    first = call() if layout is not None else None
    choice = choose(layout, execution, first)
    if not choice.gathers:
        return Adding(jnp.dtype(choice.dtype), buffers)
    assert first is not None
    assert layout is not None
    gathering = first.backend().gathering
    assert gathering is not None
    return Gathering(
        ShardedGathering(gathering, first.options.scale),
        first,
        layout,
        num_layers,
        choice.block,
        jnp.dtype(choice.dtype),
        buffers,
        query,
    )


def _why_not_gather(layout: GatherLayout | None, call: ShardedAttention | None) -> str | None:
    if layout is None or call is None:
        return "the history is read by other means than attention"
    if call.depth_bias is not None:
        return "depth scores have a bias"
    if call.options.depth_window is not None:
        return "bounded slots are not seen by all later layers"
    backend = call.backend()
    if backend.gathering is None:
        return f"{backend.name} cannot gather"
    return backend.gathering.unsupported_reason(call.operands)


def _why_slower(call: ShardedAttention | None) -> str | None:
    assert call is not None
    group = call.operands.query.shape[2] // num_kv_heads(call.operands)
    if group >= GATHER_BELOW:
        return f"{group} query heads a KV head make gathering larger"
    name = call.backend().name
    return f"{name} has no kernel for gathering" if name == "xla" else None
