"""The scanned layer stack, with memory linear in depth.

Differentiated as it is, a scan that carries the depth cache saves the whole cache once per layer:
O(L²). The cache is append-only, so every layer's view is a prefix of the final one. One custom VJP
for the whole stack therefore keeps the layers' inputs and one cache, and runs backward with one
gradient cache: layer l adds into the slots it read (those of layers < l) and takes the finished
gradient of the slots it wrote, since every later layer has been visited by then.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moda_jax.block import AttentionInputs, Block, KeyValue, KVProjection, Rope
from moda_jax.config import ModelConfig
from moda_jax.depth_cache import DepthCache
from moda_jax.layers import compute_dtype, rope_table
from moda_jax.sharded_attention import attention_call
from moda_jax.sharding import constrain


class StackParams(NamedTuple):
    """Parameters of all layers: pytrees with a leading axis."""

    blocks: Any  # [L, ...]
    attention_kv: Any  # [W, ...] own depth projections of the W writing layers; None: reused
    ffn_kv: Any  # [W, ...]; None: the FFN writes nothing


@dataclasses.dataclass(frozen=True)
class StackSpec:
    """The static side of a stack: settings and module structure."""

    config: ModelConfig
    block: nnx.GraphDef[Block]
    projection: nnx.GraphDef[KVProjection]

    def slots_before(self, layer: jax.Array) -> jax.Array:
        """Slots written by the layers before `layer`: what its attention sees."""
        writers = (layer + self.config.depth_write_every - 1) // self.config.depth_write_every
        return writers * self.config.slots_per_writer

    def writes(self, layer: jax.Array) -> jax.Array | bool:
        """Whether somebody reads what `layer` writes: every n-th layer, never the last."""
        every, last = self.config.depth_write_every, self.config.num_layers - 1
        return (layer % every == 0) & (layer < last)

    def writer(self, layer: jax.Array) -> jax.Array:
        """Index of the writing layer among the writers; in range for the others too."""
        return jnp.minimum(layer // self.config.depth_write_every, self.config.depth_writers - 1)


class Tokens(NamedTuple):
    """Where the tokens stand; not differentiated."""

    positions: jax.Array  # [B, T] int32
    segment_ids: jax.Array | None  # [B, T] int32


Attend = Callable[..., tuple[jax.Array, Any, Any]]
"""(layer, inputs, cache, state) -> (o, new state, what to emit for this layer)."""


def scan_layers(
    spec: StackSpec,
    params: StackParams,
    x_BxTxD: jax.Array,
    tokens: Tokens,
    attend: Attend,
    state: Any = None,
) -> tuple[jax.Array, Any, Any]:
    """Inference over all layers: (y, final state, what was emitted [L, ...]).

    `attend` does the attention, so that prefill, decoding and analysis share this scan. Bounded
    slots live in a ring buffer, which nobody could differentiate.
    """
    rope = _rope(spec, tokens)

    def body(carry, layer_and_block):
        x, cache, state = carry
        layer, block = layer_and_block
        weights = _layer_params(spec, params, layer, block)
        inputs = _before(spec, rope, layer, weights, x)
        out, state, emitted = attend(layer, inputs, cache, state)
        y, ffn = _after(spec, rope, layer, weights, x, out)
        return (y, _write(spec, layer, cache, inputs, ffn), state), emitted

    cache = _empty_cache(spec.config, x_BxTxD.shape, ring=spec.config.depth_window is not None)
    layers = jnp.arange(spec.config.num_layers)
    (y, _, state), emitted = lax.scan(body, (x_BxTxD, cache, state), (layers, params.blocks))
    return y, state, emitted


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_stack(spec: StackSpec, params: StackParams, x_BxTxD: jax.Array, tokens: Tokens):
    """y [B, T, D] after all layers, differentiable in `params` and `x`; memory linear in L."""
    return _forward(spec, params, x_BxTxD, tokens, save=False)[0]


def _run_stack_forward(spec, params, x, tokens):
    y, saved, cache = _forward(spec, params, x, tokens, save=True)
    return y, (params, tokens, saved, cache)


def _forward(spec: StackSpec, params: StackParams, x, tokens: Tokens, *, save: bool):
    rope = _rope(spec, tokens)

    def body(carry, layer_and_block):
        x, cache = carry
        layer, block = layer_and_block
        weights = _layer_params(spec, params, layer, block)
        if save and spec.config.remat == "none":
            inputs, before = jax.vjp(lambda w, x: _before(spec, rope, layer, w, x), weights, x)
        else:
            inputs, before = _before(spec, rope, layer, weights, x), None
        out, lse = _attention_call(spec, layer, inputs, cache, tokens).forward()
        read = inputs._replace(depth=None)  # what an own projection wrote is in the cache already
        if before is not None:
            (y, ffn), after = jax.vjp(
                lambda w, x, o: _after(spec, rope, layer, w, x, o), weights, x, out
            )
            saved: tuple[Any, ...] = (
                read, out, lse, _strip(before, weights), _strip(after, weights)
            )  # fmt: skip
        else:
            y, ffn = _after(spec, rope, layer, weights, x, out)
            saved = (x, read, out, lse) if spec.config.remat == "save_attention" else (x,)
        return (y, _write(spec, layer, cache, inputs, ffn)), saved if save else None

    cache = _empty_cache(spec.config, x.shape, ring=False)
    layers = jnp.arange(spec.config.num_layers)
    (y, cache), saved = lax.scan(body, (x, cache), (layers, params.blocks))
    return y, saved, cache


def _run_stack_backward(spec: StackSpec, residuals, dy):
    params, tokens, saved, cache = residuals
    rope = _rope(spec, tokens)

    def body(carry, xs):
        dy, grads, d_projections = carry
        layer, block, saved = xs
        weights = _layer_params(spec, params, layer, block)
        inputs, out, lse, before, after = _restore(spec, rope, layer, weights, saved, cache, tokens)
        d_depth, d_ffn = _written_grads(spec, layer, grads)
        d_weights_after, dx_after, d_out = after((dy, d_ffn))
        call = _attention_call(spec, layer, inputs, cache, tokens)
        d = call.gradients(out, lse, d_out, grads)
        if grads is not None:
            grads = (d.depth_key, d.depth_value)
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
        d_own = (d_weights.attention_kv, d_weights.ffn_kv)
        d_projections = jax.tree.map(
            lambda total, d: _add_at(total, d, spec.writer(layer), spec.writes(layer)),
            d_projections, d_own,
        )  # fmt: skip
        return (dx_after + dx_before, grads, d_projections), d_weights.blocks

    grads = None
    if cache is not None:  # float32: up to 2L layers add into a slot
        zeros = _constrain(jnp.zeros(cache.key.shape, jnp.float32))
        grads = (zeros, zeros)
    d_projections = jax.tree.map(jnp.zeros_like, (params.attention_kv, params.ffn_kv))
    layers = jnp.arange(spec.config.num_layers)
    (dx, _, d_projections), d_blocks = lax.scan(
        body, (dy, grads, d_projections), (layers, params.blocks, saved), reverse=True
    )
    return StackParams(d_blocks, *d_projections), dx, None


run_stack.defvjp(_run_stack_forward, _run_stack_backward)


def _restore(spec: StackSpec, rope: Rope, layer, weights: StackParams, saved, cache, tokens):
    """(inputs, o, lse, vjp of before, vjp of after) of a layer: kept, or computed again."""
    if spec.config.remat == "none":
        inputs, out, lse, before, after = saved
        return inputs, out, lse, _unstrip(before, weights), _unstrip(after, weights)
    x = saved[0]
    inputs, before = jax.vjp(lambda w, x: _before(spec, rope, layer, w, x), weights, x)
    if spec.config.remat == "save_attention":
        inputs, out, lse = saved[1:]
    else:
        out, lse = _attention_call(spec, layer, inputs, cache, tokens).forward()
    _, after = jax.vjp(lambda w, x, o: _after(spec, rope, layer, w, x, o), weights, x, out)
    return inputs, out, lse, before, after


def _strip(vjp: Any, weights: Any) -> Any:
    """`vjp` without the weights it holds: they are at hand in the backward, so keep no copy."""
    position = {id(leaf): n for n, leaf in enumerate(jax.tree.leaves(weights))}
    leaves, tree = jax.tree.flatten(vjp)
    kept = [None if id(leaf) in position else leaf for leaf in leaves]
    return _Stripped(kept, tree, tuple(position.get(id(leaf)) for leaf in leaves))


def _unstrip(stripped: "_Stripped", weights: Any) -> Any:
    own = jax.tree.leaves(weights)
    leaves = [
        kept if n is None else own[n]
        for kept, n in zip(stripped.kept, stripped.positions, strict=True)
    ]
    return jax.tree.unflatten(stripped.tree, leaves)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["tree", "positions"]
)
@dataclasses.dataclass(frozen=True)
class _Stripped:
    """A vjp function's residuals; `positions` says which were a leaf of the layer's weights."""

    kept: list[Any]
    tree: Any
    positions: tuple[int | None, ...]


def _attention_call(spec: StackSpec, layer, inputs: AttentionInputs, cache, tokens: Tokens):
    """The layer's attention over sequence and depth."""
    depth = {} if cache is None else cache.attention_kwargs()
    if cache is not None:
        depth["depth_length"] = spec.slots_before(layer)
    return attention_call(
        inputs.query, inputs.key, inputs.value, **depth, segment_ids=tokens.segment_ids,
        implementation=spec.config.attention,
    )  # fmt: skip


