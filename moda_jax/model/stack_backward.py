"""The stack's backward: over the layers, last first.

With one running gradient cache, layer l adds into the slots it read (those of layers < l) and takes
the finished gradient of the slots it wrote, since every later layer has been visited by then.

Gathering (`depth_grad_mode`), there is no running cache. Every layer leaves its queries and output
gradients; a layer's backward begins with what all later ones owe to the slots that it wrote: those
after its block of b layers, in one pass for all slots of the block when the block is reached, then
those of its own block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moda_jax.model import stack_layer
from moda_jax.model.block import AttentionInputs, KeyValue, Rope
from moda_jax.model.layers import compute_dtype
from moda_jax.model.stack_layer import StackParams, StackSpec, Tokens
from moda_jax.ops import backends
from moda_jax.ops.depth_cache import DepthCache
from moda_jax.ops.sharded_attention import ShardedAttention, ShardedGathering
from moda_jax.ops.sharding import stacked_memory


class _Context(NamedTuple):
    """What is the same for every layer."""

    spec: StackSpec
    params: StackParams
    tokens: Tokens
    rope: Rope
    saved: Any  # [L, ...]
    cache: DepthCache | None


class _Carry(NamedTuple):
    """Gradients while the layers are visited, last first."""

    x: jax.Array  # [B, T, D], of the residual stream
    depth: Any
    """(dkd, dvd) [S, B, T, K, H], the running gradient cache; gathering: KeptLayers [L, ...], with
    None for the queries if they are saved; None: no slots."""
    projections: Any  # of the own depth projections [W, ...]


def backward(
    spec: StackSpec, params: StackParams, tokens: Tokens, saved: Any, cache: Any, dy: jax.Array
) -> tuple[StackParams, jax.Array]:
    """Gradients of the parameters (float32) and of the stack's input, from dy [B, T, D]."""
    rope = stack_layer.rope_of(spec, tokens)
    context = _Context(spec, params, tokens, rope, saved, cache)
    projections = jax.tree.map(jnp.zeros_like, (params.attention_kv, params.ffn_kv))
    carry = _Carry(dy, None, projections)
    together = None if cache is None else _together(context, dy)
    if together is not None:
        carry, d_blocks = _by_gathering(context, carry, together)
    else:
        if cache is not None:
            zeros = stack_layer.two_zeros(cache.key.shape, spec.config.running_grad_dtype)
            carry = carry._replace(depth=zeros)
        carry, d_blocks = _one_by_one(context, carry)
    return StackParams(d_blocks, *carry.projections), carry.x


def _one_by_one(context: _Context, carry: _Carry) -> tuple[_Carry, Any]:
    """Every layer adds into all the slots that it read."""

    def visit(layer, state):
        carry, d_blocks = state
        running, finished = _finished(context, carry.depth, layer)

        def attend(call, out, lse, d_out):
            d = call.gradients(out, lse, d_out, running)
            return d, None if running is None else (d.depth_key, d.depth_value)

        return _layer(context, carry, d_blocks, layer, finished, attend)

    return _last_to_first(context, visit, (carry, _memory_of_blocks(context)))


