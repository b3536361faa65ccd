"""The scanned stack against an unrolled one with plain autodiff; its memory; what a token sees."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax.model.block import Block, KVProjection
from moda_jax.model.layers import rope_table
from moda_jax.model.stack import Tokens, run_stack
from moda_jax.model.transformer import Transformer
from tests.models import SMALL, VARIANTS, random_model
from tests.tolerances import SHIFTED_POSITIONS, STACK, STACK_BFLOAT16

# The stack has no embedding to tie.
STACKS = {name: changes for name, changes in VARIANTS.items() if name != "tied"} | {
    "one-layer": {"num_layers": 1},
    "two-layer": {"num_layers": 2},  # one writes slots that somebody reads
    "reference": {"attention": "reference"},
}


needs_barriers = pytest.mark.newer_jax(
    reason="its XLA drops barriers before it decides on copies: one more of the gradient cache",
)


def build(**changes):
    return random_model(dataclasses.replace(SMALL, **changes))


def batch(length=9, rows=2):
    rng = np.random.default_rng(1)
    segments = np.sort(rng.integers(1, 3, (rows, length)), axis=1).astype(np.int32)
    segments[0, -2:] = 0
    x = rng.normal(size=(rows, length, SMALL.embed_dim)).astype(np.float32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape)
    return jnp.asarray(x), Tokens(jnp.asarray(positions), jnp.asarray(segments))


def dense_attention(query, key, value, slots, segments):
    """One softmax over the sequence and the slots, straight from design section 1."""
    group = query.shape[2] // key.shape[2]
    repeat = lambda x: jnp.repeat(x, group, axis=-2)  # noqa: E731
    length = query.shape[1]
    z = jnp.einsum("btnh,bsnh->btns", query, repeat(key)) * query.shape[-1] ** -0.5
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(length, dtype=bool)
    real = segments[:, :, None, None] != 0
    z = jnp.where(mask[:, :, None] & real, z, -1e30)
    for slot_key, _ in slots:
        z_slot = jnp.einsum("btnh,btnh->btn", query, repeat(slot_key)) * query.shape[-1] ** -0.5
        z = jnp.concatenate([z, z_slot[..., None]], axis=-1)
    p = jax.nn.softmax(z, axis=-1)
    out = jnp.einsum("btns,bsnh->btnh", p[..., :length], repeat(value))
    for n, (_, slot_value) in enumerate(slots):
        out += p[..., length + n, None] * repeat(slot_value)
    return jnp.where(real, out, 0.0)


def unrolled(spec, params, x, tokens):
    """A Python loop over layers with a list of slots; nothing custom about its gradient."""
    config = spec.config
    rope = rope_table(tokens.positions, config.head_dim, config.rope_theta)
    slots = []
    for layer in range(config.num_layers):
        block: Block = nnx.merge(spec.block, jax.tree.map(lambda p, n=layer: p[n], params.blocks))
        inputs, source = block.before_attention(x, rope)
        seen = slots
        if config.depth_window is not None and len(slots) > config.depth_window:
            first = max(len(slots) - config.depth_window, config.depth_reserved)
            seen = slots[: config.depth_reserved] + slots[first:]
        out = dense_attention(inputs.query, inputs.key, inputs.value, seen, tokens.segment_ids)
        x, mlp_source = block.after_attention(x, out)
        if not config.depth_slots or layer % config.depth_write_every:
            continue
        writer = layer // config.depth_write_every

        def project(weights, source, block=block, writer=writer):
            own = jax.tree.map(lambda p: p[min(writer, config.depth_writers - 1)], weights)
            projection: KVProjection = nnx.merge(spec.projection, own)
            return block.keys_values(projection, source, rope)

        own = config.depth_attention_kv == "project"
        slots = [
            *slots,
            project(params.attention_kv, source) if own else (inputs.key, inputs.value),
        ]
        if config.depth_ffn_kv == "project":
            slots = [*slots, project(params.ffn_kv, mlp_source)]
    return x


def assert_trees_close(actual, expected):
    """Relative to each leaf's largest entry."""

    def check(path, a, b):
        worst = float(jnp.abs(a - b).max()) / max(float(jnp.abs(b).max()), 1e-6)
        assert worst < STACK, f"{jax.tree_util.keystr(path)}: {worst}"

    jax.tree_util.tree_map_with_path(check, actual, expected)


def value_and_grads(run, spec, params, x, tokens, dy):
    y, vjp = jax.vjp(lambda params, x: run(spec, params, x, tokens), params, x)
    return y, vjp(dy)