def _empty_cache(config: ModelConfig, shape: tuple[int, ...], *, ring: bool) -> DepthCache | None:
    """The cache for one pass over x [B, T, D]; None for a stack without depth slots."""
    if not config.depth_slots:
        return None
    cache = DepthCache.empty(
        config.depth_slots, shape[0], shape[1], config.num_kv_heads, config.head_dim,
        compute_dtype(config), window=config.depth_window, reserved=config.depth_reserved,
        ring=ring,
    )  # fmt: skip
    return dataclasses.replace(cache, key=_constrain(cache.key), value=_constrain(cache.value))


def _constrain(cache_SxBxTxKxH: jax.Array) -> jax.Array:
    return constrain(cache_SxBxTxKxH, None, "batch", None, "kv_heads", None)


def _rope(spec: StackSpec, tokens: Tokens) -> Rope:
    return rope_table(tokens.positions, spec.config.head_dim, spec.config.rope_theta)


def _layer_params(spec: StackSpec, params: StackParams, layer, block) -> StackParams:
    """One layer's parameters in the types it computes with: matrices cast, norms float32.

    Cast here, outside of what is differentiated, so that no residual holds a copy of a matrix.
    """
    index = spec.writer(layer)
    own = [
        jax.tree.map(lambda p: lax.dynamic_index_in_dim(p, index, 0, keepdims=False), tree)
        for tree in (params.attention_kv, params.ffn_kv)
    ]
    dtype = compute_dtype(spec.config)

    def cast(path, leaf):
        is_norm = any(getattr(key, "key", None) == "scale" for key in path)
        return leaf if is_norm else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, StackParams(block, *own))


