"""The stack's memory that nobody has written to: it may hold NaN, and nothing reads it."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import MeshConfig
from moda_jax.model import generation, stack_layer
from moda_jax.model.stack import run_stack
from moda_jax.ops.sharding import make_mesh
from pallas_kernels import platforms
from tests.models import SMALL, VARIANTS, random_model
from tests.test_stack import assert_trees_close, batch, build, slow_unless, value_and_grads

LAYERS = 5
NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Pallas Mosaic GPU needs JAX >= 0.11"
)
AS_ON_A_GPU = types.SimpleNamespace(current=lambda: "gpu")


@pytest.fixture
def poison(monkeypatch):
    """A function: from its call on such memory holds NaN. It returns the list of shapes made."""
    made = []

    def empty(shape, dtype):
        made.append(tuple(shape))
        return jnp.full(shape, jnp.nan, dtype)

    def start():
        monkeypatch.setattr(jax.lax, "empty", empty)
        monkeypatch.setattr(stack_layer, "platforms", AS_ON_A_GPU)
        return made

    return start


def gradients(length=9, rows=2, **changes):
    """Traced anew every time."""
    spec, params = build(**changes).stack()
    x, tokens = batch(length, rows)
    x = x.astype(spec.config.compute_dtype)
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), x.dtype)
    run = jax.jit(functools.partial(value_and_grads, run_stack), static_argnums=0)
    return jax.device_get(run(spec, params, x, tokens, dy))


@functools.cache
def with_zeros(variant, **changes):
    return gradients(attention="xla", num_layers=LAYERS, **VARIANTS[variant], **changes)


ADDED, BY_BLOCKS = {"depth_grad_block": 1}, {"depth_grad_block": 2}
GATHERED = {"depth_grad_mode": "gather", "depth_grad_block": 2}


@pytest.mark.parametrize(
    ("attention", "variant", "mode"),
    [
        slow_unless((attention, variant, mode) in FAST, attention, variant, mode)
        for FAST in [(
            ("xla", "row4", ADDED), ("xla", "row4", GATHERED), ("xla", "every2", BY_BLOCKS),
            ("reference", "bounded", ADDED),
        )]
        for attention in ("xla", "reference")
        for variant in ("row3", "row4", "row5", "every2", "bounded")
        for mode in (ADDED, BY_BLOCKS, GATHERED)
        if (variant != "bounded" and attention == "xla") or mode == ADDED
    ],
)  # fmt: skip
def test_gradients_are_those_with_zeros(attention, variant, mode, poison):
    expected = with_zeros(variant)
    made = poison()
    got = gradients(attention=attention, num_layers=LAYERS, **VARIANTS[variant], **mode)
    assert len(made) > 1
    assert_trees_close(got, expected)


WIDE = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "compute_dtype": "bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "length", "changes"),
    [
        ("mosaic_tpu", 9, BY_BLOCKS),
        ("triton", 9, BY_BLOCKS),
        pytest.param("mosaic_gpu", 64, WIDE | GATHERED, marks=NEEDS_MOSAIC),
    ],
)
def test_kernels_in_their_interpreters(attention, length, changes, poison):
    """Rows of 9 tokens and heads of 6 are padded."""
    if attention == "triton":
        pytest.importorskip("triton")
    changes = {"num_layers": 3, "attention": attention} | changes
    expected = gradients(length, rows=1, **changes)
    made = poison()
    got = gradients(length, rows=1, **changes)
    assert len(made) > 1
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("mode", [slow_unless(m == GATHERED, m) for m in (ADDED, GATHERED)])
def test_under_a_mesh_each_device_makes_its_part(mode, poison):
    expected = gradients(rows=8, num_layers=LAYERS)
    made = poison()
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        got = gradients(rows=8, num_layers=LAYERS, **mode)
    assert made[:2] == [(2 * LAYERS, 2, 9, 1, SMALL.head_dim)] * 2
    assert_trees_close(got, expected)


@pytest.mark.parametrize("variant", ["row4", "bounded"])
def test_inference(variant, poison):
    """Prefill, decoding (bounded: in a ring) and the attention's mass."""
    model = random_model(dataclasses.replace(SMALL, **VARIANTS[variant]))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 37, (3, 5)), jnp.int32)

    def run():
        lengths = jnp.array([1, 5, 3], jnp.int32)
        logits, cache = generation.prefill(model, tokens, lengths, 8)
        return logits, generation.decode_step(model, cache, tokens[:, 0])[0], mass(model, tokens)

    def mass(model, tokens):
        return model.attention_mass(tokens, segment_ids=jnp.ones_like(tokens))

    expected = run()
    made = poison()
    got = run()
    assert len(made) == 6
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    ("mesh", "part"),
    [(None, "6x8x16x2x4"), (MeshConfig(data=2, fsdp=2, tensor=2), "6x2x16x1x4")],
)
def test_nothing_fills_it(platform, mesh, part):
    """Two buffers, and no constant that is spread over them."""

    def caches():
        with platforms.compiling_for(platform):
            return stack_layer.two_unwritten((6, 8, 16, 2, 4), jnp.bfloat16)

    with jax.set_mesh(make_mesh(mesh or MeshConfig())):
        text = jax.jit(caches).trace().lower(lowering_platforms=(platform,)).as_text()
    made = [line for line in text.splitlines() if "@AllocateBuffer" in line]
    assert len(made) == 2
    assert all(f"tensor<{part}xbf16>" in line for line in made)
    assert "broadcast" not in text
