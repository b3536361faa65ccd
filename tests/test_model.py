"""The model's parts, its counts against the paper's printed numbers, and the loss."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from moda_jax.config import (
    DEPTH_CONFIGS,
    DenseConfig,
    ExecutionConfig,
    MeshConfig,
    MHCConfig,
    MoDAConfig,
    ModelConfig,
    ResidualConfig,
)
from moda_jax.depth import make_mechanism
from moda_jax.layers import RMSNorm, lookup, rope_table, rotate
from moda_jax.model.flops import count_flops, count_parameters
from moda_jax.model.transformer import Transformer
from moda_jax.ops.sharding import make_mesh
from moda_jax.train import losses
from moda_jax.train.losses import next_token_loss
from pallas_kernels import platforms
from tests import models
from tests.tolerances import RELATIVE, SAME_MODEL

SMALL = dataclasses.replace(models.SMALL, num_layers=3)

TABLE_3 = ModelConfig(
    vocab_size=100278,
    num_layers=36,
    embed_dim=1024,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=4096,
)

TABLE_6 = ModelConfig(
    vocab_size=50304,
    num_layers=24,
    embed_dim=384,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=1536,
    norm_placement="pre",
    qk_norm="head",
    use_bias=True,
    tie_embeddings=True,
)


build = models.random_model


def batch(config, rows=2, length=7):
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, config.vocab_size, (2, rows, length)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[0, 4:] = 0
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    names = ("tokens", "targets", "segment_ids", "positions")
    return dict(zip(names, map(jnp.asarray, (tokens, targets, segments, positions)), strict=True))


@pytest.mark.parametrize(
    ("changes", "millions"),
    [
        ({"depth": ResidualConfig()}, 669.0),
        ({"depth": ResidualConfig(), "num_layers": 38}, 700.5),
        ({"depth": MoDAConfig(ffn_kv="none")}, 669.0),
        ({}, 705.7),
        ({"depth": MoDAConfig(attention_kv="project")}, 742.4),
    ],
)
def test_parameter_counts_of_table_3(changes, millions):
    count = count_parameters(dataclasses.replace(TABLE_3, **changes)).without_head
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("layers", "depth", "millions"),
    [
        (24, ResidualConfig(), 71.35),
        (48, ResidualConfig(), 123.38),
        (24, MoDAConfig(), 73.72),
        (48, MoDAConfig(), 128.11),
    ],
)
def test_parameter_counts_of_table_6(layers, depth, millions):
    """The paper counts no final norm, and an FFN projection in the last layer that nobody reads."""
    config = dataclasses.replace(TABLE_6, num_layers=layers, depth=depth)
    count = count_parameters(config)
    unread = count.depth // (layers - 1)
    assert round((count.without_head - count.final_norm + unread) / 1e6, 2) == millions


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"depth": ResidualConfig(), "tie_embeddings": True},
        {"depth": MoDAConfig(attention_kv="project", write_every=2), "use_bias": True},
        {"qk_norm": "head", "norm_placement": "pre", "depth": MoDAConfig(ffn_kv="none")},
        {"qk_norm": "none", "num_layers": 1},
        {"depth": MoDAConfig(key_norm="reader")},
        {"qk_norm": "head", "depth": MoDAConfig(key_norm="reader")},
        *models.MECHANISMS.values(),
    ],
)
def test_counts_are_those_of_the_model(changes):
    config = dataclasses.replace(SMALL, **changes)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == count_parameters(config).total


def test_forward_flops_follow_table_3():
    """The paper's convention: square attention, one multiply-add of softmax extra (6 N T²)."""
    printed = {ResidualConfig(): 8.01, MoDAConfig(ffn_kv="none"): 8.02, MoDAConfig(): 8.33}
    for depth, tera in printed.items():
        config = dataclasses.replace(TABLE_3, depth=depth)
        softmax = 6 * config.num_layers * config.num_heads * 4096**2
        flops = count_flops(config, 4096, causal=False).forward + softmax
        assert abs(flops / 1e12 - tera) < 0.006