def _before(spec: StackSpec, rope: Rope, layer, weights: StackParams, x) -> AttentionInputs:
    block = nnx.merge(spec.block, weights.blocks)
    inputs, source = block.before_attention(x, rope)
    return inputs._replace(depth=_project(spec, block, weights.attention_kv, layer, source, rope))


def _after(spec: StackSpec, rope: Rope, layer, weights: StackParams, x, out):
    block = nnx.merge(spec.block, weights.blocks)
    y, source = block.after_attention(x, out)
    return y, _project(spec, block, weights.ffn_kv, layer, source, rope)


def _project(spec: StackSpec, block: Block, weights: Any, layer, source, rope) -> KeyValue | None:
    """Depth keys and values of an own projection; zeros in layers that do not write."""
    if weights is None:
        return None

    def project(source):
        return block.keys_values(nnx.merge(spec.projection, weights), source, rope)

    if spec.config.depth_write_every == 1:  # all but the last write: a conditional costs more
        return project(source)
    shapes = jax.eval_shape(project, source)

    def nothing(source):
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return lax.cond(spec.writes(layer), project, nothing, source)


def _write(spec: StackSpec, layer, cache: DepthCache | None, inputs: AttentionInputs, ffn):
    """Appends what the layer writes: the attention's keys and values, then its FFN's."""
    if cache is None:
        return None
    writes = spec.writes(layer)
    depth = (inputs.key, inputs.value) if inputs.depth is None else inputs.depth
    cache = cache.append(*depth, where=writes)
    return cache if ffn is None else cache.append(*ffn, where=writes)


def _written_grads(spec: StackSpec, layer, grads) -> tuple[KeyValue | None, KeyValue | None]:
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
