"""Whole runs: outputs, exact resume after a signal, meshes, divergence, bad checkpoints."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax
import numpy as np
import pytest

from moda_jax import generate, load_trained
from moda_jax.cli import parse_config
from moda_jax.config import (
    AttentionResidualsConfig,
    MeshConfig,
    to_json,
)
from moda_jax.ops.sharding import make_mesh
from moda_jax.train import trainer
from moda_jax.train.errors import EXIT_STOPPED, DivergenceError
from moda_jax.train.owner import FolderOwner
from moda_jax.train.train_step import make_train_functions
from moda_jax.train.trainer import train
from tests.compiled_once import compiled_once  # noqa: F401  (a fixture)
from tests.runs import (  # noqa: F401  (two are fixtures)
    STEPS,
    History,
    config_fixture,
    corpus_fixture,
    final_state,
    metrics_of,
    renamed,
)
from tests.tolerances import REORDERED_RUN

ROOT = Path(__file__).resolve().parent.parent


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(config, capsys):
    whole = renamed(config, "whole")
    uninterrupted = History()
    train(whole, on_step=uninterrupted)

    first = History(stop_at=2)
    result = train(config, on_step=first)
    assert not result.finished
    assert result.step == 3  # the signal came while step 3 was computed
    assert "SIGTERM: saved a checkpoint at step 3" in capsys.readouterr().out
    second = History()
    result = train(config, on_step=second)
    assert result.finished
    assert "resumed at step 3" in capsys.readouterr().out

    assert list(second.steps) == [4, 5, 6]
    assert first.steps | second.steps == uninterrupted.steps
    chex.assert_trees_all_equal(final_state(config), final_state(whole))
    for name in ("loss", "validation_loss", "final_validation_loss", "depth_attention_mass"):
        assert metrics_of(config, name) == metrics_of(whole, name), name


def test_a_finished_run_leaves_everything(config, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "generate", lambda *_, **__: [list(b"\x1b[2J\r")])
    result = train(config)
    out = capsys.readouterr().out
    for text in (
        "parameters",
        "devices",
        "attention",
        "corpus",
        "from scratch",
        "step 6/6",
        "validation loss",
        "sample:",
    ):
        assert text in out, text
    assert result.directory == Path(config.output_dir, "run")
    files = {path.name for path in result.directory.iterdir()}
    assert files == {
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "config.json",
        "corpus.json",
        "sample.txt",
        "loss.png",
        "attention_mass.png",
    }
    saved = json.loads((result.directory / "config.json").read_text())
    assert saved == to_json(config)
    assert (result.directory / "sample.txt").read_bytes() == f"{result.sample}\n".encode()
    assert result.sample == "def \x1b[2J\r"
    assert "sample:\ndef \\x1b[2J\\r\n" in out
    assert list(metrics_of(config, "loss")) == [1, 2, 3, 4, 5, 6]
    assert list(metrics_of(config, "validation_perplexity")) == [4, 6]
    assert result.validation_perplexity == pytest.approx(np.exp(result.validation_loss))
    mass = metrics_of(config, "depth_attention_mass")[6]
    assert 0 < mass < 1
    by_layer = [metrics_of(config, f"depth_attention_mass/{layer}")[6] for layer in (1, 2)]
    assert sum(by_layer) / 2 == pytest.approx(mass, abs=1e-5)  # rounded to five digits
    assert not metrics_of(config, "depth_attention_mass/0")  # which sees no slots
    losses = metrics_of(config, "loss")
    assert losses[6] < losses[1] - 0.1  # it learns


@pytest.mark.slow
def test_a_run_of_another_mechanism(config):
    """Nothing of it is a depth slot that attention reads."""
    model = dataclasses.replace(config.model, depth=AttentionResidualsConfig())
    result = train(dataclasses.replace(config, model=model))
    assert not (result.directory / "attention_mass.png").exists()
    assert not metrics_of(config, "depth_attention_mass")
    losses = metrics_of(config, "loss")
    assert losses[6] < losses[1] - 0.1
    assert load_trained(result.directory).model.config == model


def test_a_reached_run_says_so_and_still_has_its_outputs(config, capsys):
    first = train(config)
    (first.directory / "loss.png").unlink()
    settings = (first.directory / "config.json").read_bytes()
    # A setting of another run is not written down as if this one had been trained with it.
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-4)
    second = train(dataclasses.replace(config, optimizer=optimizer))
    assert (first.directory / "config.json").read_bytes() == settings
    out = capsys.readouterr().out
    assert "step 6 of 6 is already reached" in out
    assert "nothing is trained, so the run's settings stay: optimizer.learning_rate 0.01 -> " in out
    assert (second.directory / "loss.png").exists()
    assert second.validation_loss == first.validation_loss
    assert len(metrics_of(config, "final_validation_loss")) == 1


@pytest.mark.slow
def test_a_signal_just_before_a_validation_does_not_lose_it(config, monkeypatch):
    """And the trace of steps that never came is closed; test_profile.py has the real profiler."""
    whole = renamed(config, "whole")
    train(whole)
    trace = Path(config.output_dir, config.name, "profile", "perfetto_trace.json.gz")
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: folder.mkdir())
    monkeypatch.setattr(jax.profiler, "stop_trace", trace.touch)
    profiled = dataclasses.replace(config, profile=3)
    result = train(profiled, on_step=History(stop_at=3))
    assert result.step == 4  # a validation is due there
    assert trace.exists()
    assert not metrics_of(config, "validation_loss")
    train(config)
    for name in ("validation_loss", "depth_attention_mass", "final_validation_loss"):
        assert metrics_of(config, name) == metrics_of(whole, name), name


def test_validation_is_a_mean_over_targets():
    """2.5 nats over 4 targets and 1 over 2 are 2 over 6; the mean of the batches' is 1.75."""
    sums = [{"cross_entropy": 10.0, "targets": 4.0}, {"cross_entropy": 2.0, "targets": 2.0}]
    run: Any = SimpleNamespace(
        functions=SimpleNamespace(eval_step=lambda params, batch: batch),
        state=SimpleNamespace(params=None),
        data=SimpleNamespace(validation=lambda count, source: iter(sums[:count])),
        signals=SimpleNamespace(stop=None),
        _saving_if_data_fails=contextlib.nullcontext,
        _to_global=lambda batch: batch,
    )
    assert trainer._Run._source_loss(run, 2, 0) == 2.0


