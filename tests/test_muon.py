"""Muon on stacked matrices against rounds of Newton and Schulz by hand, layer by layer."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from optax import contrib

from moda_jax.config import DenseConfig, MeshConfig, MHCConfig, MoDAConfig, OptimizerConfig
from moda_jax.model.transformer import Transformer
from moda_jax.ops.sharding import make_mesh, state_shardings
from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.optimizer import make_optimizer, matrix_axes, num_updates
from moda_jax.train.train_step import make_train_functions
from moda_jax.train.trainer import train
from tests.models import SMALL, random_model
from tests.runs import (  # noqa: F401  (two are fixtures)
    History,
    config_fixture,
    corpus_fixture,
    final_state,
    renamed,
)
from tests.test_train_step import CONFIG as STEP
from tests.test_train_step import run_steps
from tests.tolerances import NEWTON_SCHULZ, REORDERED_STEPS

CONFIG = OptimizerConfig(
    name="muon", learning_rate=0.1, warmup_steps=1, clip_norm=1e9, weight_decay=0.5
)
ROW_5 = dataclasses.replace(SMALL, use_bias=True, depth=MoDAConfig(attention_kv="project"))
MUON_STEP = dataclasses.replace(
    STEP,
    optimizer=dataclasses.replace(STEP.optimizer, name="muon"),
    model=dataclasses.replace(STEP.model, num_layers=1),
)


def named(tree):
    """Leaves by dotted name."""
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(tree))
    return {".".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in flat}


def newton_schulz(matrix):
    """Five rounds of the quintic on one matrix, in float64 (Jordan et al., 2024)."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon_by_hand(gradients, beta):
    """The update of one matrix [R, C] after `gradients`, without decay and learning rate."""
    m = np.zeros_like(gradients[0])
    for t, g in enumerate(gradients, start=1):
        m = beta * m + (1 - beta) * g
        ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    return 0.2 * max(m.shape) ** 0.5 * newton_schulz(ahead)


def matrices_of_row_5():
    """By name: the shape of each layer's matrix, rows and columns as the docstring says."""
    width, heads, kv_heads, mlp = 24, 4 * 6, 2 * 6, 40
    shapes = {
        "layers.query": (width, heads),
        "layers.key_value.key": (width, kv_heads),
        "layers.key_value.value": (width, kv_heads),
        "layers.out": (heads, width),
        "layers.mlp.gate": (width, mlp),
        "layers.mlp.up": (width, mlp),
        "layers.mlp.down": (mlp, width),
    }
    for writer in ("attention_kv", "ffn_kv"):
        for part in ("key", "value"):
            shapes[f"depth.{writer}.{part}"] = (width, kv_heads)
    return {f"{name}.kernel": shape for name, shape in shapes.items()}


def run_both(config, steps=3):
    """(updates, parameters before, gradients by step) of the last step, by name."""
    params = nnx.state(random_model(ROW_5))
    optimizer, _ = make_optimizer(config, steps=1000)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    rng = np.random.default_rng(0)
    gradients = []
    for _ in range(steps):
        gradient = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        gradients.append(named(gradient))
        updates, state = update(gradient, state, params, is_good=True)
    return named(updates), named(params), gradients


@pytest.fixture(scope="module")
def updated():
    return run_both(CONFIG)


def test_every_layers_matrix_is_orthogonalized_by_itself(updated):
    updates, params, gradients = updated
    matrices = matrices_of_row_5()
    assert matrices.keys() < updates.keys()
    for name, shape in matrices.items():
        rate = 0.1  # the peak; the cosine of 1000 steps has hardly begun
        for layer in range(len(params[name])):
            by_step = [g[name][layer].reshape(shape).astype(np.float64) for g in gradients]
            expected = muon_by_hand(by_step, 0.95) + 0.5 * params[name][layer].reshape(shape)
            got = updates[name][layer].reshape(shape) / -rate
            error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
            assert error < NEWTON_SCHULZ, (name, layer, error)


def test_all_else_is_adamws(updated):
    adamw, *_ = run_both(dataclasses.replace(CONFIG, name="adamw"))
    updates, *_ = updated
    for name in updates.keys() - matrices_of_row_5().keys():
        np.testing.assert_allclose(updates[name], adamw[name], rtol=1e-5, atol=1e-8, err_msg=name)
    for name in ("embedding", "head.kernel", "layers.attention_norm.scale", "layers.out.bias"):
        assert name in updates.keys() - matrices_of_row_5().keys()


def test_entries_of_an_update_are_as_large_as_adamws(updated):
    updates, _, _ = run_both(dataclasses.replace(CONFIG, weight_decay=0.0))
    for name in matrices_of_row_5():
        size = np.sqrt(np.mean(np.square(updates[name]))) / 0.1
        # Singular values end between 0.7 and 1.2, not at 1.
        assert 0.13 < size < 0.25, (name, size)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("layers", "embed", "heads", "head_dim"), ((1,), (2, 3))),
        (("layers", "heads", "head_dim", "embed"), ((1, 2), (3,))),
        (("layers", "mlp", "embed"), ((1,), (2,))),
        (("layers", "embed", None), ((1,), (2,))),
        (("vocab", "embed"), None),
        (("embed", "vocab"), None),
        (("layers", "embed"), None),
        (("layers", "heads", "head_dim"), None),
        (("layers", None, None, None), None),
        ((None,), None),
    ],
)
def test_rows_and_columns(axes, expected):
    assert matrix_axes(axes) == (expected and contrib.MuonDimensionNumbers(*expected))


