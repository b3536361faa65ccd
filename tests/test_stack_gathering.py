"""The stack's backward with depth gradients gathered, for blocks of layers, or added up."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import MeshConfig, ModelConfig
from moda_jax.ops import backends
from moda_jax.ops.sharding import make_mesh
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
} | {"one-layer": {"num_layers": 1}, "two-layer": {"num_layers": 2}}


REMATS = ("full", "save_attention", "none")


def covering(sizes):
    """(variant, remat, size): every two values meet, but not every three.

    Where nothing reads a slot, blocks do nothing: one size each.
    """
    return [
        (variant, REMATS[(i + j) % 3], size)
        for i, variant in enumerate(CHANGES)
        for j, size in enumerate(sizes)
        if j == 0 or variant not in ("residual", "one-layer")
    ]


def gradients(**changes):
    spec, params = build(**changes).stack()
    x, tokens = batch()
    x = x.astype(spec.config.compute_dtype)
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), x.dtype)
    return scanned(spec, params, x, tokens, dy)


FAST_GATHERING = (
    ("row4", "full", 2),
    ("row5", "save_attention", 3),
    ("row3", "none", 1),
    ("every2", "full", 2),
    ("one-layer", "full", 2),
)


@functools.cache
def layer_by_layer(variant):
    return gradients(**CHANGES[variant])


@pytest.mark.parametrize(
    ("variant", "remat", "size"),
    [
        *FAST_GATHERING,
        *(
            slow_unless(False, *values)
            for values in (*covering((2, 3, LAYERS)), ("row4", "none", 1), ("row5", "full", 1))
            if values not in FAST_GATHERING
        ),
    ],
)
def test_gathering_gives_the_gradients_of_layer_by_layer(variant, remat, size):
    got = gradients(
        **CHANGES[variant], remat=remat, depth_grad_mode="gather", depth_grad_block=size
    )
    assert_trees_close(got, layer_by_layer(variant))


@pytest.mark.parametrize(("variant", "size"), [("row4", 2), ("every2", 3)])
def test_nothing_is_gathered_from_before_it_was_written(variant, size, monkeypatch):
    """A CPU's memory that nobody initialized holds zeros; here it holds NaN."""
    monkeypatch.setattr(jax.lax, "empty", lambda *args: jnp.full(*args[:1], jnp.nan, args[1]))
    changes = CHANGES[variant] | {"depth_grad_mode": "gather", "depth_grad_block": size}
    # Another scale of the weights, or a compiled stack with zeros would be at hand.
    changes |= {"init_std": 0.03}
    got = gradients(**changes)
    assert_trees_close(got, gradients(**CHANGES[variant], init_std=0.03))


def test_a_block_may_be_longer_than_the_stack():
    got = gradients(**CHANGES["row4"], depth_grad_mode="gather", depth_grad_block=99)
    assert_trees_close(got, layer_by_layer("row4"))


@pytest.mark.parametrize(("mode", "size"), [("add", 1), ("gather", 2)])
def test_sums_in_bfloat16(mode, size):
    got = gradients(
        **CHANGES["row4"], depth_grad_dtype="bfloat16", depth_grad_mode=mode, depth_grad_block=size
    )

    def error(path, a, b):
        return float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-6))

    errors = jax.tree_util.tree_map_with_path(error, got[1], layer_by_layer("row4")[1])
    worst = max(jax.tree.leaves(errors))
    assert 1e-5 < worst < RUNNING_BFLOAT16  # it does round


def test_gathering_in_bfloat16_is_as_exact_as_adding():
    bfloat16 = {"compute_dtype": "bfloat16"}
    assert 1e-4 < worst_error("gather", **bfloat16) < 1.2 * worst_error("add", **bfloat16)


def test_gathered_sums_in_bfloat16_are_rounded_once():
    """Adding rounds at every layer."""
    sums = {"depth_grad_dtype": "bfloat16", "num_layers": 12}
    assert 1e-5 < worst_error("gather", **sums) < 0.75 * worst_error("add", **sums)


def worst_error(mode, **changes):
    """The largest relative error of a parameter's gradient, to float32 and adding."""
    changes = CHANGES["row4"] | {"depth_grad_block": 2} | changes
    got = gradients(**changes, depth_grad_mode=mode)
    exact = changes | {"compute_dtype": "float32", "depth_grad_dtype": "float32"}
    errors = jax.tree.map(
        lambda a, b: float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-6)),
        got[1],
        gradients(**exact)[1],
    )
    return max(jax.tree.leaves(errors))


def test_running_cache_in_bfloat16_takes_less_memory():
    changes = {"num_layers": 64}
    full = gradient_temp_bytes(**changes)
    half = gradient_temp_bytes(**changes, depth_grad_dtype="bfloat16")
    slots = dataclasses.replace(SMALL, **changes).depth_slots
    saved = 2 * slots * 4 * 256 * SMALL.num_kv_heads * 8 * 2
    assert full - half > 0.7 * saved, (full, half, saved)


