"""The append-only depth history of a pass over the layers, and how its gradient travels.

Layers append *entries* (keys and values, or outputs) and read those of earlier layers. The history
is append-only, so what layer l sees is a prefix of the final one, and one copy serves the gradients
of all layers.

Forward, `append` writes and `read` reads. In the backward every layer is *replayed* over the final
history: `append` writes nothing, and each operation passes a *thread* on, unchanged. Nobody uses
the thread's value; its cotangent is what counts. It carries the running gradients from the last
layer to the first: the gradient of a read adds to them in place, the gradient of an append takes
the entry's final gradient out of them, since every later layer has been replayed by then.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.operands import Gradients

Entry = tuple[jax.Array, ...]
"""One entry's arrays, each [B, T, ...]."""


class Thread(NamedTuple):
    """Gradients on their way from the last layer to the first."""

    entries: Any
    """The slot-gradient strategy's state."""
    shared: Any
    """Running gradients of the shared parameters."""


class SlotGradients(Protocol):
    """A strategy for the gradients of history entries; see `moda_jax.model.slot_gradients`."""

    def take(self, state: Any, slot: jax.Array, offset: int) -> tuple[Entry, Any]:
        """The final gradient of the entry in slot + offset, and the state after that."""
        ...

    def add(self, state: Any, gradients: Entry) -> Any:
        """The state with gradients [S, B, T, ...] of all entries added."""
        ...

    def attention(
        self, call: Any, out: jax.Array, lse: jax.Array, d_out: jax.Array, state: Any
    ) -> tuple[Gradients, Any]:
        """The backward of a `ShardedAttention` that reads the history as keys and values."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["buffers", "shared", "thread"],
    meta_fields=["strategy"],
)
@dataclasses.dataclass(frozen=True)
class History:
    """Entries written so far, the parameters that several layers share, and the thread.

    Slots that were not written yet are uninitialized: they may hold NaN.
    """

    buffers: Entry  # each [S, B, T, ...]
    shared: Any = None  # float32 pytree
    thread: Thread | None = None  # None: forward
    strategy: SlotGradients | None = None

    @property
    def replays(self) -> bool:
        """Whether this is a layer's second pass, over the final history."""
        return self.thread is not None

    def append(self, entry: Entry, slot: jax.Array) -> "History":
        """The history with the entry in a slot.

        Only for an entry that is computed from the last read; others go through `append_after`.
        """
        return self.append_after([entry], slot, None)[0]

    def append_after(
        self, entries: Sequence[Entry], slot: jax.Array, after: Any
    ) -> tuple["History", Any]:
        """Entries in slot, slot + 1, …, that could be written before the last read; and `after`.

        after: a result of the last read. The barrier makes the writes wait for it, if the caller
        goes on with the `after` that is returned: without, XLA keeps a copy of the whole buffer.
        The barrier also keeps the computation of an entry out of the copy to its slot, which took
        three times as long with it.
        """
        if self.thread is not None:
            thread = self.thread
            for offset, entry in enumerate(entries):
                thread = _append(self.strategy, entry, slot, offset, thread)
            return self._with(thread), after
        buffers, entries, after = lax.optimization_barrier((self.buffers, list(entries), after))
        for offset, entry in enumerate(entries):
            buffers = tuple(
                lax.dynamic_update_index_in_dim(buffer, x.astype(buffer.dtype), slot + offset, 0)
                for buffer, x in zip(buffers, entry, strict=True)
            )
        return dataclasses.replace(self, buffers=buffers), after

    def recall(self, entry: Entry, slot: jax.Array) -> Entry:
        """The entry; in a replay as it stands in the history, with the gradient of `entry`."""
        if not self.replays:
            return entry
        stored = (lax.dynamic_index_in_dim(b, slot, 0, keepdims=False) for b in self.buffers)
        return tuple(known(a, b) for a, b in zip(stored, entry, strict=True))

    def read(self, function: Callable[[Any, Entry], Any], arguments: Any) -> tuple[Any, "History"]:
        """function(arguments, buffers), differentiable in `arguments`.

        `function` masks the slots that are not written yet.
        """
        if self.thread is None:
            return function(arguments, self.buffers), self
        out, thread = _read(self.strategy, function, arguments, self.buffers, self.thread)
        return out, self._with(thread)

    def custom(
        self,
        forward: Callable[[Entry, Any], jax.Array],
        backward: Callable[[Entry, Any, jax.Array, Thread], Thread],
    ) -> tuple[jax.Array, "History"]:
        """forward(buffers, shared), with a gradient that adds to the thread by itself.

        backward(buffers, shared, d_out, thread) -> thread: for reads that see so many entries or
        parameters that gradients of all of them would cost too much.
        """
        if self.thread is None:
            return forward(self.buffers, self.shared), self
        buffers, shared = self.buffers, self.shared

        @jax.custom_vjp
        def custom(thread):
            return forward(buffers, shared), thread

        custom.defvjp(
            lambda thread: (custom(thread), None),
            lambda _, cotangents: (backward(buffers, shared, *cotangents),),
        )
        out, thread = custom(self.thread)
        return out, self._with(thread)

    def parameter(
        self, name: str, index: jax.Array | int | None = None, *, size: int | None = None
    ) -> tuple[Any, "History"]:
        """Shared parameters `name`: all, those at `index`, or `size` from `index` on (axis 0)."""

        def part(tree: Any) -> Any:
            return jax.tree.map(lambda x: _slice(x, index, size), tree)

        if self.thread is None:
            return part(self.shared[name]), self
        value, thread = _parameter(name, part, index, size, self.shared, self.thread)
        return value, self._with(thread)

    def _with(self, thread: Thread) -> "History":
        return dataclasses.replace(self, thread=thread)