def _by_gathering(context: _Context, carry: _Carry, gathered) -> tuple[_Carry, Any]:
    """A layer's slots get their gradients from the later layers, when the layer is reached.

    Of the layers after its block first, in one pass for all slots of the block.
    """
    spec, cache = context.spec, context.cache
    assert cache is not None
    config, num_layers, num_slots = spec.config, spec.config.num_layers, spec.config.depth_slots
    per_layer = config.slots_per_writer
    size = min(config.depth_grad_block, num_layers)
    count = min(-(-size // config.depth_write_every) * per_layer, num_slots)
    query = stack_layer.saved_query(spec, context.saved)

    def without_saved(kept: Any) -> Any:
        return kept if query is None else kept._replace(query=None)

    def gather(kept: Any, **settings):
        kept = kept._replace(query=kept.query if query is None else query)
        return gathered.gather(kept, cache.key, cache.value, **settings)

    def visit(layer, state):
        carry, d_blocks, so_far = state
        first = layer // size * size
        stop = jnp.minimum(first + size, num_layers)
        base = jnp.clip(spec.slots_before(first), 0, num_slots - count)
        last = num_layers if so_far is None else stop
        if so_far is not None:
            so_far = lax.cond(
                layer == stop - 1,
                lambda kept, _: gather(
                    kept, layers=(stop, num_layers), first=base, count=count,
                    dtype=config.depth_grad_dtype,
                ),
                lambda _, so_far: so_far,
                carry.depth, so_far,
            )  # fmt: skip
        own = spec.writer(layer) * per_layer
        grads = gather(
            carry.depth, layers=(jnp.where(spec.writes(layer), layer + 1, last), last),
            first=own, count=per_layer, dtype=compute_dtype(config), so_far=so_far,
            offset=jnp.clip(own - base, 0, count - per_layer),
        )  # fmt: skip
        # Gathered before this layer's are written: later, the compiler would copy all layers'.
        # Not split before: behind the barrier its readers take a slot where it is.
        before, so_far, grads = lax.optimization_barrier((carry.depth, so_far, grads))
        finished = _split(spec, layer, grads)

        def attend(call, out, lse, d_out):
            d_out = lax.optimization_barrier(d_out)  # or XLA makes it twice: see `stack._stacking`
            d, kept = gathered.gradients(call, out, lse, d_out)
            return d, jax.tree.map(
                lambda all_layers, x: lax.dynamic_update_index_in_dim(all_layers, x, layer, 0),
                before, without_saved(kept),
            )  # fmt: skip

        return *_layer(context, carry, d_blocks, layer, finished, attend), so_far

    depth = without_saved(gathered.empty(_call(context, carry.x), num_layers))
    so_far = None
    if size > 1:
        shape = (count, *cache.key.shape[1:])
        so_far = stack_layer.two_unwritten(shape, jnp.dtype(config.depth_grad_dtype))
    state = carry._replace(depth=depth), _memory_of_blocks(context), so_far
    return _last_to_first(context, visit, state)[:2]


def _last_to_first(context: _Context, visit: Any, state: Any) -> Any:
    """state = visit(layer, state) for all layers, by the loop's own counter (`stack._stacking`)."""
    num_layers = context.spec.config.num_layers
    return lax.fori_loop(0, num_layers, lambda n, state: visit(num_layers - 1 - n, state), state)


def _memory_of_blocks(context: _Context) -> Any:
    """For the blocks' gradients [L, ...], float32."""
    num_layers = context.spec.config.num_layers
    return jax.tree.map(
        lambda p: stacked_memory(num_layers, jax.ShapeDtypeStruct(p.shape[1:], jnp.float32)),
        context.params.blocks,
    )


def _call(context: _Context, x: jax.Array) -> ShardedAttention:
    """The first layer's attention: every layer's has its shapes."""
    spec, layer = context.spec, jnp.int32(0)
    weights = stack_layer.layer_params(
        spec, context.params, layer, stack_layer.at(context.params.blocks, 0)
    )
    inputs = stack_layer.before(spec, context.rope, layer, weights, x)
    return stack_layer.attention_call(spec, layer, inputs, context.cache, context.tokens)


def _together(context: _Context, x: jax.Array) -> ShardedGathering | None:
    """How to gather with the backend that the layers' calls pick; None: add layer by layer."""
    if context.spec.config.depth_grad_mode == "add":
        return None
    found = []

    def first_call(x):
        call = _call(context, x)
        found.append((call, call.backend()))

    jax.eval_shape(first_call, x)
    ((call, backend),) = found
    reason: str | None = f"{backend.name} cannot gather"
    if backend.gathering is not None:
        reason = backend.gathering.unsupported_reason(call.operands)
        if reason is None:
            return ShardedGathering(backend.gathering, call.options.scale)
    backends.warn_once(f"depth_grad_mode=gather: {reason}; depth gradients are added instead")
    return None


def _layer(
    context: _Context, carry: _Carry, d_blocks, layer, finished, attend
) -> tuple[_Carry, Any]:
    """One layer's backward, its gradients written to `d_blocks` [L, ...].

    finished: gradients of its attention's and its FFN's slot. attend(call, o, lse, do) does its
    attention's and returns what the carry has of depth from then on, too.
    """
    spec, params, tokens, rope, all_saved, cache = context
    block, saved = stack_layer.at((params.blocks, all_saved), layer)
    weights = stack_layer.layer_params(spec, params, layer, block)
    inputs, out, lse, before, after = stack_layer.restore(
        spec, rope, layer, weights, saved, cache, tokens
    )
    d_depth, d_ffn = finished
    d_weights_after, dx_after, d_out = after((carry.x, d_ffn))
    call = stack_layer.attention_call(spec, layer, inputs, cache, tokens)
    d, depth = attend(call, out, lse, d_out)
    d_inputs = AttentionInputs(d.query, d.key, d.value)
    if weights.attention_kv is not None:
        d_inputs = d_inputs._replace(depth=d_depth)
    elif d_depth is not None:
        d_inputs = d_inputs._replace(key=d.key + d_depth[0], value=d.value + d_depth[1])
    d_weights_before, dx_before = before(d_inputs)
    d_weights = jax.tree.map(
        lambda a, b: a.astype(jnp.float32) + b.astype(jnp.float32),
        d_weights_before, d_weights_after,
    )  # fmt: skip
    projections = jax.tree.map(
        lambda total, d: _add_at(total, d, spec.writer(layer), spec.writes(layer)),
        carry.projections, (d_weights.attention_kv, d_weights.ffn_kv),
    )  # fmt: skip
    d_blocks = jax.tree.map(
        lambda total, d: lax.dynamic_update_index_in_dim(total, d, layer, 0),
        d_blocks, d_weights.blocks,
    )  # fmt: skip
    return _Carry(dx_after + dx_before, depth, projections), d_blocks


def _finished(context: _Context, running: Any, layer) -> tuple[Any, tuple[Any, Any]]:
    """The running cache, and the gradients in it of the slots that a layer wrote."""
    if running is None:
        return None, (None, None)
    spec = context.spec
    count = spec.config.slots_per_writer
    first = spec.writer(layer) * count
    own = tuple(lax.dynamic_slice_in_dim(g, first, count) for g in running)
    # Read before anybody adds to the cache: later, the compiler would keep a copy of all of it.
    return lax.optimization_barrier((running, _split(spec, layer, own)))


def _split(spec: StackSpec, layer, grads) -> tuple[KeyValue | None, KeyValue | None]:
    """(dkd, dvd) [1 or 2, ...] for a layer's attention's and its FFN's slot; 0 if it has none."""
    dtype = compute_dtype(spec.config)
    if spec.config.depth_write_every > 1:
        grads = [jnp.where(spec.writes(layer), g, 0) for g in grads]
    # Else only the last layer has none, and comes first: nobody has added to any slot yet, or, of
    # an empty range of layers, zeros were gathered.

    def take(slot):
        return tuple(g[slot].astype(dtype) for g in grads)

    return take(0), take(1) if spec.config.slots_per_writer == 2 else None


def _add_at(total: jax.Array, d: jax.Array, index, where) -> jax.Array:
    old = lax.dynamic_index_in_dim(total, index, 0, keepdims=False)
    new = old + jnp.where(where, d, 0)
    return lax.dynamic_update_index_in_dim(total, new, index, 0)
