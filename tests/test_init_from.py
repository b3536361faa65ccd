"""A new run that begins with another run's parameters (`Config.init_from`)."""

import dataclasses
import re
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from moda_jax.config import DenseConfig, MeshConfig
from moda_jax.ops.sharding import make_mesh
from moda_jax.train.init_from import load_initial_params
from moda_jax.train.train_step import make_train_functions
from moda_jax.train.trainer import train
from tests.compiled_once import compiled_once  # noqa: F401  (a fixture)
from tests.runs import (  # noqa: F401  (two are fixtures)
    config_fixture,
    corpus_fixture,
    final_state,
    make_config,
    make_small,
    renamed,
)


@pytest.fixture(scope="module", name="source")
def source_fixture(corpus, tmp_path_factory):
    """The config of a finished run with checkpoints of steps 1 and 2."""
    small = make_small(make_config(corpus, tmp_path_factory.mktemp("source")))
    source = dataclasses.replace(
        small, name="source", steps=2, checkpoint_every=1, eval_every=1000, seed=1
    )
    train(source)
    return source


def folder_of(config):
    return Path(config.output_dir, config.name)


def load(path, config, tokenizer="bytes"):
    target = make_train_functions(config, make_mesh(config.mesh)).abstract_state.params
    return load_initial_params(str(path), config.model, target, tokenizer=tokenizer)


def copy_of(source, tmp_path):
    return shutil.copytree(folder_of(source), tmp_path / "copy")


def test_a_new_run_begins_with_another_runs_parameters(
    source, config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "1000")
    there = copy_of(source, tmp_path)
    # A learning rate that moves no parameter shows those with which the run began.
    optimizer = dataclasses.replace(source.optimizer, learning_rate=1e-30, weight_decay=0.0)
    run = dataclasses.replace(
        source, name="new", output_dir=config.output_dir, optimizer=optimizer, init_from=str(there)
    )
    train(run)
    assert f"parameters of {there}, step 2" in capsys.readouterr().out
    state, _ = final_state(run)
    chex.assert_trees_all_close(state.params, final_state(source)[0].params, rtol=0, atol=1e-20)
    assert int(state.step) == 2

    shutil.rmtree(there)
    assert train(dataclasses.replace(run, steps=3, init_from="elsewhere")).step == 3
    out = capsys.readouterr().out
    assert "resumed at step 2" in out
    assert f"init_from {there} -> elsewhere: no effect: the run goes on from its own" in out


def test_only_the_optimizer_is_fresh(source):
    """And the state is the one that `init` would make around these parameters."""
    functions = make_train_functions(source, make_mesh(source.mesh))
    expected = functions.init()
    initial = load(folder_of(source), source)
    given = jax.tree.map(np.asarray, initial.params)
    state = functions.begin_with(initial.params)
    chex.assert_trees_all_equal(state.params, given)
    chex.assert_trees_all_equal(state.optimizer, expected.optimizer)
    assert int(state.step) == 0


def test_parameters_alone_are_read_into_the_shardings_of_the_run(source, tmp_path):
    there = copy_of(source, tmp_path)
    expected = load(folder_of(source) / "checkpoints" / "1", source).params
    for path in (there / "checkpoints" / "1" / "optimizer").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    sharded = dataclasses.replace(source, mesh=MeshConfig(fsdp=8))
    found = load(there / "checkpoints" / "1", sharded)
    assert found.source == f"parameters of {there}, step 1"
    chex.assert_trees_all_equal(found.params, expected)
    assert len(found.params["embedding"][...].sharding.device_set) == 8
    assert found.params["embedding"][...].sharding.shard_shape((264, 16)) != (264, 16)


def test_another_model_names_the_first_difference(source):
    model = source.model
    other = dataclasses.replace(model, mlp_dim=32)
    expected = (
        r"shapes, got others: model.mlp_dim 24 there, 32 here; parameter \S+mlp\S* \(.*24.*32"
    )
    with pytest.raises(ValueError, match=expected) as caught:
        load(folder_of(source), dataclasses.replace(source, model=other))
    assert "\n" not in str(caught.value)
    other = dataclasses.replace(model, depth=DenseConfig())
    with pytest.raises(ValueError, match="model.depth 'dense', got 'residual'; another mechanism"):
        load(folder_of(source), dataclasses.replace(source, model=other))
    # It changes no shape: the run may want it, but is told.
    other = dataclasses.replace(model, rope_theta=7.0)
    (note,) = load(folder_of(source), dataclasses.replace(source, model=other)).notes
    assert re.fullmatch(r"model.rope_theta \S+ there, 7.0 here: the same parameters, .*", note)


def test_what_cannot_be_read_is_one_line(source, tmp_path):
    there = copy_of(source, tmp_path)
    with pytest.raises(ValueError, match="Config.init_from: expected a run's .* got 'nowhere'"):
        train(dataclasses.replace(renamed(source, "new"), init_from="nowhere"))
    with pytest.raises(ValueError, match=r"one of the steps \[1, 2\], got '.*/checkpoints/7'"):
        load(there / "checkpoints" / "7", source)
    with pytest.raises(ValueError, match=r"tokenizer \(fingerprint other\), got .* \(bytes\)"):
        load(there, source, tokenizer="other")
    victim = next(path for path in (there / "checkpoints/2/params").rglob("*") if path.is_file())
    victim.write_bytes(b"")
    with pytest.raises(ValueError, match=r"got 2, which is damaged: .*; there are others: \S+/1$"):
        load(there, source)
    assert load(there / "checkpoints" / "1", source).source.endswith("step 1")
