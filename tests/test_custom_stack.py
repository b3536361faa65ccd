"""`depth_stack` with a user's own layers in Flax NNX, Flax Linen and Equinox."""

import dataclasses
from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax import ExecutionConfig, ModelConfig, Transformer, depth_stack, moda_attention
from tests.tolerances import STACK

WIDTH, HEADS, KV_HEADS, SIZE, HIDDEN = 16, 4, 2, 4, 24


@dataclasses.dataclass(frozen=True)
class Library:
    """The same pre-norm layer in one of the libraries: its two pieces, and stacked weights."""

    before: Any
    after: Any
    weights: Any  # of a number of layers


def nnx_layers(layers: int) -> Library:
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.ffn_norm = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
            self.query = nnx.LinearGeneral(WIDTH, (HEADS, SIZE), rngs=rngs)
            self.key_value = nnx.LinearGeneral(WIDTH, (2, KV_HEADS, SIZE), rngs=rngs)
            self.out = nnx.LinearGeneral((HEADS, SIZE), WIDTH, axis=(-2, -1), rngs=rngs)
            self.up, self.down = (
                nnx.Linear(WIDTH, HIDDEN, rngs=rngs),
                nnx.Linear(HIDDEN, WIDTH, rngs=rngs),
            )

    graph, weights = nnx.split(nnx.vmap(Layer)(nnx.Rngs(0).split(layers)))

    def before(weights, x, positions):
        layer = nnx.merge(graph, weights)
        source = layer.norm(x)
        key, value = jnp.moveaxis(layer.key_value(source), 2, 0)
        return layer.query(source), key, value

    def after(weights, x, attention):
        layer = nnx.merge(graph, weights)
        x = x + layer.out(attention)
        return x + layer.down(nnx.silu(layer.up(layer.ffn_norm(x))))

    return Library(before, after, weights)


def linen_layers(layers: int) -> Library:
    class Layer(nn.Module):
        def setup(self):
            self.norm, self.ffn_norm = nn.RMSNorm(), nn.RMSNorm()
            self.query = nn.DenseGeneral((HEADS, SIZE))
            self.key_value = nn.DenseGeneral((2, KV_HEADS, SIZE))
            self.out = nn.DenseGeneral(WIDTH, axis=(-2, -1))
            self.up, self.down = nn.Dense(HIDDEN), nn.Dense(WIDTH)
            self.depth_key_value = nn.DenseGeneral((2, KV_HEADS, SIZE))

        def before(self, x):
            source = self.norm(x)
            key, value = jnp.moveaxis(self.key_value(source), 2, 0)
            return self.query(source), key, value

        def after(self, x, attention):
            x = x + self.out(attention)
            source = self.ffn_norm(x)
            x = x + self.down(nn.silu(self.up(source)))
            return x, tuple(jnp.moveaxis(self.depth_key_value(source), 2, 0))  # as Table 3's row 4

        def __call__(self, x):
            return self.after(x, self.before(x)[0])

    layer = Layer()
    keys = jax.random.split(jax.random.key(0), layers)
    weights = jax.vmap(lambda key: layer.init(key, jnp.zeros((1, 1, WIDTH))))(keys)

    def before(weights, x, positions):
        return layer.apply(weights, x, method="before")

    def after(weights, x, attention):
        return layer.apply(weights, x, attention, method="after")

    return Library(before, after, weights)


def equinox_layers(layers: int) -> Library:
    class Layer(eqx.Module):
        query: eqx.nn.Linear
        key_value: eqx.nn.Linear
        out: eqx.nn.Linear
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 5)
            self.query = eqx.nn.Linear(WIDTH, HEADS * SIZE, key=keys[0])
            self.key_value = eqx.nn.Linear(WIDTH, 2 * KV_HEADS * SIZE, key=keys[1])
            self.out = eqx.nn.Linear(HEADS * SIZE, WIDTH, key=keys[2])
            self.up = eqx.nn.Linear(WIDTH, HIDDEN, key=keys[3])
            self.down = eqx.nn.Linear(HIDDEN, WIDTH, key=keys[4])

    stacked = eqx.filter_vmap(Layer)(jax.random.split(jax.random.key(0), layers))
    weights, static = eqx.partition(stacked, eqx.is_array)

    def tokens(function):
        return jax.vmap(jax.vmap(function))

    def before(weights, x, positions):
        layer = eqx.combine(weights, static)
        shape = *x.shape[:2], -1, SIZE
        key, value = jnp.split(tokens(layer.key_value)(x), 2, axis=-1)
        return tokens(layer.query)(x).reshape(shape), key.reshape(shape), value.reshape(shape)

    def after(weights, x, attention):
        layer = eqx.combine(weights, static)
        x = x + tokens(layer.out)(attention.reshape(*x.shape[:2], -1))
        return x + tokens(layer.down)(jax.nn.silu(tokens(layer.up)(x)))

    return Library(before, after, weights)


