"""The stack's memory and copies, its size as a program, and what a token sees."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax.config import MoDAConfig, ResidualConfig
from moda_jax.depth import make_mechanism
from moda_jax.model.stack import TokenInfo, run_stack
from moda_jax.model.transformer import Transformer
from tests.models import FLOAT32, SMALL, VARIANTS, random_model
from tests.tolerances import SHIFTED_POSITIONS, STACK, STACK_BFLOAT16

needs_barriers = pytest.mark.newer_jax(
    reason="its XLA drops barriers before it decides on copies: one more of the gradient cache",
)


def build(changes=None, **execution):
    """The model of `SMALL` with `changes`, computed as `FLOAT32` with the rest says."""
    config = dataclasses.replace(SMALL, **(changes or {}))
    return random_model(config, dataclasses.replace(FLOAT32, **execution))


def batch(length=9, rows=2):
    rng = np.random.default_rng(1)
    segments = np.sort(rng.integers(1, 3, (rows, length)), axis=1).astype(np.int32)
    segments[0, -2:] = 0
    x = rng.normal(size=(rows, length, SMALL.embed_dim)).astype(np.float32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape)
    return jnp.asarray(x), TokenInfo(jnp.asarray(positions), jnp.asarray(segments))


def assert_trees_close(actual, expected):
    """Relative to each leaf's largest entry."""

    def distance(a, b):
        return float(jnp.abs(a - b).max()) / max(float(jnp.abs(b).max()), 1e-6)

    chex.assert_trees_all_equal_comparator(
        lambda a, b: distance(a, b) < STACK,
        lambda a, b: f"relative distance {distance(a, b)}, expected less than {STACK}",
        actual,
        expected,
    )


def value_and_grads(run, spec, params, x, tokens, dy):
    y, vjp = jax.vjp(lambda params, x: run(spec, params, x, tokens), params, x)
    return y, vjp(dy)


scanned = functools.partial(jax.jit, static_argnums=0)(
    functools.partial(value_and_grads, run_stack)
)


def slow_unless(fast, *values):
    return pytest.param(*values, marks=[] if fast else pytest.mark.slow)


@pytest.mark.slow
def test_bfloat16_gradients_stay_near_float32():
    x, tokens = batch()
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
    grads = []
    for dtype in ("float32", "bfloat16"):
        spec, params = build(compute_dtype=dtype).stack()
        cast = x.astype(dtype), tokens, dy.astype(dtype)
        grads.append(scanned(spec, params, *cast)[1][0])
        chex.assert_trees_all_equal_dtypes(grads[-1], params)  # float32
    for exact, rounded in zip(*map(jax.tree.leaves, grads), strict=True):
        error = jnp.linalg.norm(rounded - exact) / jnp.maximum(jnp.linalg.norm(exact), 1e-6)
        assert error < STACK_BFLOAT16


def compiled_gradient(changes, **execution):
    sizes = {"embed_dim": 32, "head_dim": 8, "mlp_dim": 64}
    config = dataclasses.replace(SMALL, **sizes | changes)
    how = dataclasses.replace(FLOAT32, **execution)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), execution=how))
    spec, params = model.stack()
    tokens = TokenInfo(*(jax.ShapeDtypeStruct((4, 256), jnp.int32),) * 2)
    x = jax.ShapeDtypeStruct((4, 256, config.embed_dim), how.compute_dtype)

    def loss(params, x, tokens):
        return jnp.sum(run_stack(spec, params, x, tokens).astype(jnp.float32) ** 2)

    return config, jax.jit(jax.grad(loss)).lower(params, x, tokens).compile()


def gradient_temp_bytes(changes, **execution):
    """Temporary bytes of the compiled gradient, by the compiler's own account."""
    compiled = compiled_gradient(changes, **execution)[1]
    return compiled.memory_analysis().temp_size_in_bytes


def num_slots(changes):
    """S, of `SMALL` with `changes`."""
    return make_mechanism(dataclasses.replace(SMALL, **changes)).num_entries


def assert_no_copies_in_loops(text: str, start: str):
    """Of arrays whose type begins with `start`."""
    inside, copies, seen = "", [], 0
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    for line in text.splitlines():
        if computation := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = computation[1]
        elif f"= {start}" in line and inside in bodies:
            seen += 1
            copies += [line.strip()] if " copy(" in line else []
    assert seen  # the text is what it is taken for
    assert not copies


@needs_barriers
@pytest.mark.parametrize("ffn_kv", ["none", "project"])
def test_no_layer_copies_the_cache(ffn_kv):
    """Every layer writes and adds in place: a copy of the cache per layer is O(L^2) traffic."""
    changes = {"num_layers": 6, "depth": MoDAConfig(ffn_kv=ffn_kv)}
    config, compiled = compiled_gradient(changes)
    slots = make_mechanism(config).capacity  # the last layer's, too
    assert_no_copies_in_loops(compiled.as_text(), f"f32[{slots},4,256,")


