"""The stack's backward: a reverse scan with one running gradient cache.

Layer l adds into the slots it read (those of layers < l) and takes the finished gradient of the
slots it wrote, since every later layer has been visited by then.

Reading and writing the whole running cache once per layer is most of the depth part's memory
traffic. Deferred (`ModelConfig.depth_grad_block` = b), the backwards of b consecutive layers only
add into the slots that these layers wrote themselves; to the older slots, which all of them read,
they add together in one pass when the first of them has been visited: that traffic is divided by b.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moda_jax import backends, stack_layer
from moda_jax.block import AttentionInputs, KeyValue, Rope
from moda_jax.depth_cache import DepthCache
from moda_jax.layers import compute_dtype
from moda_jax.sharded_attention import DeferredDepth
from moda_jax.stack_layer import StackParams, StackSpec, Tokens


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
    depth: tuple[jax.Array, jax.Array] | None  # [S, B, T, K, H]: the running gradient cache
    projections: Any  # of the own depth projections [W, ...]


def backward(
    spec: StackSpec, params: StackParams, tokens: Tokens, saved: Any, cache: Any, dy: jax.Array
) -> tuple[StackParams, jax.Array]:
    """Gradients of the parameters (float32) and of the stack's input, from dy [B, T, D]."""
    rope = stack_layer.rope_of(spec, tokens)
    context = _Context(spec, params, tokens, rope, saved, cache)
    depth = None
    if cache is not None:
        depth = stack_layer.two_zeros(cache.key.shape, spec.config.depth_grad_dtype)
    projections = jax.tree.map(jnp.zeros_like, (params.attention_kv, params.ffn_kv))
    carry = _Carry(dy, depth, projections)
    deferred = _deferred(context, dy)
    if deferred is None:
        carry, d_blocks = _one_by_one(context, carry)
    else:
        carry, d_blocks = _by_blocks(context, carry, deferred)
    return StackParams(d_blocks, *carry.projections), carry.x


def _one_by_one(context: _Context, carry: _Carry) -> tuple[_Carry, Any]:
    """Every layer adds into all the slots that it read."""

    def attend(call, out, lse, d_out, depth):
        d = call.gradients(out, lse, d_out, depth)
        return d, None if depth is None else (d.depth_key, d.depth_value)

    def body(carry, xs):
        layer, block, saved = xs
        return _layer(context, carry, layer, block, saved, attend)

    layers = jnp.arange(context.spec.config.num_layers)
    return lax.scan(body, carry, (layers, context.params.blocks, context.saved), reverse=True)


def _by_blocks(context: _Context, carry: _Carry, deferred: DeferredDepth) -> tuple[_Carry, Any]:
    """Blocks of layers share one pass over the slots that were written before the block.

    Counted from the last layer: what is left over for the first block reads no older slots.
    """
    spec, cache = context.spec, context.cache
    assert cache is not None
    num_layers = spec.config.num_layers
    size = min(spec.config.depth_grad_block, num_layers)
    num_blocks, rest = divmod(num_layers, size)

    def visit(carry, first, count):
        """The layers first ... first + count - 1, and what they leave for the older slots."""
        older = spec.slots_before(first)

        def body(carry, layer):
            carry, d_blocks = carry
            readers = None

            def attend(call, out, lse, d_out, depth):
                nonlocal readers
                d, readers = deferred.gradients(call, out, lse, d_out, depth, older)
                return d, (d.depth_key, d.depth_value)

            block, saved = _at(context.params.blocks, layer), _at(context.saved, layer)
            carry, d_block = _layer(context, carry, layer, block, saved, attend)
            d_blocks = jax.tree.map(
                lambda total, d: lax.dynamic_update_index_in_dim(total, d, layer, 0),
                d_blocks, d_block,
            )  # fmt: skip
            return (carry, d_blocks), readers

        return lax.scan(body, carry, first + jnp.arange(count), reverse=True)

    def body(carry, n):
        first = rest + n * size
        (carry, d_blocks), readers = visit(carry, first, size)
        older = spec.slots_before(first)
        depth = deferred.add(readers, cache.key, cache.value, carry.depth, 0, older)
        return (carry._replace(depth=depth), d_blocks), None

    # Written in place, layer by layer: stacking the blocks' parts would need a second copy.
    d_blocks = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), context.params.blocks)
    both, _ = lax.scan(body, (carry, d_blocks), jnp.arange(num_blocks), reverse=True)
    if rest:
        both, _ = visit(both, jnp.int32(0), rest)
    return both


def _deferred(context: _Context, x: jax.Array) -> DeferredDepth | None:
    """How to defer with the backend that the layers' calls pick; None for adding layer by layer."""
    spec, cache = context.spec, context.cache
    if spec.config.depth_grad_block == 1 or cache is None:
        return None
    found = []

    def first_call(x):
        weights = stack_layer.layer_params(
            spec, context.params, jnp.int32(0), _at(context.params.blocks, 0)
        )
        inputs = stack_layer.before(spec, context.rope, jnp.int32(0), weights, x)
        call = stack_layer.attention_call(spec, jnp.int32(0), inputs, cache, context.tokens)
        found.append((call.backend(), call.options.scale))

    jax.eval_shape(first_call, x)  # every layer's call has these shapes
    ((backend, scale),) = found
    if backend.deferral is None:
        backends.warn_once(
            f"slow attention: depth_grad_block={spec.config.depth_grad_block} does nothing with "
            f"{backend.name}, which adds every layer's depth gradients by itself"
        )
        return None
    return DeferredDepth(backend.deferral, scale)


def _layer(context: _Context, carry: _Carry, layer, block, saved, attend) -> tuple[_Carry, Any]:
    """One layer's backward; attend(call, o, lse, do, running cache) does its attention's."""
    spec, params, tokens, rope, _, cache = context
    weights = stack_layer.layer_params(spec, params, layer, block)
    inputs, out, lse, before, after = stack_layer.restore(
        spec, rope, layer, weights, saved, cache, tokens
    )
    # Read before anybody adds to the cache: later, the compiler would keep a copy of all of it.
    running, d_depth, d_ffn = lax.optimization_barrier(
        (carry.depth, *_written(spec, layer, carry.depth))
    )
    d_weights_after, dx_after, d_out = after((carry.x, d_ffn))
    call = stack_layer.attention_call(spec, layer, inputs, cache, tokens)
    d, depth = attend(call, out, lse, d_out, running)
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
    return _Carry(dx_after + dx_before, depth, projections), d_weights.blocks


def _written(spec: StackSpec, layer, grads) -> tuple[KeyValue | None, KeyValue | None]:
    """The finished gradients of the attention's and the FFN's slot of a layer; 0 if it has none."""
    if grads is None:
        return None, None
    first = spec.writer(layer) * spec.config.slots_per_writer
    dtype = compute_dtype(spec.config)

    def take(slot):
        own = (lax.dynamic_index_in_dim(g, slot, 0, keepdims=False) for g in grads)
        return tuple(jnp.where(spec.writes(layer), g, 0).astype(dtype) for g in own)

    return take(first), take(first + 1) if spec.config.slots_per_writer == 2 else None


def _add_at(total: jax.Array, d: jax.Array, index, where) -> jax.Array:
    old = lax.dynamic_index_in_dim(total, index, 0, keepdims=False)
    new = old + jnp.where(where, d, 0)
    return lax.dynamic_update_index_in_dim(total, new, index, 0)


def _at(tree: Any, index) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), tree)
