"""The optimizer step: normalisation, accumulation, compile count, and the same losses on a mesh."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import hlo_cost
from moda_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, ResidualConfig
from moda_jax.ops.sharding import batch_sharding, make_mesh
from moda_jax.train import losses, train_step
from moda_jax.train.losses import next_token_loss
from moda_jax.train.train_step import compiler_options, make_train_functions
from tests.compiled_once import compiled_once  # noqa: F401  (a fixture)
from tests.models import FLOAT32
from tests.tolerances import REORDERED_STEPS

CONFIG = Config(
    name="step",
    model=ModelConfig(
        vocab_size=64,
        num_layers=2,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
    ),
    execution=FLOAT32,
    # The default z-loss, 1e-5, would not show in the gradient's norm.
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, z_loss=1e-2),
    steps=8,
    batch_size=8,
)
ROWS, SEQ_LEN = 8, 12


def make_batch(seed: int, *, row_lengths=None) -> dict[str, np.ndarray]:
    """Random tokens; row r has `row_lengths[r]` tokens and padding after them."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(row_lengths if row_lengths is not None else [SEQ_LEN] * ROWS)
    real = (np.arange(SEQ_LEN) < lengths[:, None]).astype(np.int32)
    return {
        "tokens": rng.integers(0, 64, (ROWS, SEQ_LEN), np.int32) * real,
        "targets": rng.integers(0, 64, (ROWS, SEQ_LEN), np.int32) * real,
        "segment_ids": real,
        "positions": np.arange(SEQ_LEN, dtype=np.int32) * real,
    }


def run_steps(config, *, steps=4, row_lengths=None):
    """Losses, grad norms, the final state and the functions of a few steps under config.mesh."""
    mesh = make_mesh(config.mesh)
    functions = make_train_functions(config, mesh)
    history = []
    with jax.set_mesh(mesh):
        state = functions.init()
        for seed in range(steps):
            batch = make_batch(seed, row_lengths=row_lengths)
            batch = jax.device_put(batch, batch_sharding(mesh))
            state, metrics = functions.train_step(state, batch)
            history.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(history), state, functions


@pytest.fixture(scope="module")
def single_device():
    return run_steps(CONFIG)


def test_xla_knows_the_options_of_a_step():
    hopper: Any = SimpleNamespace(compute_capability="9.0")
    options = compiler_options(hopper)
    assert options
    assert compiler_options(jax.devices("cpu")[0]) is None
    compiled = jax.jit(lambda x: x + 1, compiler_options=options).lower(1.0).compile()
    assert compiled(1.0) == 2


def test_loss_and_gradient_are_means_over_the_targets():
    lengths = [12, 0, 3, 1, 0, 7, 12, 5]
    history, _, functions = run_steps(CONFIG, steps=1, row_lengths=lengths)
    params = functions.init().params
    batch = make_batch(0, row_lengths=lengths)

    @jax.jit
    def loss_and_norm(params):
        def mean_loss(params, z_loss):
            model = nnx.merge(functions.graphdef, params)
            return next_token_loss(model, batch, z_loss=z_loss)[0] / sum(lengths)

        gradients = jax.grad(mean_loss)(params, CONFIG.optimizer.z_loss)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
        return mean_loss(params, 0.0), norm

    np.testing.assert_allclose(history[0], loss_and_norm(params), rtol=1e-5)


def test_accumulation_is_the_whole_batch():
    lengths = [12, 0, 3, 1, 0, 7, 12, 5]  # a mean of the parts' means would differ
    whole, _, _ = run_steps(CONFIG, row_lengths=lengths)
    config = dataclasses.replace(CONFIG, accumulation_steps=4)
    np.testing.assert_allclose(
        run_steps(config, row_lengths=lengths)[0], whole, rtol=REORDERED_STEPS
    )


def test_step_without_targets_has_loss_zero_and_no_gradient():
    history, state, _ = run_steps(CONFIG, steps=1, row_lengths=[0] * ROWS)
    np.testing.assert_array_equal(history, [[0.0, 0.0]])
    chex.assert_tree_all_finite(state.params)
    chex.assert_tree_all_finite(state.optimizer)


@pytest.fixture
def traced_once(monkeypatch):
    """The steps of the functions that are made in the test may be traced once each."""
    chex.clear_trace_counter()
    for name in ("_train_step", "_eval_step"):
        once = chex.assert_max_traces(getattr(train_step, name), n=1)
        monkeypatch.setattr(train_step, name, once)


@pytest.mark.usefixtures("traced_once")
def test_metrics_follow_the_schedule_and_steps_are_traced_once():
    mesh = make_mesh(MeshConfig())
    functions = make_train_functions(CONFIG, mesh)
    rates = []
    with jax.set_mesh(mesh):
        state = functions.init()
        for seed in range(4):
            donated = state
            batch = jax.device_put(make_batch(seed), batch_sharding(mesh))
            state, metrics = functions.train_step(state, batch)
            rates.append(float(metrics["learning_rate"]))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated.params))
            functions.eval_step(state.params, batch)
    assert int(state.step) == 4
    assert float(metrics["targets"]) == ROWS * SEQ_LEN
    np.testing.assert_allclose(rates[:2], [5e-3, 1e-2], rtol=1e-6)
    assert rates[3] < rates[2] < rates[1]