@pytest.mark.parametrize("mode", ["add", "gather"])
@pytest.mark.parametrize(
    "remat", [slow_unless(remat == "full", remat) for remat in ("full", "save_attention", "none")]
)
def test_memory_grows_linearly_with_depth(remat, mode):
    changes = {"remat": remat, "depth_grad_mode": mode, "depth_grad_block": 3}
    sizes = [gradient_temp_bytes(num_layers=n, **changes) for n in (16, 32, 64)]
    for smaller, larger in itertools.pairwise(sizes):
        assert larger <= 2.2 * smaller, sizes


def test_gathering_keeps_queries_and_output_gradients_in_place_of_the_cache():
    layers, heads, head_dim = 64, SMALL.num_heads, 8
    changes = {"num_layers": layers, "remat": "save_attention"}  # which has the queries
    added = gradient_temp_bytes(**changes)
    gathered = gradient_temp_bytes(**changes, depth_grad_mode="gather", depth_grad_block=4)
    slots = dataclasses.replace(SMALL, **changes).depth_slots
    tokens = 4 * 256
    cache = 2 * slots * tokens * SMALL.num_kv_heads * head_dim * 4
    kept = layers * tokens * heads * (head_dim + 2) * 4  # do, lse, delta
    assert added - gathered > 0.9 * (cache - kept), (added, gathered, cache, kept)


def test_bounded_slots_are_refused():
    message = "ModelConfig.depth_grad_block: expected 1 while depth_window is set .*, got 2"
    with pytest.raises(ValueError, match=message):
        ModelConfig(depth_window=3, depth_grad_block=2)
    with pytest.raises(ValueError, match='ModelConfig.depth_grad_mode: expected "add" while'):
        ModelConfig(depth_window=3, depth_grad_mode="gather")
    with pytest.raises(ValueError, match="ModelConfig.depth_grad_mode: expected one of"):
        ModelConfig(depth_grad_mode="scatter")
    with pytest.raises(ValueError, match="ModelConfig.depth_grad_block: expected a positive"):
        ModelConfig(depth_grad_block=0)
    with pytest.raises(ValueError, match="ModelConfig.depth_grad_dtype: expected one of"):
        ModelConfig(depth_grad_dtype="float16")


def test_a_backend_that_cannot_gather_adds():
    """In float32: a sum in bfloat16 that is rounded once is no running cache in bfloat16."""
    backends.warn_once.cache_clear()
    message = "gather: reference cannot gather; depth gradients are added instead"
    settings = {"depth_grad_mode": "gather", "depth_grad_dtype": "bfloat16", "depth_grad_block": 2}
    with pytest.warns(backends.SlowAttentionWarning, match=message):
        got = gradients(**CHANGES["row4"], attention="reference", **settings)
    assert_trees_close(got, layer_by_layer("row4"))


@pytest.mark.parametrize("mode", ["add", "gather"])
def test_blocks_under_a_mesh(mode):
    changes = CHANGES["row4"] | {"depth_grad_block": 2, "depth_grad_mode": mode}
    spec, params = build(**changes).stack()
    x, tokens = batch(rows=8)
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
    expected = scanned(spec, params, x, tokens, dy)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        got = scanned(spec, params, x, tokens, dy)
    assert_trees_close(*map(jax.device_get, (got, expected)))


def test_one_pass_over_the_later_layers(monkeypatch):
    """For the slots of a block, then layer by layer over those of the block."""
    xla, passes = backends.BACKENDS["xla"], []

    def gather(kept, depth_key, depth_value, layers, first, count, **settings):
        jax.debug.callback(
            lambda start, stop, first: passes.append((count, int(first), int(start), int(stop))),
            *layers,
            first,
            ordered=True,
        )
        return xla.gathering.gather(kept, depth_key, depth_value, layers, first, count, **settings)

    spy = dataclasses.replace(xla, gathering=xla.gathering._replace(gather=gather), name="spy")
    monkeypatch.setattr(backends, "BACKENDS", {"spy": spy})
    changes = CHANGES["row4"] | {"depth_grad_mode": "gather", "depth_grad_block": 2}
    jax.block_until_ready(gradients(**changes, attention="spy"))
    jax.effects_barrier()
    # (slots, the first of them, the layers that read them); the last layer writes none.
    assert passes == [
        (4, 4, 5, 5),
        (2, 6, 5, 5),
        (4, 4, 4, 5),
        (2, 6, 4, 4),
        (2, 4, 3, 4),
        (4, 0, 2, 5),
        (2, 2, 2, 2),
        (2, 0, 1, 2),
    ]