@jax.custom_vjp
def known(kept: jax.Array, computed: jax.Array) -> jax.Array:
    """Returns `kept`; its gradient goes to `computed`, whose value XLA then eliminates."""
    return kept


known.defvjp(lambda kept, computed: (kept, None), lambda _, d: (None, d))


def _append(strategy, entry: Entry, slot, offset: int, thread: Thread) -> Thread:
    @jax.custom_vjp
    def append(entry, thread):
        return thread

    def backward(dtypes, thread):
        gradients, state = strategy.take(thread.entries, slot, offset)
        d_entry = tuple(g.astype(x.dtype) for g, x in zip(gradients, dtypes, strict=True))
        return d_entry, thread._replace(entries=state)

    like = tuple(jnp.zeros((), x.dtype) for x in entry)
    append.defvjp(lambda entry, thread: (thread, like), backward)
    return append(entry, thread)


def _read(strategy, function, arguments, buffers: Entry, thread: Thread) -> tuple[Any, Thread]:
    @jax.custom_vjp
    def read(arguments, thread):
        return function(arguments, buffers), thread

    def forward(arguments, thread):
        out, vjp = jax.vjp(function, arguments, buffers)
        return (out, thread), vjp

    def backward(vjp, cotangents):
        d_out, thread = cotangents
        d_arguments, d_buffers = vjp(d_out)
        return d_arguments, thread._replace(entries=strategy.add(thread.entries, d_buffers))

    read.defvjp(forward, backward)
    return read(arguments, thread)


def _parameter(name: str, part, index, size, shared, thread: Thread) -> tuple[Any, Thread]:
    @jax.custom_vjp
    def parameter(thread):
        return part(shared[name]), thread

    def backward(_, cotangents):
        d_part, thread = cotangents
        total = jax.tree.map(
            lambda total, d: _add(total, d, index, size), thread.shared[name], d_part
        )
        return (thread._replace(shared=thread.shared | {name: total}),)

    parameter.defvjp(lambda thread: (parameter(thread), None), backward)
    return parameter(thread)


def _slice(x: jax.Array, index, size: int | None) -> jax.Array:
    if index is None:
        return x
    if size is None:
        return lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
    return lax.dynamic_slice_in_dim(x, index, size, 0)


def _add(total: jax.Array, d: jax.Array, index, size: int | None) -> jax.Array:
    new = _slice(total, index, size) + d.astype(total.dtype)
    if index is None:
        return new
    update = lax.dynamic_update_slice_in_dim if size else lax.dynamic_update_index_in_dim
    return update(total, new, index, 0)