def test_eval_sums_are_the_training_loss(single_device):
    history, _, functions = single_device
    sums = functions.eval_step(functions.init().params, make_batch(0))
    assert float(sums["targets"]) == ROWS * SEQ_LEN
    np.testing.assert_allclose(sums["cross_entropy"] / sums["targets"], history[0, 0], rtol=1e-6)


MESHES = {
    "data=8": MeshConfig(data=8),
    "fsdp=8": MeshConfig(fsdp=8),
    "tensor=2 fsdp=4": MeshConfig(fsdp=4, tensor=2),
}


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    "mesh_name",
    [pytest.param(name, marks=pytest.mark.slow if name.endswith("=8") else []) for name in MESHES],
)
def test_mesh_gives_the_losses_of_one_device(mesh_name, single_device):
    config = dataclasses.replace(CONFIG, mesh=MESHES[mesh_name])
    history, state, _ = run_steps(config)
    np.testing.assert_allclose(history, single_device[0], rtol=REORDERED_STEPS)
    check_shards(state, config.mesh)


def check_shards(state, mesh: MeshConfig) -> None:
    """Every device keeps its share of the parameters and of Adam's moments, and no more."""
    parts = {
        "embed": mesh.fsdp,
        "mlp": mesh.tensor,
        "heads": mesh.tensor,
        "kv_heads": mesh.tensor,
        "vocab": mesh.tensor,
    }
    adam = next(s for s in jax.tree.leaves(state.optimizer, is_leaf=_is_adam) if _is_adam(s))
    for tree in (state.params, adam.mu, adam.nu):
        for param in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
            array, axes = param.get_value(), param.get_metadata()["logical_axes"]
            split = [parts.get(axis, 1) for axis in axes]
            expected = tuple(
                n // p if n % p == 0 else n for n, p in zip(array.shape, split, strict=True)
            )
            shards = array.addressable_shards
            assert {shard.data.shape for shard in shards} == {expected}, axes
            assert len({shard.device for shard in shards}) == mesh.data * mesh.fsdp * mesh.tensor


def _is_adam(node) -> bool:
    return hasattr(node, "mu")


def test_initial_state_does_not_depend_on_the_mesh():
    states = []
    for mesh_config in (MeshConfig(), MeshConfig(fsdp=4, tensor=2)):
        config = dataclasses.replace(CONFIG, mesh=mesh_config)
        mesh = make_mesh(mesh_config)
        with jax.set_mesh(mesh):
            states.append(make_train_functions(config, mesh).init())
    chex.assert_trees_all_equal(*jax.device_get(states))


def test_the_heads_gradient_crosses_the_links_once(monkeypatch):
    """However many chunks of logits there are; left to the compiler it was once per chunk."""
    model = dataclasses.replace(CONFIG.model, num_layers=1, depth=ResidualConfig())
    config = dataclasses.replace(CONFIG, model=model, mesh=MeshConfig(fsdp=8))
    mesh = make_mesh(config.mesh)
    batch = jax.eval_shape(lambda: make_batch(0))

    def collective_bytes(chunk_tokens):
        vocab = CONFIG.model.vocab_size
        monkeypatch.setattr(losses, "CHUNK_BYTES", (chunk_tokens * 4 * vocab,) * 2)
        functions = make_train_functions(config, mesh)
        with jax.set_mesh(mesh):
            assert losses.chunk_length(ROWS, SEQ_LEN, vocab) == chunk_tokens
            step: Any = functions.train_step
            compiled = step.lower(functions.abstract_state, batch).compile()
        return hlo_cost.count(compiled.as_text()).collective_bytes

    head = 4 * CONFIG.model.vocab_size * CONFIG.model.embed_dim
    assert collective_bytes(1) < collective_bytes(SEQ_LEN) + head


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(single_device):
    """And it takes no memory beside the state: that is worked on in place."""
    _, _, functions = single_device
    with jax.set_mesh(make_mesh(MeshConfig())):
        good, _ = functions.train_step(functions.init(), make_batch(0))
        poisoned = jax.tree.map(jnp.copy, good)
        leaf = jax.tree.leaves(poisoned.params)[0]
        poisoned = jax.tree.map(lambda x: x.at[0].set(jnp.nan) if x.shape == leaf.shape else x,
                                poisoned)  # fmt: skip
        assert functions.is_finite(good)
        assert not functions.is_finite(poisoned)
        before = jax.tree.map(np.array, poisoned)
        after, metrics = functions.train_step(poisoned, make_batch(1))
        assert float(metrics["skipped_steps"]) == 1
        after, metrics = functions.train_step(after, make_batch(2))
    assert np.isnan(metrics["loss"])
    assert float(metrics["skipped_steps"]) == 2
    assert int(after.step) == 3
    chex.assert_trees_all_equal(after.params, before.params)
    adam = next(s for s in jax.tree.leaves(after.optimizer, is_leaf=_is_adam) if _is_adam(s))
    old = next(s for s in jax.tree.leaves(before.optimizer, is_leaf=_is_adam) if _is_adam(s))
    chex.assert_trees_all_equal(adam, old)
