"""Slot gradients that are gathered, for blocks of layers, against those that are added up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import MeshConfig
from moda_jax.ops import backends
from moda_jax.ops.sharding import make_mesh
from tests.models import SMALL, VARIANTS
from tests.test_stack import (
    assert_trees_close,
    batch,
    build,
    gradient_temp_bytes,
    num_slots,
    scanned,
    slow_unless,
)
from tests.tolerances import RUNNING_BFLOAT16

LAYERS = 5  # 2 and 3 leave a rest, 5 is all
CHANGES = {
    name: changes | {"num_layers": LAYERS}
    for name, changes in VARIANTS.items()
    if name not in ("residual", "bounded", "tied")  # no slots; refused; no embedding here
} | {"two-layer": {"num_layers": 2}}


MODES = {
    "add": {"slot_gradients": "add"},
    "gather": {"slot_gradients": "gather", "slot_gradient_block": 2},
}
REMATS = ("full", "save_attention", "save_products")


def covering(sizes):
    """(variant, remat, size): every two values meet, but not every three.

    Of what gathers as another variant does, one size.
    """
    alike = ("row3", "row5-without-ffn", "pre-head-bias", "post-none", "two-layer")
    return [
        (variant, REMATS[(i + j) % 3], size)
        for i, variant in enumerate(CHANGES)
        for j, size in enumerate(sizes)
        if variant not in alike or j == i % len(sizes)
    ]


def gradients(changes, **execution):
    spec, params = build(changes, **execution).stack()
    x, tokens = batch()
    x = x.astype(spec.execution.compute_dtype)
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), x.dtype)
    return scanned(spec, params, x, tokens, dy)


def gathered(changes, size, **execution):
    return gradients(changes, slot_gradients="gather", slot_gradient_block=size, **execution)


FAST_GATHERING = (
    ("row4", "full", 2),
    ("row5", "save_attention", 3),
    ("every2", "full", 2),
)


@functools.cache
def added(variant):
    return gradients(CHANGES[variant], slot_gradients="add")


@pytest.mark.parametrize(
    ("variant", "remat", "size"),
    [
        *FAST_GATHERING,
        *(
            slow_unless(False, *values)
            for values in (
                *covering((2, 3, LAYERS)),
                ("row4", "save_products", 1),
                ("row5", "full", 1),
                ("row3", "save_products", 1),
                ("two-layer", "full", 2),
            )
            if values not in FAST_GATHERING
        ),
    ],
)
def test_gathering_gives_the_gradients_of_adding(variant, remat, size):
    assert_trees_close(gathered(CHANGES[variant], size, remat=remat), added(variant))


@pytest.mark.parametrize(("variant", "size"), [("row4", 2), slow_unless(False, "every2", 3)])
def test_nothing_is_gathered_from_before_it_was_written(variant, size, monkeypatch):
    """A CPU's memory that nobody initialized holds zeros; here it holds NaN."""
    monkeypatch.setattr(jax.lax, "empty", lambda *args: jnp.full(*args[:1], jnp.nan, args[1]))
    # Another scale of the weights, or a compiled stack with zeros would be at hand.
    changes = CHANGES[variant] | {"init_std": 0.03}
    assert_trees_close(gathered(changes, size), gradients(changes))


def test_a_block_may_be_longer_than_the_stack():
    assert_trees_close(gathered(CHANGES["row4"], 99), added("row4"))


@pytest.mark.parametrize("mode", MODES)
def test_sums_in_bfloat16(mode):
    got = gradients(CHANGES["row4"], slot_gradient_dtype="bfloat16", **MODES[mode])
    assert 1e-5 < largest_error(got, added("row4")) < RUNNING_BFLOAT16  # it does round


def test_gathering_in_bfloat16_is_as_exact_as_adding():
    errors = {
        mode: largest_error(
            gradients(CHANGES["row4"], compute_dtype="bfloat16", **settings), added("row4")
        )
        for mode, settings in MODES.items()
    }
    assert 1e-4 < errors["gather"] < 1.2 * errors["add"]


@pytest.mark.slow
def test_gathered_sums_in_bfloat16_are_rounded_once():
    """Adding rounds at every layer."""
    changes = {"num_layers": 12}
    exact = gradients(changes, slot_gradients="add")
    errors = {
        mode: largest_error(gradients(changes, slot_gradient_dtype="bfloat16", **settings), exact)
        for mode, settings in MODES.items()
    }
    assert 1e-5 < errors["gather"] < 0.75 * errors["add"]


def largest_error(got, exact):
    """The largest relative error of a parameter's gradient, norm over norm."""
    errors = jax.tree.map(
        lambda a, b: float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-6)),
        got[1],
        exact[1],
    )
    return max(jax.tree.leaves(errors))


def test_running_sums_in_bfloat16_take_less_memory():
    changes = {"num_layers": 64}
    full, half = (
        gradient_temp_bytes(changes, slot_gradients="add", slot_gradient_dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    saved = 2 * num_slots(changes) * 4 * 256 * SMALL.num_kv_heads * 8 * 2
    assert full - half > 0.7 * saved, (full, half, saved)


@pytest.mark.parametrize("remat", [slow_unless(remat == "full", remat) for remat in REMATS])
def test_memory_grows_linearly_with_depth(remat):
    settings = {"remat": remat, "slot_gradients": "gather", "slot_gradient_block": 3}
    smaller, larger = (gradient_temp_bytes({"num_layers": n}, **settings) for n in (32, 64))
    assert larger <= 2.2 * smaller, (smaller, larger)


def test_gathering_keeps_queries_and_output_gradients_in_place_of_the_cache():
    layers, heads, head_dim, block = 64, SMALL.num_heads, 8, 4
    changes, remat = {"num_layers": layers}, "save_attention"  # which has the queries
    total = gradient_temp_bytes(changes, remat=remat, slot_gradients="add")
    less = gradient_temp_bytes(
        changes, remat=remat, slot_gradients="gather", slot_gradient_block=block
    )
    tokens = 4 * 256
    cache = 2 * num_slots(changes) * tokens * SMALL.num_kv_heads * head_dim * 4
    kept = layers * tokens * heads * (head_dim + 2) * 4  # do, lse, delta
    kept += cache * block // layers  # the gradients of a block's slots
    assert total - less > 0.95 * (cache - kept), (total, less, cache, kept)


@pytest.mark.parametrize(
    ("variant", "attention", "reason"),
    [
        ("bounded", "xla", "bounded slots are not seen by all later layers"),
        ("row4", "reference", "reference cannot gather"),
    ],
)
def test_what_cannot_be_gathered_is_added(variant, attention, reason):
    """In float32: a sum in bfloat16 that is rounded once is no running sum in bfloat16."""
    backends.warn_once.cache_clear()
    changes = VARIANTS[variant] | {"num_layers": LAYERS}
    settings = {"attention": attention, "slot_gradient_dtype": "bfloat16"}
    message = f"slot_gradients=gather: {reason}; they are added instead"
    with pytest.warns(backends.SlowAttentionWarning, match=message):
        got = gathered(changes, 2, **settings)
    assert_trees_close(got, gradients(changes, slot_gradients="add"))


def test_gathering_under_a_mesh():
    spec, params = build(CHANGES["row4"], **MODES["gather"]).stack()
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
    jax.block_until_ready(gathered(CHANGES["row4"], 2, attention="spy"))
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
