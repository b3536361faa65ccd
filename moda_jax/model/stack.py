"""The layer stack: one loop over the layers, with memory linear in depth.

Differentiated as it is, a loop that carries the depth cache saves the whole cache once per layer:
O(L²). The cache is append-only, so every layer's view is a prefix of the final one. One custom VJP
for the whole stack therefore keeps the layers' inputs and one cache, and runs backward with one
gradient cache or less: see `stack_backward`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moda_jax.model import stack_backward, stack_layer
from moda_jax.model.stack_layer import StackParams, StackSpec, Tokens
from moda_jax.ops.sharding import stacked_memory

__all__ = ["StackParams", "StackSpec", "Tokens", "run_stack", "scan_layers"]

Attend = Callable[..., tuple[jax.Array, Any, Any]]
"""(layer, inputs, cache, state) -> (o, new state, what to emit for this layer)."""


def scan_layers(
    spec: StackSpec,
    params: StackParams,
    x_BxTxD: jax.Array,
    tokens: Tokens,
    attend: Attend,
    state: Any = None,
    *,
    keep_slots: bool = False,
) -> tuple[jax.Array, Any, Any]:
    """Inference over all layers: (y, final state, what was emitted [L, ...]).

    `attend` does the attention, so that prefill, decoding and analysis share this scan. Bounded
    slots live in a ring buffer, which nobody could differentiate; with `keep_slots` every slot
    keeps its own index.
    """
    config, rope = spec.config, stack_layer.rope_of(spec, tokens)

    def body(carry, layer_and_block):
        x, cache, state = carry
        layer, block = layer_and_block
        weights = stack_layer.layer_params(spec, params, layer, block)
        inputs = stack_layer.before(spec, rope, layer, weights, x)
        out, state, emitted = attend(layer, inputs, cache, state)
        y, ffn = stack_layer.after(spec, rope, layer, weights, x, out)
        cache, y = stack_layer.write(spec, layer, cache, inputs, y, ffn)
        return (y, cache, state), emitted

    ring = config.depth_window is not None and not keep_slots
    cache = stack_layer.empty_cache(config, x_BxTxD.shape, ring=ring)
    xs = jnp.arange(config.num_layers), params.blocks
    (y, _, state), emitted = lax.scan(body, (x_BxTxD, cache, state), xs)
    return y, state, emitted


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_stack(spec: StackSpec, params: StackParams, x_BxTxD: jax.Array, tokens: Tokens):
    """y [B, T, D] after all layers, differentiable in `params` and `x`; memory linear in L."""
    return _forward(spec, params, x_BxTxD, tokens, save=False)[0]


def _run_stack_forward(spec, params, x, tokens):
    y, saved, cache = _forward(spec, params, x, tokens, save=True)
    return y, (params, tokens, saved, cache)


def _forward(spec: StackSpec, params: StackParams, x, tokens: Tokens, *, save: bool):
    rope = stack_layer.rope_of(spec, tokens)

    def visit(carry, layer):
        x, cache = carry
        block = stack_layer.at(params.blocks, layer)
        weights = stack_layer.layer_params(spec, params, layer, block)
        y, inputs, ffn, saved = stack_layer.run(
            spec, rope, layer, weights, x, cache, tokens, save=save
        )
        cache, y = stack_layer.write(spec, layer, cache, inputs, y, ffn, has_room=spec.keeps_all)
        return (y, cache), saved

    unread = spec.config.slots_per_writer if spec.keeps_all else 0
    cache = stack_layer.empty_cache(spec.config, x.shape, unread=unread)
    (y, cache), saved = _stacking(visit, (x, cache), spec.config.num_layers)
    return y, saved, cache


def _stacking(body, carry, length: int):
    """`lax.scan(body, carry, arange(length))`, but by the loop's own counter.

    What it indexes, XLA for GPUs copies beside other work, or hands to a kernel where it lies; by
    an index out of an array, it copies first. Nor do the stacked results begin with zeros.
    """
    shapes = jax.tree.leaves(jax.eval_shape(lambda c: body(c, jnp.int32(0))[1], carry))
    trees = []

    def step(index, state):
        carry, stacked = state
        carry, results = body(carry, index)
        results, tree = jax.tree.flatten(results)
        trees.append(tree)  # a kept vjp's is another at every trace
        # Without a barrier XLA makes a product twice, for its place here and for who else reads it.
        results = lax.optimization_barrier(results)
        return carry, [
            lax.dynamic_update_index_in_dim(all_results, x, index, 0)
            for all_results, x in zip(stacked, results, strict=True)
        ]

    memory = [stacked_memory(length, x) for x in shapes]
    carry, stacked = lax.fori_loop(0, length, step, (carry, memory))
    return carry, jax.tree.unflatten(trees[-1], stacked)


def _run_stack_backward(spec: StackSpec, residuals, dy):
    params, tokens, saved, cache = residuals
    d_params, dx = stack_backward.backward(spec, params, tokens, saved, cache, dy)
    return d_params, dx, None


run_stack.defvjp(_run_stack_forward, _run_stack_backward)