def test_visible_slots():
    def visible_slots(num_layers, depth):
        config = dataclasses.replace(SMALL, num_layers=num_layers, depth=depth)
        return make_mechanism(config).visible_slots()

    assert visible_slots(3, MoDAConfig()) == [0, 2, 4]
    assert visible_slots(6, MoDAConfig(write_every=2)) == [0, 2, 2, 4, 4, 6]
    assert visible_slots(5, MoDAConfig(window=3, reserved=1)) == [0, 2, 4, 4, 4]


def test_logits_and_mass_have_their_shapes():
    inputs = batch(SMALL)
    segments = inputs["segment_ids"]
    model = build(SMALL, dataclasses.replace(models.FLOAT32, compute_dtype="bfloat16"))
    logits = model(inputs["tokens"], segment_ids=segments, positions=inputs["positions"])
    chex.assert_shape(logits, (2, 7, 37))
    chex.assert_type(logits, jnp.float32)
    mass = model.attention_mass(inputs["tokens"], segment_ids=segments)
    chex.assert_shape(mass, (3, 1 + 4))
    np.testing.assert_allclose(mass.sum(axis=1), 1.0, atol=0.01)
    assert (np.asarray(mass[0, 1:]) == 0).all()
    assert (np.asarray(mass[2, 1:]) > 0).all()


def test_mass_by_hand():
    """Of one token: to the second layer's query the first layer's key scores log 3, its own 0."""
    depth = MoDAConfig(ffn_kv="none")
    config = dataclasses.replace(SMALL, num_layers=2, depth=depth, qk_norm="none", use_bias=True)
    model = build(config)
    query, key = model.layers.query, model.layers.key_value.key
    for linear in (query, key):
        linear.kernel[...] = jnp.zeros(linear.kernel.shape)
        linear.bias[...] = jnp.zeros(linear.bias.shape)
    query.bias[...] = query.bias[...].at[1, :, 0].set(SMALL.head_dim**0.5)
    key.bias[...] = key.bias[...].at[0, :, 0].set(np.log(3.0))
    mass = model.attention_mass(jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(mass, [[1.0, 0.0], [0.25, 0.75]], rtol=1e-6)


def test_mass_with_bounded_slots_keeps_every_slots_place():
    depth = MoDAConfig(window=3, reserved=1)
    config = dataclasses.replace(SMALL, num_layers=5, depth=depth)
    mass = np.asarray(build(config).attention_mass(batch(config)["tokens"]))
    chex.assert_shape(mass, (5, 1 + 8))
    np.testing.assert_allclose(mass.sum(axis=1), 1.0, atol=1e-5)
    seen = [[], [0, 1], [0, 1, 2, 3], [0, 3, 4, 5], [0, 5, 6, 7]]
    assert [np.flatnonzero(row[1:]).tolist() for row in mass] == seen


def test_mass_without_a_real_token_is_zero():
    tokens = jnp.zeros((1, 4), jnp.int32)
    mass = build(SMALL).attention_mass(tokens, segment_ids=tokens)
    np.testing.assert_array_equal(mass, 0.0)


def test_initialisation_is_cut_at_three_deviations():
    """Of the embedding and of every matrix; a normal cut there has 0.9866 of its deviation."""
    config = dataclasses.replace(SMALL, init_std=0.02, vocab_size=512, embed_dim=128)
    model = Transformer(config, rngs=nnx.Rngs(0))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    matrices = {name: x for name, x in found.items() if "scale" not in name}
    assert len(matrices) == 11  # embedding, q, k, v, o, three of the FFN, two of depth, head
    for name, matrix in matrices.items():
        assert np.abs(matrix).max() <= 0.06, name
        assert abs(matrix.std() - 0.9866 * 0.02) < 0.0005, name


@pytest.mark.parametrize("form", ["scalar", "matrix"])
def test_dense_connections_start_as_the_plain_model(form):
    """Weight 1, or the identity, on the newest of one, two and three entries."""
    config = dataclasses.replace(SMALL, num_layers=3, depth=DenseConfig(form))
    weights = make_mechanism(config).shared_parameters(nnx.Rngs(0))["weights"][...]
    newest = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    one = 1.0 if form == "scalar" else np.eye(SMALL.embed_dim)
    np.testing.assert_array_equal(weights, np.multiply.outer(newest, one))


def test_manifold_constrained_streams_start_as_documented():
    """The mean of all four streams is read, what is written is added once, and few are mixed."""
    config = dataclasses.replace(SMALL, depth=MHCConfig(num_streams=4))
    start = make_mechanism(config).layer_parameters(nnx.Rngs(0))
    sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x[...])))  # noqa: E731
    np.testing.assert_allclose(sigmoid(start.pre_bias), np.full((2, 4), 0.25), rtol=1e-6)
    np.testing.assert_array_equal(2 * sigmoid(start.post_bias), np.ones((2, 4)))
    np.testing.assert_array_equal(start.residual_bias[...], np.stack([4 * np.eye(4)] * 2))


