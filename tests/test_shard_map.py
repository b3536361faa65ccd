"""`jax.shard_map` with its defaults, and meshes with explicit axes: the values of one device."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moda_jax import DepthCache, generate, moda_attention, next_token_loss
from moda_jax.layers import add_bias, lookup
from tests.models import FLOAT32, SMALL, random_model
from tests.tolerances import RELATIVE, SAME_MODEL, STACK

P = PartitionSpec
B, T, N, K, H, S = 2, 8, 4, 2, 8, 3
SPECS = {"query": P("x"), "key": P("x"), "value": P("x")}
SPECS |= {"depth_key": P(None, "x"), "depth_value": P(None, "x")}
SHAPES = {"query": (B, T, N, H), "key": (B, T, K, H), "value": (B, T, K, H)}
SHAPES |= {"depth_key": (S, B, T, K, H), "depth_value": (S, B, T, K, H)}


def mesh(kind, size=2):
    return jax.make_mesh((size,), ("x",), axis_types=(kind,))


def inputs():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}


def place(tree, specs, on):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(on, spec)), tree, specs)


def assert_close(got, expected, rtol):
    for x, y in zip(*map(jax.tree.leaves, jax.device_get((got, expected))), strict=True):
        assert np.abs(x - y).max() <= rtol * np.abs(y).max()


OPTIONS = {
    "plain": ({}, None),
    "traced": ({}, 2),
    "chunk": ({"depth_chunk": 4}, 2),
    "window": ({"depth_window": 1, "depth_reserved": 1}, 3),
}


def both(options, implementation, arrays, length):
    """o and gradients."""

    def loss(arrays):
        out = moda_attention(
            **arrays, **options, depth_length=length, implementation=implementation
        )
        return (out**2).sum(), out

    gradients, out = jax.grad(loss, has_aux=True)(arrays)
    return out, gradients


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("reference", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_operator(implementation, name):
    options, length = OPTIONS[name]
    length = None if length is None else jnp.int32(length)
    run = functools.partial(both, options, implementation)
    arrays, specs = inputs(), (SPECS, None if length is None else P())
    expected = jax.jit(run)(arrays, length)
    shard_map = functools.partial(jax.shard_map, mesh=mesh(AxisType.Auto))
    mapped = shard_map(run, in_specs=specs, out_specs=(P("x"), SPECS))
    assert_close(jax.jit(mapped)(arrays, length), expected, RELATIVE["float32"])
    on = mesh(AxisType.Explicit)
    with jax.set_mesh(on):
        got = jax.jit(run)(place(arrays, SPECS, on), length)
    assert jax.typeof(got[0]).sharding.spec[0] == "x"
    assert_close(got, expected, RELATIVE["float32"])


def test_gradients_of_what_is_the_same_everywhere_are_summed():
    """Keys are whole on every device, queries are not."""
    arrays = inputs() | {name: jnp.ones((T, T, K, H)) for name in ("key", "value")}
    query, key = jnp.concatenate([arrays["query"]] * 2), arrays["key"][:2]

    def gradient(query, key):
        def loss(key):
            return (moda_attention(query, key, key, implementation="xla") ** 2).sum()

        return jax.grad(loss)(key)

    expected = gradient(query[:2], key) + gradient(query[2:], key)
    mapped = jax.shard_map(
        gradient, mesh=mesh(AxisType.Auto), in_specs=(P("x"), P()), out_specs=P()
    )
    assert_close(jax.jit(mapped)(query, key), expected, RELATIVE["float32"])


def test_kernels_say_what_to_do():
    mapped = jax.shard_map(
        functools.partial(both, {}, "mosaic_tpu"),
        mesh=mesh(AxisType.Auto),
        in_specs=(SPECS, P()),
        out_specs=(P("x"), SPECS),
    )
    with pytest.raises(NotImplementedError, match=r"\(x\).*pass check_vma=False to jax.shard_map"):
        jax.eval_shape(mapped, inputs(), jnp.int32(2))


def test_whole_tokens_are_needed():
    on = mesh(AxisType.Explicit)
    with (
        jax.set_mesh(on),
        pytest.raises(ValueError, match="key: expected axis 1 whole .*reshard before, got .* 'x'"),
    ):
        moda_attention(**place(inputs(), SPECS | {"key": P(None, "x")}, on))


def fill(entries):
    """A cache as a loop's carry."""
    cache = DepthCache.empty(3, *entries.shape[1:], dtype=entries.dtype)
    return lax.scan(lambda cache, x: (cache.append(x, 2 * x), None), cache, entries)[0].key


