"""One layer of the stack: its parameters, its three pieces, what it writes, what it saves."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moda_jax.config import ModelConfig
from moda_jax.model.block import AttentionInputs, Block, KeyValue, KVProjection, Rope
from moda_jax.model.layers import compute_dtype, rope_table
from moda_jax.ops.depth_cache import DepthCache
from moda_jax.ops.sharded_attention import ShardedAttention
from moda_jax.ops.sharding import constrain, unwritten
from pallas_kernels import platforms


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

    @property
    def keeps_all(self) -> bool:
        """Whether the training stack's pass (not `scan_layers`) keeps the slots of every layer.

        Nobody reads the last one's; but where all layers append, no append depends on which it is.
        """
        return self.config.depth_slots > 0 and self.config.depth_write_every == 1

    @property
    def keeps_inputs(self) -> bool:
        """Whether a layer's own keys and values can be read back from its slots, then."""
        return self.keeps_all and self.config.depth_attention_kv == "reuse"

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


Through = Callable[[jax.Array], jax.Array]


def attention_call(spec: StackSpec, layer, inputs: AttentionInputs, cache, tokens: Tokens):
    """The layer's attention over sequence and depth."""
    depth = {} if cache is None else cache.attention_kwargs()
    if cache is not None:
        depth["depth_length"] = spec.slots_before(layer)
    return ShardedAttention.of(
        inputs.query, inputs.key, inputs.value, **depth, segment_ids=tokens.segment_ids,
        implementation=spec.config.attention,
    )  # fmt: skip


def empty_cache(
    config: ModelConfig, shape: tuple[int, ...], *, ring: bool = False, unread: int = 0
) -> DepthCache | None:
    """The cache for one pass over x [B, T, D]; None for a stack without depth slots.

    `unread`: slots beyond those that are ever read. One that was not written yet holds anything,
    NaN included: attention reads only written ones.
    """
    if not config.depth_slots:
        return None
    cache = DepthCache.empty(
        config.depth_slots + unread, shape[0], shape[1], config.num_kv_heads, config.head_dim,
        compute_dtype(config), window=config.depth_window, reserved=config.depth_reserved,
        ring=ring,
    )  # fmt: skip
    key, value = two_unwritten(cache.key.shape, cache.key.dtype)
    return dataclasses.replace(cache, key=key, value=value)


_CACHE_AXES = (None, "batch", None, "kv_heads", None)