scanned = functools.partial(jax.jit, static_argnums=0)(
    functools.partial(value_and_grads, run_stack)
)


@functools.cache
def unrolled_result(variant):
    spec, params = build(**STACKS[variant]).stack()
    x, tokens = batch()
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
    # Not jitted: the operations of all variants are the same, a loop over layers is not.
    return value_and_grads(unrolled, spec, params, x, tokens, dy)


def slow_unless(fast, *values):
    return pytest.param(*values, marks=[] if fast else pytest.mark.slow)


# The other variants without rematerialisation are in test_stack_gathering.py, in blocks of layers.
NONE = ("residual", "row4", "row5", "bounded", "one-layer", "reference")
POLICIES = [
    slow_unless(remat == "full" or variant in ("row4", "row5"), variant, remat)
    for variant in STACKS
    for remat in ("full", "save_attention", "none")
    if remat != "none" or variant in NONE
]


@pytest.mark.parametrize(("variant", "remat"), POLICIES)
def test_gradients_equal_the_unrolled_stacks(variant, remat):
    spec, params = build(remat=remat, **STACKS[variant]).stack()
    x, tokens = batch()
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
    assert_trees_close(scanned(spec, params, x, tokens, dy), unrolled_result(variant))


def test_bfloat16_gradients_stay_near_float32():
    x, tokens = batch()
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
    grads = []
    for dtype in ("float32", "bfloat16"):
        spec, params = build(compute_dtype=dtype).stack()
        cast = x.astype(dtype), tokens, dy.astype(dtype)
        grads.append(scanned(spec, params, *cast)[1][0])
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads[-1]))
    for exact, rounded in zip(*map(jax.tree.leaves, grads), strict=True):
        error = jnp.linalg.norm(rounded - exact) / jnp.maximum(jnp.linalg.norm(exact), 1e-6)
        assert error < STACK_BFLOAT16


def compiled_gradient(**changes):
    config = dataclasses.replace(SMALL, embed_dim=32, head_dim=8, mlp_dim=64, **changes)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    spec, params = model.stack()
    tokens = Tokens(*(jax.ShapeDtypeStruct((4, 256), jnp.int32),) * 2)
    x = jax.ShapeDtypeStruct((4, 256, config.embed_dim), config.compute_dtype)

    def loss(params, x, tokens):
        return jnp.sum(run_stack(spec, params, x, tokens).astype(jnp.float32) ** 2)

    return config, jax.jit(jax.grad(loss)).lower(params, x, tokens).compile()


def gradient_temp_bytes(**changes):
    """Temporary bytes of the compiled gradient, by the compiler's own account."""
    return compiled_gradient(**changes)[1].memory_analysis().temp_size_in_bytes


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
@pytest.mark.parametrize("depth_ffn_kv", ["none", "project"])
def test_no_layer_copies_the_cache(depth_ffn_kv):
    """Every layer writes and adds in place: a copy of the cache per layer is O(L^2) traffic."""
    config, compiled = compiled_gradient(num_layers=6, depth_ffn_kv=depth_ffn_kv)
    slots = config.depth_slots + config.slots_per_writer  # the last layer's, too
    assert_no_copies_in_loops(compiled.as_text(), f"f32[{slots},4,256,")


@needs_barriers
@pytest.mark.parametrize("depth_ffn_kv", ["none", "project"])
@pytest.mark.parametrize("remat", ["full", "save_attention"])
def test_no_layer_copies_what_is_kept_of_all(depth_ffn_kv, remat):
    changes = {"depth_grad_mode": "gather", "depth_ffn_kv": depth_ffn_kv, "remat": remat}
    config, compiled = compiled_gradient(num_layers=6, **changes)
    assert_no_copies_in_loops(compiled.as_text(), f"f32[6,4,256,{config.num_heads},")


MEMORY = [
    slow_unless((remat, dtype) == ("full", "float32"), remat, dtype)
    for dtype in ("float32", "bfloat16")
    for remat in ("full", "save_attention", "none")
]


@pytest.mark.parametrize(("remat", "dtype"), MEMORY)
def test_memory_grows_linearly_with_depth(remat, dtype):
    sizes = [
        gradient_temp_bytes(num_layers=n, remat=remat, compute_dtype=dtype) for n in (8, 16, 32, 64)
    ]
    for smaller, larger in itertools.pairwise(sizes):
        assert larger <= 2.2 * smaller, sizes


