"""Where every query of one text looks: attention weights over its sequence and its depth slots."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import ModelConfig
from moda_jax.depth import make_mechanism
from moda_jax.model.stack import TokenInfo, implementation, scan_layers
from moda_jax.model.transformer import Transformer
from moda_jax.ops.checks import check_array, check_integers, check_range, fail
from moda_jax.ops.sharded_attention import ShardedAttention
from pallas_kernels import reference

MAX_BYTES = 1 << 30
"""Of the weights of one text in float32: those that are kept, and one layer's of all heads."""


class AttentionMaps(NamedTuple):
    """What `attention_maps` returns; "depth slots" are what `num_depth_slots` counts (S)."""

    weights: jax.Array
    """[layers, heads, T, T + S] float32, of the chosen ones: sequence | depth slots. A row sums to
    1; where depth has a softmax of its own (`has_own_softmax`) each of its parts does."""
    visible: jax.Array
    """[L, S] bool: the slots that a layer's attention sees."""
    mass: jax.Array
    """[L, N, 1 + S] float32: mean over the tokens of the weight on the sequence | on each slot."""
    sink: jax.Array
    """[L, N, 2] float32: mean over all tokens but the first of the weight on the first token, of
    all that attention sees and of its sequence part alone."""


def has_own_softmax(config: ModelConfig) -> bool:
    """Whether the model reads depth by an attention of its own, beside the sequence's."""
    return bool(make_mechanism(config).own_softmax_labels())


def depth_labels(config: ModelConfig) -> list[str]:
    """One name per depth slot that some attention reads; empty without any."""
    mechanism = make_mechanism(config)
    return mechanism.own_softmax_labels() or mechanism.slot_labels()


def num_depth_slots(config: ModelConfig) -> int:
    """S, depth slots that some layer's attention reads."""
    return len(depth_labels(config))


def num_bytes(config: ModelConfig, length: int, *, num_layers: int, num_heads: int) -> int:
    """What `attention_maps` of so many layers and heads holds, beside the model."""
    slots = num_depth_slots(config)
    kept = (num_layers * num_heads + config.num_heads) * length * (length + slots)
    if has_own_softmax(config):  # of all layers and heads
        kept += config.num_layers * config.num_heads * length * slots
    return 4 * kept


def attention_maps(
    model: Transformer, tokens: jax.Array, *, layers: Sequence[int], heads: Sequence[int]
) -> AttentionMaps:
    """Attention weights of one forward over the document `tokens` [T] int32, T >= 2.

    Queries and keys are the model's, in its compute dtype; the softmax is the specification's, in
    float32 (`pallas_kernels.reference.attention_weights`).

    Args:
      model: any, whatever its way of using depth. One that reads no slots has a sequence part only.
      tokens: of the document.
      layers: numbers of those whose weights are returned.
      heads: numbers of their query heads.

    Raises ValueError for tokens, layers or heads that do not exist, and for more than MAX_BYTES.
    """
    config = model.config
    check_array("tokens", tokens, ("T",))
    check_range("tokens", tokens, 0, config.vocab_size - 1, where=True)
    tokens = check_integers("tokens", tokens, ("T",))
    if len(tokens) < 2:
        fail("tokens", "at least 2", len(tokens))
    for name, chosen, count in (
        ("layers", layers, config.num_layers), ("heads", heads, config.num_heads)
    ):  # fmt: skip
        if not chosen or not all(0 <= x < count for x in chosen) or len({*chosen}) < len(chosen):
            fail(name, f"different numbers in 0 … {count - 1}", list(chosen))
    size = num_bytes(config, len(tokens), num_layers=len(layers), num_heads=len(heads))
    if size > MAX_BYTES:
        fail("tokens", f"fewer, or fewer layers and heads ({MAX_BYTES:,} bytes)", f"{size:,} bytes")
    graph, state = nnx.split(model)
    return _attention_maps(graph, tuple(layers), tuple(heads), state, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attention_maps(graph, layers, heads, state, tokens) -> AttentionMaps:
    model = nnx.merge(graph, state)
    config, length = model.config, tokens.shape[0]
    num_slots = num_depth_slots(config)
    spec, params = model.stack((1, length))
    chosen = jnp.asarray(layers)

    def attend(layer, query, key, value, depth, kept):
        call = ShardedAttention.of(query, key, value, **depth, implementation=implementation(spec))
        bias = depth.get("depth_bias")
        weights = reference.attention_weights(call.operands, call.options, bias)[0]
        if depth:
            weights = weights[..., : length + num_slots]
            visible = reference.slot_mask(call.operands, call.options)[:num_slots]
        else:
            visible = jnp.zeros(0, bool)
        # Layers that were not chosen have no place: theirs lies beyond the end.
        place = jnp.where(chosen == layer, jnp.arange(len(layers)), len(layers)).min()
        kept = kept.at[place, :, :, : weights.shape[-1]].set(weights[jnp.array(heads)], mode="drop")
        emitted = visible, _mass(weights, length), _sink(weights, length)
        return call.forward()[0], kept, emitted

    def own_softmax(call: ShardedAttention):
        arguments = call.operands, call.options
        return reference.attention_weights(*arguments)[0], reference.slot_mask(*arguments)

    positions = jnp.arange(length, dtype=jnp.int32)[None]
    kept = jnp.zeros((len(layers), len(heads), length, length + num_slots), jnp.float32)
    _, kept, (emitted, depth) = scan_layers(
        spec, params, model.embed(tokens[None]), TokenInfo(positions, None), attend, kept,
        keep_entries=True, emit_depth=own_softmax,
    )  # fmt: skip
    visible, mass, sink = emitted
    if depth is not None:
        weights, visible = depth
        kept = kept.at[..., length:].set(weights[chosen][:, jnp.array(heads)])
        mass = jnp.concatenate([mass, weights.mean(axis=2)], axis=-1)
    return AttentionMaps(kept, visible, mass, sink)


def _mass(weights_NxTxJ: jax.Array, length: int) -> jax.Array:
    """[N, 1 + S]: on the sequence | on each slot."""
    mean = weights_NxTxJ.mean(axis=1)
    return jnp.concatenate([mean[:, :length].sum(axis=1, keepdims=True), mean[:, length:]], axis=1)


def _sink(weights_NxTxJ: jax.Array, length: int) -> jax.Array:
    """[N, 2]: on the first token, of all and of the sequence part."""
    # The first token's own query sees no other token.
    first = weights_NxTxJ[:, 1:, 0]
    sequence = weights_NxTxJ[:, 1:, :length].sum(axis=-1)
    # A query may look at depth alone, as far as float32 tells: then its share is 0, not 0 / 0.
    share = first / jnp.maximum(sequence, jnp.finfo(jnp.float32).tiny)
    return jnp.stack([first.mean(axis=1), share.mean(axis=1)], axis=-1)