@needs_barriers
@pytest.mark.parametrize("ffn_kv", ["none", "project"])
@pytest.mark.parametrize("remat", ["full", "save_attention"])
def test_no_layer_copies_what_is_kept_of_all(ffn_kv, remat):
    changes = {"num_layers": 6, "depth": MoDAConfig(ffn_kv=ffn_kv)}
    config, compiled = compiled_gradient(changes, slot_gradients="gather", remat=remat)
    assert_no_copies_in_loops(compiled.as_text(), f"f32[6,4,256,{config.num_heads},")


MEMORY = [
    slow_unless(False, remat, dtype)
    for dtype in ("float32", "bfloat16")
    for remat in ("full", "save_attention", "save_products")
]


@pytest.mark.parametrize(("remat", "dtype"), MEMORY)
def test_memory_grows_linearly_with_depth(remat, dtype):
    smaller, larger = (
        gradient_temp_bytes({"num_layers": n}, remat=remat, compute_dtype=dtype) for n in (32, 64)
    )
    assert larger <= 2.2 * smaller, (smaller, larger)


@pytest.mark.parametrize(
    "variant", [slow_unless(variant == "row4", variant) for variant in ("row3", "row4", "row5")]
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_barriers)])
def test_extra_memory_over_the_plain_transformer(variant, dtype):
    """At L = 64, under 3.5 times one full depth cache: the cache and its float32 gradients."""
    changes = {"num_layers": 64} | VARIANTS[variant]
    moda = gradient_temp_bytes(changes, compute_dtype=dtype)
    plain = gradient_temp_bytes(changes | {"depth": ResidualConfig()}, compute_dtype=dtype)
    item = jnp.dtype(dtype).itemsize
    cache = 2 * num_slots(changes) * 4 * 256 * SMALL.num_kv_heads * 8 * item
    assert moda - plain < 3.5 * cache, (moda, plain, cache)


def test_keys_and_values_are_kept_once():
    """In the depth cache, which every layer writes to: saving attention adds q, o and lse, and one
    product for the FFN's keys.
    """
    layers, tokens, heads = 32, 4 * 256, SMALL.num_heads
    sizes = {
        remat: gradient_temp_bytes({"num_layers": layers}, remat=remat)
        for remat in ("full", "save_attention")
    }
    added = layers * tokens * heads * (2 * 8 + 1) * 4
    keys = layers * tokens * SMALL.num_kv_heads * 8 * 4  # or values, or products
    assert sizes["save_attention"] - sizes["full"] < added + 1.5 * keys, (sizes, added, keys)


def test_depth_keys_are_projected_once():
    """An own projection costs two products [tokens, K H] in all, where attention is saved."""

    def products(variant):
        changes = VARIANTS[variant] | {"num_layers": 6}
        text = compiled_gradient(changes, remat="save_attention")[1].as_text()
        width = SMALL.num_kv_heads * 8
        return len(re.findall(rf"= f32\[{4 * 256},{width}\]\S* (?:dot|custom-call)\(", text))

    assert [products(v) for v in ("row3", "row4", "row5")] == [3, 5, 7]


def test_compile_size_does_not_grow_with_depth():
    x, tokens = batch()

    def program_size(layers):
        spec, params = build({"num_layers": layers}).stack()
        grad = jax.grad(lambda params: run_stack(spec, params, x, tokens).sum())
        return len(jax.jit(grad).lower(params).as_text())

    assert program_size(32) < 1.05 * program_size(8)


def test_documents_of_a_row_are_as_if_alone():
    spec, params = build().stack()
    x, tokens = batch(length=8, rows=1)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2]], jnp.int32)
    together = run_stack(spec, params, x, tokens._replace(segment_ids=segments))
    alone = run_stack(
        spec, params, x[:, 3:], TokenInfo(tokens.positions[:, 3:], jnp.ones((1, 5), jnp.int32))
    )
    assert_trees_close(together[:, 3:], alone)


@pytest.mark.parametrize("variant", ["row5"])
def test_shifted_positions_change_nothing(variant):
    """Depth scores do not depend on where the token stands: FFN and own keys are rotated too."""
    model = build(VARIANTS[variant])
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 37, (2, 7)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (2, 7))
    mass = model.attention_mass(tokens, positions=positions)
    shifted = model.attention_mass(tokens, positions=positions + 1000)
    chex.assert_trees_all_close(mass, shifted, rtol=0, atol=SHIFTED_POSITIONS)
    logits, of_shifted = (model(tokens, positions=positions + n) for n in (0, 1000))
    worst = jnp.abs(logits - of_shifted).max() / jnp.abs(logits).max()
    assert worst < SHIFTED_POSITIONS
    assert (np.asarray(mass[2:, 1:]) > 0.01).any()  # the slots do matter