@pytest.mark.parametrize(
    "variant", [slow_unless(variant == "row4", variant) for variant in ("row3", "row4", "row5")]
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_barriers)])
def test_extra_memory_over_the_plain_transformer(variant, dtype):
    """At L = 64, under 3.5 times one full depth cache: the cache and its float32 gradients."""
    changes = {"num_layers": 64, "compute_dtype": dtype} | STACKS[variant]
    moda = gradient_temp_bytes(**changes)
    plain = gradient_temp_bytes(**changes | {"depth_stream": "residual"})
    slots = dataclasses.replace(SMALL, **changes).depth_slots
    cache = 2 * slots * 4 * 256 * SMALL.num_kv_heads * 8 * jnp.dtype(dtype).itemsize
    assert moda - plain < 3.5 * cache, (moda, plain, cache)


def test_keys_and_values_are_kept_once():
    """In the depth cache, which every layer writes to: saving attention adds q, o and lse, and one
    product for the FFN's keys.
    """
    layers, tokens, heads = 32, 4 * 256, SMALL.num_heads
    sizes = {
        remat: gradient_temp_bytes(num_layers=layers, remat=remat)
        for remat in ("full", "save_attention")
    }
    added = layers * tokens * heads * (2 * 8 + 1) * 4
    keys = layers * tokens * SMALL.num_kv_heads * 8 * 4  # or values, or products
    assert sizes["save_attention"] - sizes["full"] < added + 1.5 * keys, (sizes, added, keys)


def test_depth_keys_are_projected_once():
    """An own projection costs two products [tokens, K H] in all, where attention is saved."""

    def products(variant):
        changes = STACKS[variant] | {"num_layers": 6, "remat": "save_attention"}
        text = compiled_gradient(**changes)[1].as_text()
        width = SMALL.num_kv_heads * 8
        return len(re.findall(rf"= f32\[{4 * 256},{width}\]\S* (?:dot|custom-call)\(", text))

    assert [products(v) for v in ("row3", "row4", "row5")] == [3, 5, 7]


def test_compile_size_does_not_grow_with_depth():
    x, tokens = batch()

    def program_size(layers):
        spec, params = build(num_layers=layers).stack()
        grad = jax.grad(lambda params: run_stack(spec, params, x, tokens).sum())
        return len(jax.jit(grad).lower(params).as_text())

    assert program_size(32) < 1.05 * program_size(8)


@pytest.mark.parametrize("variant", ["residual", "row4", "row5", "every2", "bounded"])
def test_causality_through_gradients(variant):
    """The output at t depends on the inputs up to t of its own document, and on nothing else."""
    spec, params = build(**STACKS[variant]).stack()
    x, tokens = batch(length=8, rows=1)
    tokens = tokens._replace(segment_ids=jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0]], jnp.int32))

    def output(x, t):
        return run_stack(spec, params, x, tokens)[0, t].sum()

    for t, first in ((2, 0), (3, 0), (5, 4), (6, 4)):
        reach = jnp.abs(jax.grad(output)(x, t)[0]).sum(axis=-1)
        expected = (np.arange(8) >= first) & (np.arange(8) <= t)
        np.testing.assert_array_equal(np.asarray(reach > 0), expected)


def test_documents_of_a_row_are_as_if_alone():
    spec, params = build().stack()
    x, tokens = batch(length=8, rows=1)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2]], jnp.int32)
    together = run_stack(spec, params, x, tokens._replace(segment_ids=segments))
    alone = run_stack(
        spec, params, x[:, 3:], Tokens(tokens.positions[:, 3:], jnp.ones((1, 5), jnp.int32))
    )
    assert_trees_close(together[:, 3:], alone)


@pytest.mark.parametrize("variant", ["row4", "row5", "pre-head-bias"])
def test_shifted_positions_change_nothing(variant):
    """Depth scores do not depend on where the token stands: FFN and own keys are rotated too."""
    model = build(**STACKS[variant])
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 37, (2, 7)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (2, 7))
    mass = model.attention_mass(tokens, positions=positions)
    shifted = model.attention_mass(tokens, positions=positions + 1000)
    np.testing.assert_allclose(mass, shifted, rtol=0, atol=SHIFTED_POSITIONS)
    logits, of_shifted = (model(tokens, positions=positions + n) for n in (0, 1000))
    worst = jnp.abs(logits - of_shifted).max() / jnp.abs(logits).max()
    assert worst < SHIFTED_POSITIONS
    assert (np.asarray(mass[2:, 1:]) > 0.01).any()  # the slots do matter