def test_an_empty_cache_is_a_carry():
    entries = inputs()["depth_key"]
    mapped = jax.shard_map(
        fill, mesh=mesh(AxisType.Auto), in_specs=P(None, "x"), out_specs=P(None, "x")
    )
    np.testing.assert_array_equal(jax.jit(mapped)(entries), entries)
    on = mesh(AxisType.Explicit)
    with jax.set_mesh(on):
        placed = jax.device_put(entries, NamedSharding(on, P(None, "x")))
        np.testing.assert_array_equal(jax.jit(fill)(placed), entries)


def test_parameters_of_an_embedding_and_of_a_bias():
    """Whole on every device; their gradients are sums over all."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 5)), jnp.int32)
    params = jnp.ones((7, 3)), jnp.arange(3.0)

    def loss(params, ids):
        return (add_bias(lookup(params[0], ids, jnp.float32), params[1]) ** 2).sum()

    def summed(params, ids):
        return lax.psum(loss(params, ids), "x")

    mapped = jax.shard_map(summed, mesh=mesh(AxisType.Auto), in_specs=(P(), P("x")), out_specs=P())
    got, expected = (jax.jit(jax.grad(f))(params, ids) for f in (mapped, loss))
    assert_close(got, expected, RELATIVE["float32"])


@pytest.mark.slow
def test_model():
    """Logits, loss and gradients; parameters are whole on every device."""
    execution = dataclasses.replace(FLOAT32, slot_gradients="add")
    graph, state = nnx.split(random_model(dataclasses.replace(SMALL, num_layers=2), execution))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, 5)), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": jnp.ones_like(tokens)}
    batch["positions"] = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (2, 5))

    def run(state, tokens):
        def loss(state):
            logits = nnx.merge(graph, state)(tokens)
            return (logits**2).sum(), logits

        gradients, logits = jax.grad(loss, has_aux=True)(state)
        return logits, gradients

    def total(state, batch):
        return next_token_loss(nnx.merge(graph, state), batch, z_loss=0.0)[0]

    expected, expected_loss = jax.jit(run)(state, tokens), jax.jit(total)(state, batch)
    shard_map = functools.partial(jax.shard_map, mesh=mesh(AxisType.Auto), in_specs=(P(), P("x")))
    got = jax.jit(shard_map(run, out_specs=(P("x"), P())))(state, tokens)
    assert_close(got, expected, STACK)
    summed = shard_map(lambda *x: lax.psum(total(*x), "x"), out_specs=P())
    assert_close(jax.jit(summed)(state, batch), expected_loss, SAME_MODEL)
    on = mesh(AxisType.Explicit)
    with jax.set_mesh(on):
        placed = jax.device_put(tokens, NamedSharding(on, P("x")))
        got = jax.jit(run)(jax.device_put(state, NamedSharding(on, P())), placed)
    assert_close(got, expected, STACK)


def test_generation():
    graph, state = nnx.split(random_model(dataclasses.replace(SMALL, num_layers=2)))
    settings = {"max_new_tokens": 3, "prompts": [[1, 2], [3]]}
    expected = generate(nnx.merge(graph, state), **settings)
    on = mesh(AxisType.Explicit)
    with jax.set_mesh(on):
        model = nnx.merge(graph, jax.device_put(state, NamedSharding(on, P())))
        assert generate(model, **settings) == expected
    chex.assert_equal(len(expected), 2)
