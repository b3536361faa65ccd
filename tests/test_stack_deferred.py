"""The stack's backward with depth gradients added for blocks of layers, and its running cache."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax import backends
from moda_jax.config import MeshConfig, ModelConfig
from moda_jax.sharding import make_mesh
from tests.models import SMALL, VARIANTS
from tests.test_stack import (
    assert_trees_close,
    batch,
    build,
    gradient_temp_bytes,
    scanned,
    slow_unless,
)
from tests.tolerances import RUNNING_BFLOAT16

LAYERS = 5  # 2 and 3 leave a rest, 5 is all
CHANGES = {
    name: changes | {"num_layers": LAYERS}
    for name, changes in VARIANTS.items()
    if name not in ("bounded", "tied")  # refused; the stack has no embedding
} | {"one-layer": {"num_layers": 1}}


def gradients(**changes):
    spec, params = build(**changes).stack()
    x, tokens = batch()
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), x.dtype)
    return scanned(spec, params, x, tokens, dy)


@functools.cache
def layer_by_layer(variant):
    return gradients(**CHANGES[variant])


@pytest.mark.parametrize(
    ("variant", "remat", "size"),
    [
        slow_unless(remat == "full" and (variant, size) in FAST, variant, remat, size)
        for FAST in [{("row4", 2), ("row5", 3), ("every2", 2), ("row4", LAYERS)}]
        for variant, remat in itertools.product(CHANGES, ("full", "save_attention", "none"))
        for size in (2, 3, LAYERS)
    ],
)
def test_blocks_give_the_gradients_of_layer_by_layer(variant, remat, size):
    got = gradients(**CHANGES[variant], remat=remat, depth_grad_block=size)
    assert_trees_close(got, layer_by_layer(variant))


def test_a_block_may_be_longer_than_the_stack():
    assert_trees_close(gradients(**CHANGES["row4"], depth_grad_block=99), layer_by_layer("row4"))


@pytest.mark.parametrize("size", [1, 2])
def test_running_cache_in_bfloat16(size):
    got = gradients(**CHANGES["row4"], depth_grad_dtype="bfloat16", depth_grad_block=size)

    def error(path, a, b):
        return float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-6))

    errors = jax.tree_util.tree_map_with_path(error, got[1], layer_by_layer("row4")[1])
    worst = max(jax.tree.leaves(errors))
    assert 1e-5 < worst < RUNNING_BFLOAT16  # it does round


def test_running_cache_in_bfloat16_takes_less_memory():
    changes = {"num_layers": 64}
    full = gradient_temp_bytes(**changes)
    half = gradient_temp_bytes(**changes, depth_grad_dtype="bfloat16")
    slots = dataclasses.replace(SMALL, **changes).depth_slots
    saved = 2 * slots * 4 * 256 * SMALL.num_kv_heads * 8 * 2
    assert full - half > 0.7 * saved, (full, half, saved)


@pytest.mark.parametrize(
    "remat", [slow_unless(remat == "full", remat) for remat in ("full", "save_attention", "none")]
)
def test_memory_grows_linearly_with_depth(remat):
    sizes = [
        gradient_temp_bytes(num_layers=n, remat=remat, depth_grad_block=3) for n in (16, 32, 64)
    ]
    for smaller, larger in itertools.pairwise(sizes):
        assert larger <= 2.2 * smaller, sizes


def test_a_block_costs_its_layers_readers_and_no_second_cache():
    """Queries and output gradients of the block's layers, and lse and delta, once."""
    heads, head_dim = SMALL.num_heads, 8
    readers = 4 * 256 * heads * (2 * head_dim + 2) * 4  # of one layer, in float32
    sizes = {n: gradient_temp_bytes(num_layers=64, depth_grad_block=n) for n in (1, 4)}
    assert sizes[4] - sizes[1] < 2 * 4 * readers, (sizes, readers)


def test_bounded_slots_are_refused():
    message = "ModelConfig.depth_grad_block: expected 1 while depth_window is set .*, got 2"
    with pytest.raises(ValueError, match=message):
        ModelConfig(depth_window=3, depth_grad_block=2)
    with pytest.raises(ValueError, match="ModelConfig.depth_grad_block: expected a positive"):
        ModelConfig(depth_grad_block=0)
    with pytest.raises(ValueError, match="ModelConfig.depth_grad_dtype: expected one of"):
        ModelConfig(depth_grad_dtype="float16")


def test_a_backend_that_cannot_defer_says_so():
    backends.warn_once.cache_clear()
    with pytest.warns(backends.SlowAttentionWarning, match="depth_grad_block=2 .* reference"):
        got = gradients(**CHANGES["row4"], attention="reference", depth_grad_block=2)
    assert_trees_close(got, layer_by_layer("row4"))


def test_blocks_under_a_mesh():
    changes = CHANGES["row4"] | {"depth_grad_block": 2}
    spec, params = build(**changes).stack()
    x, tokens = batch(rows=8)
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
    expected = scanned(spec, params, x, tokens, dy)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        got = scanned(spec, params, x, tokens, dy)
    assert_trees_close(*map(jax.device_get, (got, expected)))


def test_one_pass_over_the_older_slots(monkeypatch):
    """Every layer's backward adds to its block's slots, then the block to all older ones."""
    xla, passes = backends.BACKENDS["xla"], []

    def note(what, first, stop):
        jax.debug.callback(
            lambda first, stop: passes.append((what, int(first), int(stop))),
            first, stop, ordered=True,
        )  # fmt: skip

    def backward(operands, options, out, lse, d_out, d_lse, depth_grads, first):
        note("alone", first, operands.depth_length)
        return xla.deferral.backward(operands, options, out, lse, d_out, d_lse, depth_grads, first)

    def add(readers, depth_key, depth_value, depth_grads, first, stop, *, scale):
        note(readers.query.shape[0], first, stop)
        return xla.deferral.add(
            readers, depth_key, depth_value, depth_grads, first, stop, scale=scale
        )

    spy = dataclasses.replace(xla, deferral=backends.Deferral(backward, add), name="spy")
    monkeypatch.setattr(backends, "BACKENDS", {"spy": spy})
    jax.block_until_ready(gradients(**CHANGES["row4"], depth_grad_block=2, attention="spy"))
    jax.effects_barrier()
    # Layers 4 and 3 see the 8 and 6 slots of the layers before them; the rest, layer 0, sees none.
    assert passes == [
        ("alone", 6, 8), ("alone", 6, 6), (2, 0, 6),
        ("alone", 2, 4), ("alone", 2, 2), (2, 0, 2),
        ("alone", 0, 0),
    ]  # fmt: skip