def test_rms_norm_and_rope():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 6)), jnp.float32)
    norm = RMSNorm((4, 6), (None, None), 1e-6)
    expected = x / np.sqrt((np.asarray(x) ** 2).mean(axis=(2, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-6)
    positions = jnp.asarray([[0, 1, 5], [7, 8, 12]], jnp.int32)  # the same distances
    rope = rope_table(positions, 6, 10_000.0)
    np.testing.assert_allclose(rotate(x, rope)[0, 0], x[0, 0])  # position 0: no rotation
    same = jnp.broadcast_to(x[:1], x.shape)
    q, k = rotate(same, rope), rotate(same[:, ::-1], rope)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4, atol=1e-5)


def test_rms_norm_of_16_bits_is_computed_in_32():
    """300² is no float16."""
    x = jnp.asarray([[300.0, -300.0, 300.0, 0.0]], jnp.float16)
    got = RMSNorm((4,), (None,), 1e-6)(x)
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(got, x / (300 * np.sqrt(0.75)), rtol=2**-10)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_rotation_is_turned_back(platform):
    """Its transpose, in either of the forms that the gradient has."""
    rng = np.random.default_rng(1)
    x, d = (jnp.asarray(rng.normal(size=(2, 3, 4, 6)), jnp.float32) for _ in range(2))
    rope = rope_table(jnp.asarray([[0, 1, 5], [7, 8, 12]], jnp.int32), 6, 10_000.0)
    matrix = jax.jacfwd(lambda x: plain_rotation(x, rope))(x)
    expected = np.tensordot(d, matrix, 4)
    with platforms.compiling_for(platform):
        rotated, back = jax.vjp(lambda x: rotate(x, rope), x)
        (dx,) = back(d)
    np.testing.assert_allclose(rotated, plain_rotation(x, rope), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(dx, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_embeddings_gradient_is_summed_in_float32(platform, dtype):
    """Rows longer than a chunk, one token in two thirds of the places, ids that name no row."""
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 7, (2, 700))
    ids[rng.random(ids.shape) < 0.6] = 3
    ids[0, 5], ids[1, 600] = -1, 9
    d = jnp.asarray(1 + rng.random((2, 700, 5)), dtype)
    expected = np.zeros((9, 5))
    known = (ids >= 0) & (ids < 9)
    np.add.at(expected, ids[known], np.asarray(d, np.float64)[known])
    table = jnp.asarray(rng.normal(size=(9, 5)), jnp.float32)
    with platforms.compiling_for(platform):
        rows, back = jax.vjp(lambda table: lookup(table, jnp.asarray(ids, jnp.int32), dtype), table)
        (got,) = back(d)
    assert rows.dtype == dtype
    assert jnp.isnan(rows[~known]).all()
    chex.assert_trees_all_equal(rows[known], table.astype(dtype)[ids[known]])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=RELATIVE["float32"])


@pytest.mark.parametrize("depth", DEPTH_CONFIGS.values(), ids=DEPTH_CONFIGS)
def test_no_gradient_is_summed_over_tokens_in_16_bits(depth):
    """Neither by reductions (biases) nor by scatters (embeddings): there may be 100,000 tokens."""
    config = dataclasses.replace(
        models.SMALL, num_layers=2, norm_placement="reordered", use_bias=True, depth=depth()
    )
    execution = ExecutionConfig(compute_dtype="bfloat16", attention="xla")
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), execution=execution))
    graph, params = nnx.split(model)
    inputs = batch(config, rows=23, length=29)

    def loss(params):
        return next_token_loss(nnx.merge(graph, params), inputs, z_loss=1e-5)[0]

    found = [
        (equation.primitive.name, [str(value.aval) for value in equation.invars])
        for equation in equations_of(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
        if equation.primitive.name in ("reduce_sum", "scatter-add", "cumsum")
        and equation.outvars[0].aval.dtype == jnp.bfloat16
        and {23, 29} & set(equation.invars[-1].aval.shape)
        and not {23, 29} <= set(equation.outvars[0].aval.shape)
    ]
    assert not found


def equations_of(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        yield from (inner for sub in jaxprs_in_params(equation.params)
                    for inner in equations_of(sub))  # fmt: skip


def plain_rotation(x, rope):
    cos, sin = rope
    first, second = x[..., :3], x[..., 3:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def plain_loss(model, inputs, z_loss):
    segments = inputs["segment_ids"]
    logits = model(inputs["tokens"], segment_ids=segments, positions=inputs["positions"])
    lse = jax.nn.logsumexp(logits, axis=-1)
    correct = jnp.take_along_axis(logits, inputs["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(segments != 0, lse - correct + z_loss * lse**2, 0.0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vocab_size": 4100},  # padded to whole tiles
        pytest.param({"tie_embeddings": True}, marks=pytest.mark.slow),
        pytest.param({"use_bias": True}, marks=pytest.mark.slow),
    ],
)
def test_chunked_loss_equals_the_plain_one(monkeypatch, changes):
    config = dataclasses.replace(SMALL, **changes)
    three_tokens = 4 * 2 * config.vocab_size * 3
    monkeypatch.setattr(losses, "CHUNK_BYTES", (three_tokens, three_tokens))
    model, inputs = build(config), batch(SMALL)
    assert losses.chunk_length(2, 7, config.vocab_size) == 3
    graph, params = nnx.split(model)

    def value_and_gradients(loss):
        return jax.jit(jax.value_and_grad(lambda p: loss(nnx.merge(graph, p))))(params)

    chunked = value_and_gradients(lambda m: next_token_loss(m, inputs, z_loss=0.1)[0])
    plain = value_and_gradients(lambda m: plain_loss(m, inputs, 0.1))
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(plain), strict=True):
        assert np.abs(a - b).max() <= SAME_MODEL * max(np.abs(b).max(), 1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_loss_by_hand(devices):
    """Every token has the probabilities 1/2, 1/4, 1/4, and a logsumexp of 3."""
    probability, z_loss = np.array([0.5, 0.25, 0.25]), 0.1
    bias = jnp.asarray(np.log(probability) + 3.0, jnp.float32)
    zeros = np.zeros((8, 2), np.int32)
    inputs = {"tokens": zeros, "positions": zeros}
    inputs["segment_ids"] = np.array([[1, 1]] * 7 + [[1, 0]], np.int32)  # 15 targets
    inputs["targets"] = np.array([[0, 1]] * 7 + [[2, 2]], np.int32)  # 7, 7 and 1 of each

    @jax.value_and_grad
    def loss(bias):
        model: Any = SimpleNamespace(
            config=SimpleNamespace(vocab_size=3),
            hidden=lambda *_, **__: jnp.zeros((8, 2, 4)),
            head_weights=lambda: (jnp.zeros((4, 3)), bias),
        )
        return next_token_loss(model, inputs, z_loss=z_loss)[0]

    with jax.set_mesh(make_mesh(MeshConfig(data=devices))):
        total, gradient = jax.jit(loss)(bias)
    np.testing.assert_allclose(total, (7 + 2 * 8) * np.log(2) + 15 * z_loss * 9, rtol=1e-6)
    expected = 15 * probability * (1 + 2 * z_loss * 3) - [7, 7, 1]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_chunks_of_the_loss():
    """A 16th of the tokens, unless that is little or much; equal ones."""
    million = 2**20
    assert losses.chunk_length(2, 7, 37) == 7
    assert losses.chunk_length(1, 16 * million, 17) == million
    assert losses.chunk_length(8, 4096, 100_278) == 164  # 25 chunks of at most 512 MiB
    assert losses.chunk_length(2, 2048, 50_000) == 158


def test_loss_without_targets_is_zero():
    inputs = batch(SMALL) | {"segment_ids": jnp.zeros((2, 7), jnp.int32)}
    loss = nnx.value_and_grad(lambda m: next_token_loss(m, inputs, z_loss=1e-4)[0])
    value, grads = loss(build(SMALL))
    assert value == 0.0
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


@pytest.fixture(scope="module")
def one_layer():
    return build(dataclasses.replace(SMALL, num_layers=1))


@pytest.mark.parametrize("bad", [-1, 37, 2**32])
def test_ids_outside_the_vocabulary(one_layer, bad):
    """An error where they are known, else NaN; in padding they do not matter."""
    inputs = batch(SMALL)
    tokens = np.asarray(inputs["tokens"], np.int64)
    real, padding = tokens.copy(), tokens.copy()
    real[1, 2] = padding[0, 5] = bad
    with pytest.raises(ValueError, match=f"^tokens: expected values in 0 … 36, got {bad}$"):
        one_layer(real)
    run = nnx.jit(lambda m, x: m(x, segment_ids=inputs["segment_ids"]))
    if bad != 2**32:  # jit itself cuts it
        logits = run(one_layer, real.astype(np.int32))
        assert jnp.isnan(logits[1, 2:]).all()
        assert jnp.isfinite(logits[0]).all()
    segments = np.asarray(inputs["segment_ids"], np.int64)
    got = one_layer(padding, segment_ids=segments)
    assert jnp.abs(got - run(one_layer, tokens))[segments != 0].max() <= SAME_MODEL


def test_other_integers_of_a_model_are_checked(one_layer):
    tokens, wide = jnp.zeros((1, 3), jnp.int32), np.full((1, 3), 2**32)
    for name in ("segment_ids", "positions"):
        with pytest.raises(ValueError, match=f"^{name}: expected values in .*, got 4294967296$"):
            one_layer(tokens, **{name: wide})


def test_a_target_of_minus_100_does_not_count(one_layer):
    inputs = batch(SMALL)
    some = inputs["targets"].at[1, 2:].set(losses.NO_TARGET)
    loss = nnx.jit(nnx.value_and_grad(lambda m, x: next_token_loss(m, x, z_loss=0.1), has_aux=True))
    segments = inputs["segment_ids"].at[1, 2:].set(0)  # at the end of a row it is the same
    got, expected = (
        loss(one_layer, inputs | change)
        for change in ({"targets": some}, {"segment_ids": segments})
    )
    assert got[0][1]["targets"] == 6
    chex.assert_trees_all_close(got, expected, rtol=SAME_MODEL, atol=1e-6)


@pytest.mark.parametrize("bad", [-1, 37])
def test_targets_outside_the_vocabulary(one_layer, bad):
    inputs = batch(SMALL)
    inputs["targets"] = inputs["targets"].at[0, 6].set(bad)  # padding
    run = nnx.jit(lambda m, x: next_token_loss(m, x, z_loss=0.0)[0])
    assert jnp.isfinite(run(one_layer, inputs))
    inputs["targets"] = inputs["targets"].at[1, 2].set(bad)
    assert jnp.isnan(run(one_layer, inputs))
    with pytest.raises(ValueError, match=f"^targets: expected values in 0 … 36, got {bad}$"):
        next_token_loss(one_layer, inputs, z_loss=0.0)


def test_loss_never_holds_all_logits():
    """At V = 50k, the temporaries stay far below one [B, T, V] float32 array."""
    config = dataclasses.replace(SMALL, vocab_size=50_000)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    arrays = {n: jax.ShapeDtypeStruct((2, 8192), jnp.int32) for n in batch(SMALL)}

    def loss(state, inputs):
        return next_token_loss(nnx.merge(graph, state), inputs, z_loss=0.0)[0]

    compiled = jax.jit(jax.grad(loss)).lower(state, arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * (2 * 8192 * 50_000 * 4)
