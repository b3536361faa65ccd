"""Checkpoints: exact round trip, what is kept, half-written ones, another model's."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import chex
import jax
import numpy as np
import pytest

from moda_jax import load_trained
from moda_jax.config import Config, MeshConfig, MoDAConfig, ModelConfig, ResidualConfig, to_json
from moda_jax.ops.sharding import make_mesh
from moda_jax.train import checkpoint
from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.train_step import make_train_functions
from tests.models import FLOAT32

CONFIG = Config(
    name="saved",
    model=ModelConfig(
        vocab_size=64,
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=16,
    ),
    execution=FLOAT32,
)
DATA = {"identity": {"seq_len": 256, "tokenizer": "bytes"}, "grain": {"position": 7}}


@pytest.fixture(scope="module")
def functions():
    return make_train_functions(CONFIG, make_mesh(MeshConfig()))


@pytest.fixture(scope="module")
def state(functions):
    """Every array has other entries, and none is 0, as Adam's moments are at the start."""
    leaves, tree = jax.tree.flatten(functions.init())
    return jax.tree.unflatten(tree, [x + n for n, x in enumerate(leaves, start=1)])


def save(checkpoints, step, state, validation_loss=None):
    checkpoints.save(step, state, data=DATA, config=CONFIG, validation_loss=validation_loss)


def test_no_checkpoint(tmp_path, functions):
    checkpoints = Checkpoints(tmp_path / "c", keep_last=1)
    assert checkpoints.restore(functions.abstract_state, CONFIG) is None
    assert checkpoints.best_loss() == float("inf")
    checkpoints.close()


def test_round_trip_is_bitwise_and_onto_another_mesh(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 3, state)
    checkpoints.close()
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=4, tensor=2))
    abstract = make_train_functions(config, make_mesh(config.mesh)).abstract_state
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    restored = checkpoints.restore(abstract, config)
    checkpoints.close()
    chex.assert_trees_all_equal(*jax.device_get((restored.state, state)))
    for array, target in zip(*map(jax.tree.leaves, (restored.state, abstract)), strict=True):
        assert array.sharding.is_equivalent_to(target.sharding, array.ndim)
    assert restored.data == [DATA]
    assert restored.config["model"] == to_json(CONFIG.model)


def test_keeps_the_newest_and_the_best(tmp_path, state):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep_last=2)
    for step, loss in [(1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)]:
        save(checkpoints, step, state, loss)
    checkpoints.close()
    checkpoints = Checkpoints(folder, keep_last=2)
    assert checkpoints.steps == [2, 4, 5]
    assert checkpoints.latest_step == 5
    assert checkpoints.best_loss() == 1.0
    checkpoints.close()
    assert load_trained(tmp_path, step="best").step == 2


def test_not_a_number_is_never_the_best(tmp_path, state):
    """Earlier versions saved it."""
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step, loss in [(1, 2.0), (2, float("nan")), (3, None)]:
        save(checkpoints, step, state, loss)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    assert checkpoints.steps == [1, 3]
    assert checkpoints.best_loss() == 2.0
    checkpoints.close()


def test_saved_state_may_be_donated_at_once(tmp_path, functions):
    state = functions.init()
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1, state)
    overwrite(state)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    restored = checkpoints.restore(functions.abstract_state, CONFIG)
    checkpoints.close()
    chex.assert_trees_all_equal(restored.state, expected)


def test_another_model_is_one_line_that_names_the_fields(tmp_path, functions, state):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1, state)
    model = dataclasses.replace(
        CONFIG.model, num_layers=3, norm_placement="pre", depth=ResidualConfig()
    )
    execution = dataclasses.replace(FLOAT32, remat="save_products", slot_gradients="add")
    other = dataclasses.replace(CONFIG, model=model, execution=execution)
    with pytest.raises(ValueError, match="checkpoint of another model") as caught:
        checkpoints.restore(functions.abstract_state, other)
    checkpoints.close()
    message = str(caught.value)
    assert "model.num_layers 2 there, 3 here" in message
    assert "model.norm_placement 'reordered' there, 'pre' here" in message
    assert "model.depth.name 'moda' there, 'residual' here" in message
    for name in ("remat", "slot_gradients"):  # the same function, computed in another way
        assert name not in message
    assert "--name" in message
    assert "\n" not in message


def test_a_checkpoint_older_than_a_setting_has_its_default(tmp_path, functions, state, monkeypatch):
    older = to_json(CONFIG)
    del older["model"]["depth"]["window"]
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "to_json", lambda _: older)
        save(checkpoints, 1, state)
    assert checkpoints.restore(functions.abstract_state, CONFIG) is not None
    model = dataclasses.replace(CONFIG.model, depth=MoDAConfig(window=1))
    bounded = dataclasses.replace(CONFIG, model=model)
    with pytest.raises(ValueError, match="model.depth.window None there, 1 here"):
        checkpoints.restore(functions.abstract_state, bounded)
    checkpoints.close()


def test_a_checkpoint_of_an_older_version_says_so(tmp_path, functions, state, monkeypatch):
    """Mechanisms had no settings of their own then."""
    older = to_json(CONFIG)
    older["model"] |= {"depth_stream": "moda", "depth_window": None}
    del older["model"]["depth"]
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "to_json", lambda _: older)
        save(checkpoints, 1, state)
    message = "model.depth: expected .*got None; a checkpoint of an older version cannot be loaded"
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(functions.abstract_state, CONFIG)
    checkpoints.close()
    with pytest.raises(ValueError, match=message):
        load_trained(tmp_path)


def test_a_run_may_go_on_with_another_execution(tmp_path, functions, state):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1, state)
    execution = dataclasses.replace(FLOAT32, compute_dtype="bfloat16", remat="save_attention")
    other = dataclasses.replace(CONFIG, execution=execution)
    restored = checkpoints.restore(functions.abstract_state, other)
    checkpoints.close()
    chex.assert_trees_all_equal(restored.state, state)


def test_data_of_all_processes_comes_back(tmp_path, functions, state, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    monkeypatch.setattr("moda_jax.train.checkpoint.gather_json", lambda local: [local, local])
    save(checkpoints, 1, state)
    assert checkpoints.restore(functions.abstract_state, CONFIG).data == [DATA, DATA]
    checkpoints.close()


def test_half_written_checkpoint_is_not_seen(tmp_path, functions, state):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1, state)
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    assert checkpoints.latest_step == 1
    save(checkpoints, 2, state)  # and does not stand in the way
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    assert checkpoints.restore(functions.abstract_state, CONFIG).config["name"] == "saved"
    checkpoints.close()


KILLED_WHILE_SAVING = """
    import os, pathlib, sys
    from tests.test_checkpoint import CONFIG, DATA
    from moda_jax.train.checkpoint import Checkpoints
    from moda_jax.config import MeshConfig
    from moda_jax.ops.sharding import make_mesh
    from moda_jax.train.train_step import make_train_functions

    state = make_train_functions(CONFIG, make_mesh(MeshConfig())).init()
    checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep_last=3)
    options = dict(data=DATA, config=CONFIG, validation_loss=None)
    checkpoints.save(1, state, **options)
    checkpoints._manager.wait_until_finished()
    checkpoints.save(2, state, **options)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_killed_while_saving(tmp_path, functions):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script = textwrap.dedent(KILLED_WHILE_SAVING)
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, cwd=root, check=False).returncode == -9
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    assert checkpoints.latest_step in (1, 2)  # 2 if its background writing was quicker
    assert checkpoints.restore(functions.abstract_state, CONFIG) is not None
    checkpoints.close()