def test_a_trained_model_is_found_again(config, caplog):
    result = train(config)
    caplog.clear()
    before = sorted(result.directory.rglob("*"))
    found = load_trained(result.directory)
    assert found.step == STEPS
    prompt = [found.tokenizer.eos_id, *found.tokenizer.encode(config.sample_prompt)]
    new = generate(
        found.model,
        [prompt],
        max_new_tokens=config.sample_tokens,
        temperature=0.8,
        stop_tokens=[found.tokenizer.eos_id],
    )[0]
    assert config.sample_prompt + found.tokenizer.decode(new) == result.sample
    losses = metrics_of(config, "validation_loss")
    assert load_trained(str(result.directory), step="best").step == min(losses, key=losses.get)
    sharded = load_trained(result.directory, step=4, mesh=make_mesh(MeshConfig(fsdp=8)))
    assert len(sharded.model.embedding[...].sharding.device_set) == 8
    with pytest.raises(ValueError, match=r"step: expected .* one of \[4, 6\], got 5"):
        load_trained(result.directory, step=5)
    with pytest.raises(ValueError, match="directory: expected a run's folder .*, got 'nowhere'"):
        load_trained("nowhere")
    assert not caplog.messages
    assert sorted(result.directory.rglob("*")) == before


@pytest.mark.slow
def test_more_steps_continue_the_run(config, capsys):
    train(config)
    longer = History()
    result = train(dataclasses.replace(config, steps=8), on_step=longer)
    assert result.step == 8
    assert list(longer.steps) == [7, 8]
    assert list(metrics_of(config, "loss")) == list(range(1, 9))
    assert "changed at step 6: steps 6 -> 8: the learning rate goes on" in capsys.readouterr().out
    rates = metrics_of(config, "learning_rate")
    assert rates[7] > rates[6]  # the longer curve is higher there
    assert list(metrics_of(config, "final_validation_loss")) == [8]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_and_a_dead_owner(config, capsys):
    """The run goes on from the checkpoint before, in a folder that was moved, without a flag."""
    whole = train(config)
    moved = whole.directory.with_name("moved")
    whole.directory.rename(moved)
    (moved / "checkpoints" / "6" / "run" / "metadata").write_bytes(b"")
    (moved / "owner.json").write_text("{}")
    os.utime(moved / "owner.json", (1, 1))
    steps = History()
    result = train(parse_config([str(moved)]), on_step=steps)
    out = capsys.readouterr().out
    assert "checkpoint 6 is damaged: run/metadata has 0 bytes" in out
    assert "taken over from an unknown process" in out
    assert "changed at step" not in out
    assert result.directory == moved
    assert list(steps.steps) == [5, 6]
    assert result.validation_loss == whole.validation_loss
    assert not (moved / "owner.json").exists()


