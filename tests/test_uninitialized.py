"""Uninitialized memory of the stack: it may hold NaN, and nothing reads it before it is written."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import MeshConfig
from moda_jax.model import generation
from moda_jax.model.stack import run_stack
from moda_jax.ops import memory
from moda_jax.ops.sharding import make_mesh
from pallas_kernels import platforms
from tests.models import MECHANISMS, SMALL, VARIANTS
from tests.test_stack import assert_trees_close, batch, build, slow_unless, value_and_grads

CHANGES = VARIANTS | MECHANISMS
LAYERS = {"num_layers": 5}
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
        monkeypatch.setattr(memory, "platforms", AS_ON_A_GPU)
        return made

    return start


def gradients(changes, length=9, rows=2, **execution):
    """Traced anew every time."""
    spec, params = build(LAYERS | changes, **execution).stack()
    x, tokens = batch(length, rows)
    x = x.astype(spec.execution.compute_dtype)
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), x.dtype)
    run = jax.jit(functools.partial(value_and_grads, run_stack), static_argnums=0)
    return jax.device_get(run(spec, params, x, tokens, dy))


@functools.cache
def with_zeros(variant):
    return gradients(CHANGES[variant], attention="xla")


ADDED = {"slot_gradients": "add"}
GATHERED = {"slot_gradients": "gather", "slot_gradient_block": 2}
FAST = (
    *(("xla", "row4", ADDED), ("xla", "row4", GATHERED), ("reference", "bounded", ADDED)),
    *(("xla", "depth-attention", ADDED), ("xla", "attention-residuals-block", ADDED)),
)
CASES = [
    slow_unless((attention, variant, mode) in FAST, attention, variant, mode)
    for attention in ("xla", "reference")
    for variant in ("row3", "row4", "row5", "every2", "bounded", *MECHANISMS)
    for mode in (ADDED, GATHERED)
    if mode == ADDED or (attention == "xla" and variant != "bounded" and variant in VARIANTS)
    if attention == "xla" or variant in ("row4", "bounded", "depth-attention")
]


@pytest.mark.parametrize(("attention", "variant", "mode"), CASES)
def test_gradients_are_those_with_zeros(attention, variant, mode, poison):
    expected = with_zeros(variant)
    made = poison()
    got = gradients(CHANGES[variant], attention=attention, **mode)
    assert len(made) > 1
    assert_trees_close(got, expected)


WIDE = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "length", "changes", "execution"),
    [
        ("mosaic_tpu", 9, {}, ADDED),
        ("triton", 9, {}, ADDED),
        pytest.param(
            "mosaic_gpu",
            64,
            WIDE,
            GATHERED | {"compute_dtype": "bfloat16"},
            marks=NEEDS_MOSAIC,
        ),
    ],
)
def test_kernels_in_their_interpreters(attention, length, changes, execution, poison):
    """Rows of 9 tokens and heads of 6 are padded."""
    if attention == "triton":
        pytest.importorskip("triton")
    changes = {"num_layers": 3} | changes
    expected = gradients(changes, length, rows=1, attention=attention, **execution)
    made = poison()
    got = gradients(changes, length, rows=1, attention=attention, **execution)
    assert len(made) > 1
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize("mode", [slow_unless(m == GATHERED, m) for m in (ADDED, GATHERED)])
def test_under_a_mesh_each_device_makes_its_part(mode, poison):
    expected = gradients({}, rows=8)
    made = poison()
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        got = gradients({}, rows=8, **mode)
    assert made[:2] == [(2 * LAYERS["num_layers"], 2, 9, 1, SMALL.head_dim)] * 2
    assert_trees_close(got, expected)


@pytest.mark.parametrize("variant", ["row4", "bounded", "depth-attention"])
def test_inference(variant, poison):
    """Prefill, decoding (bounded: in a ring) and the attention's mass."""
    model = build(CHANGES[variant])
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
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    ("mesh", "part"),
    [(None, "6x8x16x2x4"), (MeshConfig(data=2, fsdp=2, tensor=2), "6x2x16x1x4")],
)
def test_nothing_fills_it(platform, mesh, part):
    """Two buffers, and no constant that is spread over them."""

    def caches():
        with platforms.compiling_for(platform):
            like = jax.ShapeDtypeStruct((6, 8, 16, 2, 4), jnp.bfloat16)
            return memory.uninitialized_entries((like, like))

    with jax.set_mesh(make_mesh(mesh or MeshConfig())):
        text = jax.jit(caches).trace().lower(lowering_platforms=(platform,)).as_text()
    made = [line for line in text.splitlines() if "@AllocateBuffer" in line]
    assert len(made) == 2
    assert all(f"tensor<{part}xbf16>" in line for line in made)
    assert "broadcast" not in text