@pytest.mark.parametrize(
    ("depth", "matrices"), [(DenseConfig(form="matrix"), {"depth.weights"}), (MHCConfig(), set())]
)
def test_matrices_of_other_mechanisms(depth, matrices):
    config = dataclasses.replace(SMALL, depth=depth)
    params = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    found = {
        ".".join(map(str, path))
        for path, parameter in nnx.to_flat_state(params)
        if matrix_axes(parameter.get_metadata()["logical_axes"]) is not None
    }
    assert {name for name in found if not name.startswith("layers.")} == matrices
    assert len(found - matrices) == 7


def test_good_steps_are_optaxs_and_a_bad_one_changes_no_moment():
    config = dataclasses.replace(CONFIG, clip_norm=0.5, weight_decay=0.0)
    ours, schedule = make_optimizer(config, steps=50)
    params = nnx.state(random_model(SMALL))
    axes = jax.tree.map(
        lambda p: jax.tree.map(lambda _: matrix_axes(p.get_metadata()["logical_axes"]), p),
        params, is_leaf=lambda node: isinstance(node, nnx.Variable),
    )  # fmt: skip
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        contrib.muon(
            schedule, beta=0.95, eps=config.eps, consistent_rms=0.2,
            muon_weight_dimension_numbers=axes,
        ),
    )  # fmt: skip
    state, their_state = ours.init(params), theirs.init(params)
    update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
    rng = np.random.default_rng(1)
    for _ in range(2):
        gradients = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        expected, their_state = their_update(gradients, their_state, params)
        updated, after = update(gradients, state, params, is_good=True)
        for name, ours_there in named(updated).items():
            if name.startswith("layers.") and name.endswith("kernel"):
                difference = np.linalg.norm(ours_there - named(expected)[name])
                error = difference / np.linalg.norm(ours_there)
                assert error < NEWTON_SCHULZ, (name, error)
        bad = jax.tree.map(lambda g: g * np.nan, gradients)
        _, skipped = update(bad, state, params, is_good=False)
        chex.assert_trees_all_equal(skipped[1][0], state[1][0])
        assert int(num_updates(after)) == int(num_updates(skipped)) + 1
        state = after


def test_parameters_without_axes_are_an_error():
    optimizer, _ = make_optimizer(CONFIG, steps=4)
    with pytest.raises(ValueError, match="params: expected parameters with logical_axes, got"):
        optimizer.init({"embedding": jnp.ones((2, 3))})


def test_a_sharded_update_is_the_update_of_one_device():
    """Layers' matrices are split over fsdp and tensor; each is orthogonalized as a whole."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = nnx.state(random_model(ROW_5))
    optimizer, _ = make_optimizer(CONFIG, steps=1000)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    state = optimizer.init(params)
    expected, _ = jax.jit(optimizer.update)(gradients, state, params)
    split = state_shardings((gradients, state, params), mesh)
    placed = jax.device_put(
        (gradients, state, params), jax.tree.broadcast(split, (gradients, state, params))
    )
    update = jax.jit(optimizer.update, in_shardings=split, out_shardings=split[:2])
    updates, after = update(*placed)
    kernel = after[1][0].inner_states["muon"].inner_state.mu["layers"]["mlp"]["up"]["kernel"]
    assert kernel.get_value().sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    for name, update in named(updates).items():
        error = np.linalg.norm(update - named(expected)[name])
        assert error <= NEWTON_SCHULZ * np.linalg.norm(update), name


def test_moments_go_through_a_checkpoint_and_are_no_other_optimizers(tmp_path):
    functions = make_train_functions(MUON_STEP, make_mesh(MeshConfig()))
    state = functions.init()
    leaves, tree = jax.tree.flatten(state)
    state = jax.tree.unflatten(tree, [x + n for n, x in enumerate(leaves, start=1)])
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, state, data={}, config=MUON_STEP, validation_loss=None)
    restored = checkpoints.restore(functions.abstract_state, MUON_STEP)
    chex.assert_trees_all_equal(*jax.device_get((restored.state, state)))
    expected = "expected optimizer.name 'muon', with which the checkpoint was trained, got 'adamw'"
    adamw = dataclasses.replace(MUON_STEP, optimizer=STEP.optimizer)
    with pytest.raises(ValueError, match=expected) as caught:
        checkpoints.restore(functions.abstract_state, adamw)
    assert "\n" not in str(caught.value)
    checkpoints.close()


@pytest.mark.slow
def test_steps_on_a_mesh_are_those_of_one_device():
    one, _, _ = run_steps(MUON_STEP)
    config = dataclasses.replace(MUON_STEP, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    sharded, state, _ = run_steps(config)
    np.testing.assert_allclose(sharded, one, rtol=REORDERED_STEPS)
    assert int(num_updates(state.optimizer)) == 4


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_is_bitwise_the_uninterrupted_one(config):
    optimizer = dataclasses.replace(
        config.optimizer, name="muon", schedule="wsd", decay_fraction=0.5
    )
    config = dataclasses.replace(config, optimizer=optimizer)
    whole = renamed(config, "whole")
    uninterrupted, first, second = History(), History(stop_at=2), History()
    assert train(whole, on_step=uninterrupted).finished
    assert not train(config, on_step=first).finished
    assert train(config, on_step=second).finished
    assert first.steps | second.steps == uninterrupted.steps
    chex.assert_trees_all_equal(final_state(config), final_state(whole))