def test_a_second_run_of_one_name_is_refused_and_tidies_nothing_up(config):
    folder = Path(config.output_dir, config.name)
    half_written = folder / "checkpoints" / "4.orbax-checkpoint-tmp"
    half_written.mkdir(parents=True)
    with FolderOwner(folder), pytest.raises(ValueError, match="is in use by process"):
        train(config)
    assert half_written.is_dir()
    assert not (folder / "config.json").exists()


def test_a_folder_that_is_lost_under_the_run(config):
    """Said at the next save, whose own failure is not what happened."""
    folder = Path(config.output_dir, config.name)

    def rename(step, metrics):
        if step == 2:
            folder.rename(folder.with_name("elsewhere"))

    with pytest.raises(ValueError, match="run was deleted, renamed or replaced under") as caught:
        train(config, on_step=rename)
    assert "\n" not in str(caught.value)
    assert "besides" not in str(caught.value)


def test_ctrl_c_saves_and_ends_with_130(config, capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # which the command line turns into status 130
        train(config, on_step=History(stop_at=1, number=signal.SIGINT))
    assert "SIGINT: saved a checkpoint at step 2" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    assert int(final_state(config)[0].step) == 2


@pytest.mark.slow  # test_train_step.py has the quick one, without the loop
def test_mesh_gives_the_run_of_one_device(config):
    one, many = History(), History()
    train(renamed(config, "one"), on_step=one)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    train(dataclasses.replace(config, mesh=mesh), on_step=many)
    for step, expected in one.steps.items():
        np.testing.assert_allclose(many.steps[step], expected, rtol=REORDERED_RUN)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(config, name, monkeypatch):
    def make_diverging(*args):
        functions = make_train_functions(*args)

        def train_step(state, batch):
            diverges = int(state.step) == 4
            state, metrics = functions.train_step(state, batch)
            return state, metrics | ({name: np.float32("nan")} if diverges else {})

        return functions._replace(train_step=train_step)

    monkeypatch.setattr(trainer, "make_train_functions", make_diverging)
    expected = f"{name} is nan at step 5, .*: training diverged and was stopped, the newest "
    with pytest.raises(DivergenceError, match=expected + "checkpoint is of step 4") as caught:
        train(dataclasses.replace(config, checkpoint_every=1, max_skipped_steps=0))
    assert "\n" not in str(caught.value)
    assert int(final_state(config)[0].step) == 4


def test_another_model_under_the_same_name(config):
    train(config)
    other = dataclasses.replace(config.model, num_layers=2)
    with pytest.raises(ValueError, match="another model .model.num_layers 3 there, 2 here"):
        train(dataclasses.replace(config, model=other))


def test_another_mesh_than_the_devices(config):
    with pytest.raises(ValueError, match="mesh data=1 fsdp=16 tensor=1 needs 16 devices"):
        train(dataclasses.replace(config, batch_size=16, mesh=MeshConfig(fsdp=16)))
    assert not Path(config.output_dir, config.name).exists()


def test_another_batch_size_reads_on_in_the_same_order(config, capsys):
    train(config)
    result = train(dataclasses.replace(config, batch_size=16, steps=8))
    assert result.finished
    assert "batch_size 8 -> 16: the same rows in the same order" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made(config, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ValueError, match="Config.output_dir: cannot make .*; choose another --out"):
        train(config)


def test_raw_text_is_prepared_in_the_folder_that_is_named(config, tmp_path):
    shared = dataclasses.replace(config, prepared_dir=str(tmp_path / "shared"), steps=1)
    for folder in ("a", "b"):
        train(dataclasses.replace(shared, output_dir=str(tmp_path / folder)))
        assert not (tmp_path / folder / "prepared").exists()
    assert len(list((tmp_path / "shared").glob("corpus*"))) == 1
    (tmp_path / "file").write_text("")
    bad = dataclasses.replace(shared, prepared_dir=str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"Config.prepared_dir: cannot .*; choose another --prep"):
        train(bad)


@pytest.mark.slow
def test_real_sigterm(config, tmp_path):
    whole = renamed(config, "whole")
    train(whole)
    script = tmp_path / "config.py"
    script.write_text(f"from moda_jax.config import *\nconfig = {config!r}\n")
    command = [sys.executable, "train.py", str(script)]
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        seen = ""
        while "step 1/6" not in seen:
            line = process.stdout.readline()
            assert line, seen
            seen += line
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait() == EXIT_STOPPED
    assert train(config).finished
    chex.assert_trees_all_equal(final_state(config), final_state(whole))
    assert metrics_of(config, "loss") == metrics_of(whole, "loss")
