"""What the scanned stack must satisfy with every way of using depth, one row a mechanism."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax.config import (
    AttentionResidualsConfig,
    Config,
    DenseConfig,
    DepthAttentionConfig,
    ExecutionConfig,
    HyperConnectionsConfig,
    MeshConfig,
    MHCConfig,
    MoDAConfig,
    ModelConfig,
    OptimizerConfig,
    ResidualConfig,
)
from moda_jax.model import generation, reference
from moda_jax.model.flops import count_parameters
from moda_jax.model.transformer import Transformer
from moda_jax.ops.sharding import batch_sharding, make_mesh
from moda_jax.train.train_step import make_train_functions
from tests.models import FLOAT32, random_model
from tests.tolerances import MECHANISM, MECHANISM_STEPS, SAME_MODEL, SINGLE_SUM

CASES = {
    "residual": ResidualConfig(),
    "dense-scalar": DenseConfig("scalar"),
    "dense-matrix": DenseConfig("matrix"),
    "depth-attention": DepthAttentionConfig(),
    "moda-row3": MoDAConfig(ffn_kv="none"),
    "moda-row4": MoDAConfig(),
    "moda-row5": MoDAConfig(attention_kv="project"),
    "moda-row5-without-ffn": MoDAConfig(attention_kv="project", ffn_kv="none"),
    "moda-every2": MoDAConfig(write_every=2),
    "moda-bounded": MoDAConfig(window=1, reserved=1),
    "moda-score-bias": MoDAConfig(score_bias=-0.5),
    "attention-residuals": AttentionResidualsConfig(),
    "attention-residuals-block": AttentionResidualsConfig("block", num_blocks=3),
    "hyper-connections": HyperConnectionsConfig(num_streams=3),
    "mhc": MHCConfig(num_streams=3, sinkhorn_rounds=2),
}

TINY = ModelConfig(
    vocab_size=17,
    num_layers=3,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=20,
    norm_eps=1e-3,  # large, and the angles differ within 7 tokens: both must show
    rope_theta=50.0,
)
BY_PLACEMENT = {
    "pre": {"qk_norm": "head", "use_bias": True},
    "post": {"qk_norm": "none"},
    "reordered": {"qk_norm": "full"},
}
"""What goes with a placement, so that every QK-norm and biases meet every mechanism."""

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]], np.int32)
PACKED = {"segment_ids": SEGMENTS, "positions": POSITIONS}
# No token twice: a row of the embedding's gradient is the gradient at one token.
TOKENS = np.random.default_rng(3).permutation(17)[:14].reshape(2, 7).astype(np.int32)


def make_config(name, placement="reordered", **changes):
    changes = BY_PLACEMENT[placement] | changes
    return dataclasses.replace(TINY, depth=CASES[name], norm_placement=placement, **changes)


def slow_unless(fast, *values, **kwargs):
    return pytest.param(*values, marks=[] if fast else pytest.mark.slow, **kwargs)


def parametrize_cases(*fast):
    """Over all cases; those not in `fast` are slow."""
    return pytest.mark.parametrize("name", [slow_unless(name in fast, name) for name in CASES])


@functools.lru_cache(maxsize=2)
def compiled(config, execution, *, packed):
    """Parameters, and a function (parameters, cotangent) -> (logits, gradients)."""
    graph, params = nnx.split(random_model(config, execution))
    info = PACKED if packed else {}

    @jax.jit
    def value_and_gradients(params, cotangent):
        logits, vjp = jax.vjp(lambda params: nnx.merge(graph, params)(TOKENS, **info), params)
        return logits, nnx.to_pure_dict(vjp(cotangent)[0])

    return params, value_and_gradients


def expected(config, params, cotangent, *, packed):
    """Logits and gradients of the reference, in float64."""
    info = PACKED if packed else {}
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), nnx.to_pure_dict(params))
        logits, vjp = jax.vjp(lambda p: reference.forward(config, p, TOKENS, **info), params)
        return jax.tree.map(np.asarray, (logits, vjp(cotangent.astype(np.float64))[0]))


def assert_close(got, wanted, tolerance):
    """Each array relative to its largest entry, one number `SINGLE_SUM` times as loosely."""

    def scale(x):
        return (np.abs(x).max(initial=0) or 1.0) * (SINGLE_SUM if x.size == 1 else 1)

    scales = jax.tree.map(scale, wanted)
    scaled = (jax.tree.map(lambda x, by: np.asarray(x) / by, t, scales) for t in (got, wanted))
    chex.assert_trees_all_close(*scaled, rtol=0, atol=tolerance)


def check_against_reference(config, execution=FLOAT32, packed=True):
    params, function = compiled(config, execution, packed=packed)
    real = SEGMENTS > 0 if packed else np.ones_like(SEGMENTS, bool)
    cotangent = np.random.default_rng(4).normal(size=(*TOKENS.shape, config.vocab_size))
    cotangent = np.where(real[..., None], cotangent, 0).astype(np.float32)
    logits, gradients = function(params, cotangent)
    wanted_logits, wanted_gradients = expected(config, params, cotangent, packed=packed)
    assert_close(logits[real], wanted_logits[real], MECHANISM)
    assert_close(gradients, wanted_gradients, MECHANISM)


# Of the fast ones, that stand for others: row 5 has all that row 3 and it without FFN have.
PARTS = ("moda-row3", "moda-row5-without-ffn")


def is_fast(name, placement):
    return name == "moda-row4" or (placement == "reordered" and name not in PARTS)


@pytest.fixture(
    scope="module",  # the tests of one config run one after the other and share what they compile
    params=[
        slow_unless(
            is_fast(name, placement), make_config(name, placement), id=f"{name}-{placement}"
        )
        for name, depth in CASES.items()
        for placement in depth.placements
        if placement == "reordered" or name not in PARTS
    ],
)
def config(request):
    return request.param


def test_values_and_gradients_are_the_references(config):
    check_against_reference(config)


def test_causality_and_documents_through_gradients(config):
    """The logits at a token depend on the tokens up to it of its document, and on nothing else."""
    params, function = compiled(config, FLOAT32, packed=True)
    row, t = np.indices(TOKENS.shape)
    for at in ((0, 2), (0, 3), (0, 5), (1, 4)):
        cotangent = np.zeros((*TOKENS.shape, config.vocab_size), np.float32)
        cotangent[at] = np.random.default_rng(5).normal(size=config.vocab_size)
        reach = np.abs(function(params, cotangent)[1]["embedding"]).sum(axis=-1)[TOKENS]
        document = (row == at[0]) & (SEGMENTS[at] == SEGMENTS)
        np.testing.assert_array_equal(reach > 0, document & (t <= at[1]))


# With 4 layers something begins anew or is left behind; others do what they do with 3.
PERIODIC = ("dense-matrix", "moda-every2", "moda-bounded", "attention-residuals-block")


@pytest.mark.parametrize(
    ("name", "num_layers"),
    [
        slow_unless(n == 1 and name in ("moda-row4", "attention-residuals-block"), name, n)
        for name in CASES
        for n in (1, 4)
        if n == 1 or name in PERIODIC
    ],
)
def test_depths(name, num_layers):
    check_against_reference(make_config(name, num_layers=num_layers))


@pytest.mark.parametrize(
    "name",
    [
        slow_unless(name in ("moda-row4", "depth-attention"), name)
        # Others than these do nothing with documents: all attend as residual does.
        for name in ("residual", "depth-attention", "moda-row4", "moda-row5", "moda-bounded")
    ],
)
def test_without_packing(name):
    check_against_reference(make_config(name), packed=False)


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        slow_unless(name in ("moda-row5", "depth-attention"), name, remat)
        for name, remat in zip(CASES, itertools.cycle(["save_attention", "save_products"]))
    ],
)
def test_remat_policies(name, remat):
    execution = dataclasses.replace(FLOAT32, remat=remat)
    check_against_reference(make_config(name), execution)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        slow_unless((n, block) == ("moda-row4", 1), n, block)
        for n in CASES
        # Neither bounded slots nor scores with a bias can be gathered.
        if n.startswith("moda") and CASES[n].window is None and CASES[n].score_bias is None
        for block in ((1, 2, "auto") if n == "moda-row4" else (2,))
    ],
)
def test_gathered_slot_gradients(name, block):
    """The other cases of this file add them: that is what XLA's attention does by itself.

    test_stack_gathering.py has more sizes of a block.
    """
    execution = dataclasses.replace(FLOAT32, slot_gradients="gather", slot_gradient_block=block)
    check_against_reference(make_config(name), execution)


@parametrize_cases(
    *("residual", "dense-scalar", "depth-attention", "moda-row4", "moda-bounded"),
    *("attention-residuals-block", "mhc"),
)
def test_decoding_is_the_full_forward_at_every_position(name):
    config = make_config(name)
    graph, params = nnx.split(random_model(config))
    wanted = reference.forward(config, nnx.to_pure_dict(params), TOKENS)
    chex.clear_trace_counter()

    @jax.jit
    def prefill(params, tokens, lengths):
        return generation.prefill(nnx.merge(graph, params), tokens, lengths, 12)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, cache, tokens):
        return generation.decode_step(nnx.merge(graph, params), cache, tokens)

    logits, cache = prefill(params, TOKENS[:, :5], jnp.array([1, 5]))  # prompts of unequal length
    rows, last = np.arange(2), TOKENS.shape[1] - 1
    for _ in range(last):
        length = np.asarray(cache.length)
        real = length <= last + 1  # the longer prompt's row ends before
        at = np.minimum(length - 1, last)
        assert_close(logits[real], wanted[rows, at][real], SAME_MODEL)
        logits, cache = step(params, cache, TOKENS[rows, np.minimum(length, last)])
    assert_close(logits[:1], wanted[:1, last], SAME_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_memory_grows_linearly_with_depth(name):
    """Apart from what grows with the parameters of matrix dense connections, D² L²/2."""
    smaller, larger = (gradient_temp_bytes(make_config(name, num_layers=n)) for n in (16, 32))
    assert larger <= 2.2 * smaller, (smaller, larger)


def gradient_temp_bytes(config):
    """Temporary bytes of the compiled gradient, by the compiler's own account."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), execution=FLOAT32))
    graph, params = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def loss(params, tokens, segment_ids):
        return jnp.sum(nnx.merge(graph, params)(tokens, segment_ids=segment_ids) ** 2)

    gradient = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile()
    return gradient.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("num_layers", "tied"), [(3, False), (1, True)])