def two_unwritten(shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Memory of a cache's keys and values that nobody has written to, with anything in it."""
    if platforms.current() == "cpu":  # memory is filled there, and equal arrays are made once
        return two_zeros(shape, dtype)
    return unwritten(shape, dtype, *_CACHE_AXES), unwritten(shape, dtype, *_CACHE_AXES)


def two_zeros(shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Zeros of a cache's keys and values, as two arrays to the compiler.

    Equal ones it would make once and copy, which reads and writes more than filling both.
    """
    zero = jnp.zeros((), dtype)
    key, value = (jnp.broadcast_to(x, shape) for x in lax.optimization_barrier((zero, zero)))
    return constrain(key, *_CACHE_AXES), constrain(value, *_CACHE_AXES)


def rope_of(spec: StackSpec, tokens: Tokens) -> Rope:
    return rope_table(tokens.positions, spec.config.head_dim, spec.config.rope_theta)


def at(tree: Any, index) -> Any:
    """What stacked arrays [L, ...] have at an index."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), tree)


def layer_params(spec: StackSpec, params: StackParams, layer, block) -> StackParams:
    """One layer's parameters in the types it computes with: matrices cast, norms float32.

    Cast here, outside of what is differentiated, so that no residual holds a copy of a matrix.
    """
    index = spec.writer(layer)
    own = [at(tree, index) for tree in (params.attention_kv, params.ffn_kv)]
    dtype = compute_dtype(spec.config)

    def cast(path, leaf):
        is_norm = any(getattr(key, "key", None) == "scale" for key in path)
        return leaf if is_norm else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, StackParams(block, *own))


def _same(x: jax.Array) -> jax.Array:
    return x


def before(
    spec: StackSpec, rope: Rope, layer, weights: StackParams, x, through: Through = _same
) -> AttentionInputs:
    """Attention's inputs; `through`: see `Block.keys_values`, of own depth projections."""
    block = nnx.merge(spec.block, weights.blocks)
    inputs, source = block.before_attention(x, rope)
    depth = _project(spec, block, weights.attention_kv, layer, source, rope, through)
    return inputs._replace(depth=depth)


def after(
    spec: StackSpec, rope: Rope, layer, weights: StackParams, x, out, through: Through = _same
) -> tuple[jax.Array, KeyValue | None]:
    """The layer's output, and what its FFN writes; `through` as in `before`."""
    block = nnx.merge(spec.block, weights.blocks)
    y, source = block.after_attention(x, out)
    return y, _project(spec, block, weights.ffn_kv, layer, source, rope, through)


def _project(
    spec: StackSpec, block: Block, weights: Any, layer, source, rope, through: Through
) -> KeyValue | None:
    """Depth keys and values of an own projection; zeros in layers that do not write."""
    if weights is None:
        return None

    def project(source, through=_same):
        projection = nnx.merge(spec.projection, weights)
        return block.keys_values(projection, source, rope, through)

    if spec.config.depth_write_every == 1:  # all but the last write: a conditional costs more
        return project(source, through)
    # Nothing is kept inside of the conditional.
    shapes = jax.eval_shape(project, source)

    def nothing(source):
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return lax.cond(spec.writes(layer), project, nothing, source)


def write(spec: StackSpec, layer, cache, inputs: AttentionInputs, y, ffn, *, has_room=False):
    """Appends what the layer writes, the attention's keys and values, then its FFN's; (cache, y).

    The layer's output `y` holds the writes back until the attention has read the cache: what
    could come first would make the compiler keep a copy of the whole cache. `has_room`: the cache
    has room for the last layer's, too.
    """
    if cache is None:
        return None, y
    depth = (inputs.key, inputs.value) if inputs.depth is None else inputs.depth
    ffn_value = None if ffn is None else ffn[1]
    # The slots, too: a key's norm and rotation inside of the write made it three times as long.
    cache, y, depth, ffn = lax.optimization_barrier((cache, y, depth, ffn))
    if has_room:  # at an index of the loop's counter: copies that run beside other work
        cache = dataclasses.replace(cache, length=spec.slots_before(layer))
        cache = cache.append(*depth, fits=True)
        if ffn is not None:  # its values as they are: the product that makes them writes them there
            cache = cache.append(ffn[0], ffn_value, fits=True)
        return cache, y
    if ffn is not None:  # both at once: two such updates in a row cost a copy of the cache, too
        depth = jax.tree.map(lambda *slots: jnp.stack(slots), tuple(depth), tuple(ffn))
    return cache.append(*depth, where=spec.writes(layer)), y


def run(
    spec: StackSpec,
    rope: Rope,
    layer,
    weights: StackParams,
    x,
    cache,
    tokens: Tokens,
    *,
    save: bool,
):
    """(y, attention's inputs, what the FFN writes, what `restore` needs to `save` or None)."""
    remat, products = spec.config.remat if save else "full", []

    def keep(product):
        products.append(product)
        return product

    if remat == "none":
        inputs, before_vjp = jax.vjp(lambda w, x: before(spec, rope, layer, w, x), weights, x)
    else:
        inputs, before_vjp = before(spec, rope, layer, weights, x, keep), None
    out, lse = attention_call(spec, layer, inputs, cache, tokens).forward()
    read: Any = inputs._replace(depth=None)  # what an own projection wrote is in the cache already
    if spec.keeps_inputs:
        read = _Query(inputs.query)
    saved: tuple[Any, ...]
    if before_vjp is not None:
        (y, ffn), after_vjp = jax.vjp(
            lambda w, x, o: after(spec, rope, layer, w, x, o), weights, x, out
        )
        saved = (read, out, lse, _strip(before_vjp, weights), _strip(after_vjp, weights))
    else:
        y, ffn = after(spec, rope, layer, weights, x, out, keep)
        saved = (x, read, out, lse, products) if remat == "save_attention" else (x,)
    return y, inputs, ffn, saved if save else None


def restore(spec: StackSpec, rope: Rope, layer, weights: StackParams, saved, cache, tokens):
    """(inputs, o, lse, vjp of before, vjp of after) of a layer: kept, or computed again."""
    if spec.config.remat == "none":
        inputs, out, lse, before_vjp, after_vjp = saved
        inputs = _from_cache(spec, layer, inputs, cache)
        return inputs, out, lse, _unstrip(before_vjp, weights), _unstrip(after_vjp, weights)
    through, products = _same, []
    if spec.config.remat == "save_attention":
        x, read, out, lse, products = saved
    else:
        (x,) = saved
    if products:
        products = list(products)

        def through(computed):
            return _known(products.pop(0), computed)

    inputs, before_vjp = jax.vjp(lambda w, x: before(spec, rope, layer, w, x, through), weights, x)
    if spec.config.remat == "save_attention":
        inputs = read
    inputs = _from_cache(spec, layer, inputs, cache)
    if spec.config.remat == "full":
        out, lse = attention_call(spec, layer, inputs, cache, tokens).forward()
    _, after_vjp = jax.vjp(
        lambda w, x, o: after(spec, rope, layer, w, x, o, through), weights, x, out
    )
    return inputs, out, lse, before_vjp, after_vjp


@jax.custom_vjp
def _known(kept: jax.Array, computed: jax.Array) -> jax.Array:
    """What was kept, with the gradient of `computed`, of which nobody needs the value then."""
    return kept


_known.defvjp(lambda kept, computed: (kept, None), lambda _, d: (jnp.zeros_like(d), d))


class _Query(NamedTuple):
    """What is kept of a layer's `AttentionInputs` if the cache has the rest."""

    query: jax.Array


def _from_cache(spec: StackSpec, layer, inputs: Any, cache) -> AttentionInputs:
    """A layer's inputs, their keys and values from its slots if they are there."""
    if not spec.keeps_inputs:
        return inputs
    key, value = at((cache.key, cache.value), spec.slots_before(layer))
    return AttentionInputs(inputs.query, key, value)


def saved_query(spec: StackSpec, saved: Any) -> jax.Array | None:
    """The queries [L, B, T, N, H] among what all layers saved; None: they are computed again."""
    if spec.config.remat == "full":
        return None
    return saved[1 if spec.config.remat == "save_attention" else 0].query


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