LIBRARIES = {"nnx": nnx_layers, "linen": linen_layers, "equinox": equinox_layers}


def plain_loop(library: Library, weights, x, positions, segment_ids):
    """A Python loop with a list of slots and plain autodiff."""
    slots = []
    for n in range(jax.tree.leaves(weights)[0].shape[0]):
        layer = jax.tree.map(lambda w, n=n: w[n], weights)
        query, key, value = library.before(layer, x, positions)
        depth = [jnp.stack(arrays) for arrays in zip(*slots, strict=True)] or [None, None]
        out = moda_attention(
            query, key, value, *depth, segment_ids=segment_ids, implementation="reference"
        )
        result = library.after(layer, x, out)
        x, ffn = result if isinstance(result, tuple) else (result, None)
        slots += [(key, value)] if ffn is None else [(key, value), ffn]
    return x


def inputs(length=7):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, length, WIDTH)), jnp.float32)
    segment_ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), x.shape[:2])
    return x, positions, segment_ids


@pytest.mark.parametrize("slot_gradients", ["add", "gather"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_gradients_equal_a_plain_loops(name, slot_gradients):
    library = LIBRARIES[name](3)
    x, positions, segment_ids = inputs()
    dy = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    real = (segment_ids != 0)[..., None]  # padding is 0 for the stack
    dy = jnp.where(real, dy, 0)

    def stack(weights, x):
        return depth_stack(
            library.before,
            library.after,
            weights,
            x,
            segment_ids=segment_ids,
            execution=ExecutionConfig(slot_gradients=slot_gradients),
        )

    def loop(weights, x):
        return plain_loop(library, weights, x, positions, segment_ids)

    results = []
    for run in (stack, loop):

        @jax.jit
        def value_and_gradients(weights, x, run=run):
            y, vjp = jax.vjp(run, weights, x)
            return jnp.where(real, y, 0), *vjp(dy)

        results.append(value_and_gradients(library.weights, x))
    scale = jax.tree.map(lambda a: max(float(jnp.abs(a).max()), 1e-6), results[1])
    actual, expected = (jax.tree.map(lambda a, s: a / s, r, scale) for r in results)
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=STACK)


def temp_bytes(run, *arguments) -> int:
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(run(*a).astype(jnp.float32) ** 2)))
    return gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", LIBRARIES)
def test_memory_is_that_of_the_transformer(name):
    """At most 1.5 times of what a `Transformer` of these sizes needs at L = 32."""
    layers, batch, length = 32, 4, 128
    library = LIBRARIES[name](layers)
    x = jax.ShapeDtypeStruct((batch, length, WIDTH), jnp.float32)
    own = temp_bytes(
        lambda w, x: depth_stack(library.before, library.after, w, x), library.weights, x
    )
    config = ModelConfig(
        vocab_size=8,
        num_layers=layers,
        embed_dim=WIDTH,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=SIZE,
        mlp_dim=HIDDEN,
    )
    execution = ExecutionConfig(compute_dtype="float32", remat="save_attention")
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), execution=execution))
    graph, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    transformer = temp_bytes(lambda s, t: nnx.merge(graph, s).hidden(t), state, tokens)
    assert own <= 1.5 * transformer, (own, transformer)


def test_without_depth_it_is_a_plain_stack():
    library = nnx_layers(2)
    x, _, _ = inputs()
    plain = depth_stack(library.before, library.after, library.weights, x, depth=False)
    first = jax.tree.map(lambda w: w[:1], library.weights)
    once = depth_stack(library.before, library.after, first, x, depth=False)
    second = jax.tree.map(lambda w: w[1:], library.weights)
    chex.assert_trees_all_close(
        plain, depth_stack(library.before, library.after, second, once, depth=False), atol=STACK
    )
    assert not np.allclose(plain, depth_stack(library.before, library.after, library.weights, x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 3))}}, "weights: expected arrays"),
        ({"after": lambda w, x, o: x[..., :3]}, r"after: expected y like x, float32\[2, 7, 16\]"),
        ({"before": lambda w, x, p: (x, x, x)}, r"before: expected query \[B, T, N, H\]"),
        ({"execution": ExecutionConfig(compute_dtype="bfloat16")}, "execution.compute_dtype"),
        ({"window": 2, "depth": False}, "window: expected None without depth"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    library = nnx_layers(2)
    x, _, _ = inputs()
    arguments: dict[str, Any] = {
        "before": library.before,
        "after": library.after,
        "weights": library.weights,
        "x": x,
    } | changes
    with pytest.raises(ValueError, match=message):
        depth_stack(**arguments)