@pytest.mark.parametrize("name", CASES)
def test_parameters_are_counted_by_formula(name, num_layers, tied):
    placement = CASES[name].placements[-1 if tied else 0]
    config = make_config(name, placement, num_layers=num_layers, tie_embeddings=tied)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))]
    assert count_parameters(config).total == sum(sizes)


@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_parameters_stay_strongly_typed_float32(name):
    """A weakly typed one would make the second step compile again, and hide a missing cast."""
    execution = dataclasses.replace(FLOAT32, compute_dtype="bfloat16")

    def gradient():
        model = Transformer(make_config(name), rngs=nnx.Rngs(0), execution=execution)
        graph, params = nnx.split(model)
        loss = lambda params: jnp.sum(nnx.merge(graph, params)(TOKENS, **PACKED))  # noqa: E731
        return params, jax.grad(loss)(params)

    for leaf in jax.tree.leaves(jax.eval_shape(gradient)):
        assert leaf.dtype == jnp.float32
        assert not leaf.weak_type


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [n for n in CASES if n not in (*PARTS, "moda-every2")],  # which has the arrays of row 4
)
def test_mesh_gives_the_losses_of_one_device(name):
    config = Config(
        name="mechanism",
        model=make_config(name, vocab_size=32),
        execution=ExecutionConfig(compute_dtype="float32"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        steps=3,
        batch_size=8,
    )
    single = losses(config)
    mesh = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(losses(mesh), single, rtol=MECHANISM_STEPS)
    assert single[-1] < single[0]


def losses(config):
    """Of three steps on one batch."""
    mesh = make_mesh(config.mesh)
    tokens, targets = np.random.default_rng(6).integers(0, 32, (2, 8, 7)).astype(np.int32)
    batch = {"tokens": tokens, "targets": targets}
    batch |= {name: np.tile(array, (4, 1)) for name, array in PACKED.items()}
    with jax.set_mesh(mesh):
        functions = make_train_functions(config, mesh)
        state, history = functions.init(), []
        batch = jax.device_put(batch, batch_sharding(mesh))
        for _ in range(3):
            state, metrics = functions.train_step(state, batch)
            history.append(float(metrics["loss"]))
    return history


@pytest.mark.parametrize(
    "name", [name for name, depth in CASES.items() if "post" not in depth.placements]
)
def test_placements_that_are_not_defined(name):
    with pytest.raises(ValueError, match=r"norm_placement: expected one of .*, got 'post'"):
        make_config(name, "post")
