"""The stack: one loop over the layers, and its gradient with memory linear in depth.

Differentiated as it is, a loop that carries the depth history saves the whole history once per
layer: O(L²). One custom VJP for the stack therefore saves the layers' inputs, what the remat policy
keeps, and one history; backward, it replays layer after layer, last first, over that history (see
`moda_jax.ops.history`). It knows no mechanism: a `Program` says what a layer is.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from moda_jax.config import ExecutionConfig
from moda_jax.depth.mechanism import DepthView, GatherLayout, Step
from moda_jax.layers import rope_table
from moda_jax.model.slot_gradients import choose_strategy
from moda_jax.ops.history import History, Thread, known
from moda_jax.ops.memory import stacked_memory, uninitialized_entries
from moda_jax.ops.sharded_attention import ShardedAttention
from pallas_kernels.varying import vary_like


class StackParams(NamedTuple):
    """Parameters, float32."""

    layers: Any
    """A pytree with a leading axis [L, ...]."""
    shared: Any
    """Parameters outside of the layers, a dict; see `History.parameter`."""


class TokenInfo(NamedTuple):
    """Where the tokens stand; not differentiated."""

    positions: jax.Array  # [B, T] int32
    segment_ids: jax.Array | None  # [B, T] int32; 0 is padding


class Program(Protocol):
    """What the stack runs: hashable, equal where it computes the same."""

    @property
    def num_layers(self) -> int:
        """L."""
        ...

    @property
    def head_dim(self) -> int:
        """H, of the rotary table."""
        ...

    @property
    def rope_theta(self) -> float | None:
        """Of the rotary table; None: the layers rotate by themselves, if at all."""
        ...

    @property
    def capacity(self) -> int:
        """Slots of the history in training; 0: none."""
        ...

    @property
    def inference_capacity(self) -> int:
        """Slots of the history of a pass that is not differentiated."""
        ...

    @property
    def gathers(self) -> GatherLayout | None:
        """None: entries' gradients can only be added."""
        ...

    def entry_shapes(self, batch: int, length: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of one history entry's arrays."""
        ...

    def start(self, x: jax.Array, history: History) -> tuple[Any, History]:
        """The carry before the first layer, from x [B, T, D]; linear in x, without parameters."""
        ...

    def layer(self, weights: Any, step: Step, carry: Any, history: History) -> tuple[Any, History]:
        """The carry after a layer; `weights` are its part of `StackParams.layers`."""
        ...

    def finish(self, carry: Any, history: History) -> tuple[jax.Array, History]:
        """The stack's result [B, T, D]."""
        ...


@dataclasses.dataclass(frozen=True)
class StackSpec:
    """The static side of a stack."""

    program: Program
    execution: ExecutionConfig
    """Resolved: nothing in it is "auto" but the attention implementation."""


SAVED_BY_ATTENTION = frozenset({"query", "key", "value", "attention", "lse"})
"""What `remat="save_attention"` keeps, attention's inputs and results, beside products named
`*_key`, which become depth keys. Where keys and values go to the history anyway, they are kept
there alone."""


def run_stack(spec: StackSpec, params: StackParams, x_BxTxD: jax.Array, tokens: TokenInfo):
    """y [B, T, D] after all layers, differentiable in `params` and `x`; memory linear in L."""
    # Under `shard_map`: gradients of parameters that are the same everywhere are summed.
    return _run_stack(spec, *vary_like((params, x_BxTxD, tokens), (params, x_BxTxD, tokens)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_stack(spec: StackSpec, params: StackParams, x_BxTxD: jax.Array, tokens: TokenInfo):
    return _forward(spec, params, x_BxTxD, tokens, save=False)[0]


def _run_stack_forward(spec, params, x, tokens):
    y, *saved = _forward(spec, params, x, tokens, save=True)
    return y, (params, tokens, *saved)


def _run_stack_backward(spec: StackSpec, residuals, dy):
    params, tokens, carry, saved, buffers = residuals
    return *_backward(spec, params, tokens, carry, saved, buffers, dy), None


_run_stack.defvjp(_run_stack_forward, _run_stack_backward)


def _forward(spec: StackSpec, params: StackParams, x, tokens: TokenInfo, *, save: bool):
    """(y, the last carry, what each layer saved [L, ...], the final history's buffers)."""
    program, rope = spec.program, _rope(spec, tokens)

    def visit(state, layer):
        carry, buffers = state
        kept: dict[str, jax.Array] = {}

        def keep(x, name):
            if save and _keeps(spec, name):
                assert name not in kept, f"{name} was kept before"
                kept[name] = x
            return x

        def attend(query, key, value, history, *, depth=None):
            query = keep(query, _own_name("query", key))
            if key is not None and (depth is None or depth.own_slot is None):
                key, value = keep(key, "key"), keep(value, "value")
            call = _attention_call(spec, query, key, value, history, depth, tokens)
            out, lse = call.forward()
            keep(lse, _own_name("lse", key))
            return keep(out, _own_name("attention", key)), history

        step = Step(layer, tokens.positions, rope, keep, attend)
        history = History(buffers, params.shared)
        saved = (carry,)
        carry, history = program.layer(_at(params.layers, layer), step, carry, history)
        return (carry, history.buffers), (*saved, kept) if save else None

    buffers = empty_buffers(program, x, program.capacity)
    carry, history = program.start(x, History(buffers, params.shared))
    (carry, buffers), saved = _stacking(visit, (carry, history.buffers), program.num_layers)
    y, _ = program.finish(carry, History(buffers, params.shared))
    return y, carry, saved, buffers


def _own_name(name: str, key: jax.Array | None) -> str:
    """Names of what a call keeps: one over depth alone stands beside the layer's attention."""
    return name if key is not None else f"depth_{name}"


def _keeps(spec: StackSpec, name: str) -> bool:
    """Whether the remat policy keeps what a layer calls `name`."""
    policy = spec.execution.remat
    attention = name.removeprefix("depth_") in SAVED_BY_ATTENTION or name.endswith("_key")
    return policy == "save_products" or (policy == "save_attention" and attention)


def _stacking(body, carry, length: int):
    """`lax.scan(body, carry, arange(length))`, but by the loop's own counter.

    What is indexed by the counter, XLA for GPUs copies beside other work, or hands to a kernel
    where it lies; what is indexed by an element of an array, it copies first. Nor do the stacked
    results begin with zeros.
    """
    shapes = jax.eval_shape(lambda c: body(c, jnp.int32(0))[1], carry)

    def step(index, state):
        carry, stacked = state
        carry, results = body(carry, index)
        # Without a barrier XLA computes a result twice: for its place here, and for who uses it.
        results = lax.optimization_barrier(results)
        return carry, jax.tree.map(
            lambda layers, x: lax.dynamic_update_index_in_dim(layers, x, index, 0),
            stacked,
            results,
        )

    memory = jax.tree.map(lambda x: stacked_memory(length, x), shapes)
    memory = vary_like(memory, carry)
    return lax.fori_loop(0, length, step, (carry, memory))


def _backward(
    spec: StackSpec,
    params: StackParams,
    tokens: TokenInfo,
    carry: Any,
    saved: Any,
    buffers: tuple[jax.Array, ...],
    dy: jax.Array,
) -> tuple[StackParams, jax.Array]:
    """Gradients of the parameters (float32) and of the stack's input, from dy [B, T, D]."""
    program, rope, num_layers = spec.program, _rope(spec, tokens), spec.program.num_layers
    strategy = choose_strategy(
        program.gathers,
        spec.execution,
        num_layers,
        buffers,
        saved[1].get("query"),
        call=lambda: _first_call(spec, params, tokens, saved, buffers),
    )
    shared = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params.shared)

    def replay(piece, differentiated, thread, strategy, cotangent):
        """Gradients of `differentiated` and the thread, of piece(*differentiated, history)."""

        def run(thread, *differentiated):
            out, history = piece(*differentiated, History(buffers, params.shared, thread, strategy))
            return out, history.thread

        # The thread's value is never used, only its cotangent.
        value = jax.tree.map(lambda x: vary_like(jnp.zeros(x.shape, x.dtype), x), thread)
        _, vjp = jax.vjp(run, value, *differentiated)
        thread, *gradients = vjp((cotangent, thread))
        return gradients, thread

    thread = vary_like(Thread(strategy.start(), shared), dy)
    (d_carry,), thread = replay(program.finish, (carry,), thread, strategy, dy)

    def visit(n, state):
        d_carry, thread, d_layers = state
        layer = num_layers - 1 - n
        weights, (carry, kept) = _at((params.layers, saved), layer)
        strategy_here, entries = strategy.begin(thread.entries, layer)
        step = Step(
            layer, tokens.positions, rope, _keep_again(kept), _attend_again(spec, tokens, kept)
        )

        def run(weights, carry, history):
            return program.layer(weights, step, carry, history)

        (d_weights, d_carry), thread = replay(
            run, (weights, carry), thread._replace(entries=entries), strategy_here, d_carry
        )
        d_layers = jax.tree.map(
            lambda total, d: lax.dynamic_update_index_in_dim(
                total, d.astype(total.dtype), layer, 0
            ),
            d_layers,
            d_weights,
        )
        return d_carry, thread._replace(entries=strategy.end(thread.entries)), d_layers

    d_layers = jax.tree.map(
        lambda p: stacked_memory(num_layers, jax.ShapeDtypeStruct(p.shape[1:], p.dtype)),
        params.layers,
    )
    d_layers = vary_like(d_layers, dy)
    d_carry, thread, d_layers = lax.fori_loop(0, num_layers, visit, (d_carry, thread, d_layers))
    x = jnp.zeros_like(dy)  # for the stack's input: `start` is linear, no gradient depends on x
    (dx,), thread = replay(program.start, (x,), thread, strategy, d_carry)
    return StackParams(d_layers, thread.shared), dx


def _keep_again(kept: Mapping[str, jax.Array]) -> Callable[[jax.Array, str], jax.Array]:
    """What the forward saved takes the place of what would be computed again."""
    return lambda x, name: known(kept[name], x) if name in kept else x


def _attend_again(spec: StackSpec, tokens: TokenInfo, kept: Mapping[str, jax.Array]):
    """`Step.attend` of a replay: its gradient calls the attention's own backward."""
    keep = _keep_again(kept)

    def attend(query, key, value, history: History, *, depth: DepthView | None = None):
        query = keep(query, _own_name("query", key))
        if key is not None and depth is not None and depth.own_slot is not None:
            key, value = history.recall((key, value), depth.own_slot)
        elif key is not None:
            key, value = keep(key, "key"), keep(value, "value")
        names = [_own_name(name, key) for name in ("attention", "lse")]
        saved = [kept[name] for name in names] if names[0] in kept else None

        def make_call(query, key, value, bias, history):
            view = None if depth is None else depth._replace(score_bias=bias)
            return _attention_call(spec, query, key, value, history, view, tokens)

        bias = None if depth is None else depth.score_bias
        out, thread = _attention(history, make_call, saved, query, key, value, bias)
        return out, dataclasses.replace(history, thread=thread)

    return attend


def _attention(history: History, make_call, saved, query, key, value, bias):
    """(o, thread); backward, depth gradients go into the thread."""

    @jax.custom_vjp
    def attend(query, key, value, bias, thread):
        return forward(query, key, value, bias, thread)[0]

    def forward(query, key, value, bias, thread):
        if saved is None:
            out, lse = make_call(query, key, value, bias, history).forward()
        else:
            out, lse = saved
        return (out, thread), (query, key, value, bias, out, lse)

    def backward(residuals, cotangents):
        *inputs, out, lse = residuals
        d_out, thread = cotangents
        call = make_call(*inputs, history)
        if call.operands.depth_key is None:
            d = call.gradients(out, lse, d_out, None)
        else:
            assert history.strategy is not None
            d, entries = history.strategy.attention(call, out, lse, d_out, thread.entries)
            thread = thread._replace(entries=entries)
        return d.query, d.key, d.value, call.bias_gradient(out, lse, d_out), thread

    attend.defvjp(forward, backward)
    return attend(query, key, value, bias, history.thread)


def _attention_call(
    spec: StackSpec, query, key, value, history: History, depth: DepthView | None, tokens: TokenInfo
) -> ShardedAttention:
    """The layer's attention over sequence and depth."""
    return ShardedAttention.of(
        query,
        key,
        value,
        **depth_arguments(history, depth),
        segment_ids=tokens.segment_ids,
        implementation=implementation(spec),
    )


def depth_arguments(history: History, depth: DepthView | None) -> dict[str, Any]:
    """The depth arguments of `moda_attention` for a view of the history."""
    if depth is None:
        return {}
    key, value = history.buffers
    return {
        "depth_key": key,
        "depth_value": value,
        "depth_length": depth.length,
        "depth_window": depth.window,
        "depth_reserved": depth.reserved,
        "depth_bias": depth.score_bias,
    }


def implementation(spec: StackSpec) -> str | None:
    """The name for `moda_attention`; None picks the fastest."""
    return None if spec.execution.attention == "auto" else spec.execution.attention


def _first_call(spec: StackSpec, params, tokens, saved, buffers) -> ShardedAttention:
    """The first layer's attention call: every layer's has its shapes."""
    calls = []

    def attend(query, key, value, history, *, depth=None):
        calls.append(_attention_call(spec, query, key, value, history, depth, tokens))
        return query, history

    step = Step(jnp.int32(0), tokens.positions, _rope(spec, tokens), lambda x, _: x, attend)
    weights, carry = _at((params.layers, saved[0]), 0)
    spec.program.layer(weights, step, carry, History(buffers, params.shared))
    return calls[0]


def empty_buffers(program: Program, x: jax.Array, capacity: int) -> tuple[jax.Array, ...]:
    """Uninitialized buffers [capacity, B, T, ...] for a pass over x [B, T, D]."""
    shapes = program.entry_shapes(*x.shape[:2])
    like = tuple(jax.ShapeDtypeStruct((capacity, *shape), x.dtype) for shape in shapes)
    return vary_like(uninitialized_entries(like), x)


def _rope(spec: StackSpec, tokens: TokenInfo) -> tuple[jax.Array, jax.Array] | None:
    if spec.program.rope_theta is None:
        return None
    return rope_table(tokens.positions, spec.program.head_dim, spec.program.rope_theta)


def _at(tree: Any, index) -> Any:
    """What stacked arrays [L, ...] have at an index."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), tree)


Attend = Callable[..., tuple[jax.Array, Any, Any]]
"""(layer, query, key, value, depth arguments, state) -> (o, new state, what this layer emits)."""


def scan_layers(
    spec: StackSpec,
    params: StackParams,
    x_BxTxD: jax.Array,
    tokens: TokenInfo,
    attend: Attend,
    state: Any = None,
    *,
    keep_entries: bool = False,
    emit_depth: Callable[[ShardedAttention], Any] | None = None,
) -> tuple[jax.Array, Any, Any]:
    """Inference over all layers: (y, final state, what was emitted [L, ...]).

    `attend` does the layers' attention over the sequence, so that prefill, decoding and analysis
    share this scan. Bounded slots live in a ring buffer, which nobody could differentiate; with
    `keep_entries` every entry keeps its own slot. With `emit_depth` each layer emits a pair: what
    `attend` does, and what `emit_depth` makes of its attention over depth alone (None without any).
    """
    params, x_BxTxD, tokens = vary_like((params, x_BxTxD, tokens), (params, x_BxTxD, tokens))
    program, rope = spec.program, _rope(spec, tokens)

    def body(loop, layer_and_weights):
        carry, buffers, state = loop
        layer, weights = layer_and_weights
        results: list[tuple[Any, Any]] = []
        depth_calls: list[ShardedAttention] = []

        def attend_here(query, key, value, history, *, depth=None):
            arguments = depth_arguments(history, depth)
            if key is None:
                call = ShardedAttention.of(
                    query, None, None, **arguments, implementation=implementation(spec)
                )
                depth_calls.append(call)
                return call.forward()[0], history
            out, *result = attend(layer, query, key, value, arguments, state)
            results.append(tuple(result))
            return out, history

        step = Step(layer, tokens.positions, rope, lambda x, _: x, attend_here)
        history = History(buffers, params.shared)
        carry, history = program.layer(weights, step, carry, history)
        ((state, emitted),) = results
        if emit_depth is not None:
            emitted = emitted, emit_depth(depth_calls[0]) if depth_calls else None
        return (carry, history.buffers, state), emitted

    capacity = program.capacity if keep_entries else program.inference_capacity
    buffers = empty_buffers(program, x_BxTxD, capacity)
    carry, history = program.start(x_BxTxD, History(buffers, params.shared))
    xs = jnp.arange(program.num_layers), params.layers
    (carry, buffers, state), emitted = lax.scan(body, (carry, history.buffers, state), xs)
    y, _ = program.finish(carry, History(buffers, params.shared))
    return y, state, emitted
