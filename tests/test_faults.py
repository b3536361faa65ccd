"""Faults put into whole runs: not-a-number, signals, full disks, unreadable data, no output."""

import dataclasses
import resource
import signal
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.data.loader import TrainIterator
from moda_jax.train import train_step, trainer
from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.errors import DivergenceError, SaveError
from moda_jax.train.metrics import METRICS_FILE
from moda_jax.train.throughput import Throughput
from moda_jax.train.train_step import make_train_functions
from moda_jax.train.trainer import train
from tests.compiled_once import compiled_once  # noqa: F401  (a fixture)
from tests.runs import (  # noqa: F401  (two are fixtures)
    History,
    config_fixture,
    corpus_fixture,
    final_state,
    make_config,
    make_small,
    metrics_of,
)


@pytest.fixture
def small(config):
    return make_small(config)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The undisturbed run of `small`."""
    undisturbed = make_small(make_config(corpus, tmp_path_factory.mktemp("whole")))
    train(undisturbed)
    return undisturbed


def steps_of(config):
    checkpoints = Checkpoints(Path(config.output_dir, config.name, "checkpoints"), keep_last=9)
    steps = checkpoints.steps
    checkpoints.close()
    return steps


@pytest.mark.parametrize(
    "eval_every",
    [pytest.param(1, id="validated"), pytest.param(100, id="saved")],
)
@pytest.mark.slow
def test_a_diverged_state_is_never_saved(small, eval_every):
    """Its parameters are huge, but finite."""
    sane = dataclasses.replace(
        small, checkpoint_every=1, keep_last=1, eval_every=eval_every, steps=3
    )
    train(sane)
    optimizer = dataclasses.replace(sane.optimizer, learning_rate=1e37)
    with pytest.raises(DivergenceError, match="loss is nan at step .*the newest .* is of step 3"):
        train(dataclasses.replace(sane, steps=9, optimizer=optimizer))
    assert steps_of(sane)[-1] == 3
    assert all(np.isfinite(list(metrics_of(sane, name).values())).all()
               for name in ("loss", "validation_loss"))  # fmt: skip
    assert train(dataclasses.replace(sane, steps=5)).finished


BAD_BYTE = 7


@pytest.fixture
def bad_document(small, corpus, monkeypatch):
    """A document whose every batch has no finite loss."""
    loss = train_step._loss

    def diverging(graphdef, z_loss, params, batch):
        value, sums = loss(graphdef, z_loss, params, batch)
        bad = jnp.where(jnp.any(batch["tokens"] == BAD_BYTE), jnp.nan, 1.0)
        return value * bad, {name: sums[name] * bad for name in sums}

    monkeypatch.setattr(train_step, "_loss", diverging)
    path = corpus / "bad.txt"
    path.write_text(chr(BAD_BYTE) * 5)  # not held out, by its hash
    yield
    path.unlink()


@pytest.mark.usefixtures("bad_document")
def test_a_bad_batch_is_skipped_counted_and_kept(small, capsys):
    whole = dataclasses.replace(small, name="whole", steps=12)
    history = History()
    train(whole, on_step=history)
    losses = {step: loss for step, (loss, _) in history.steps.items()}
    bad = [step for step, loss in losses.items() if np.isnan(loss)]
    assert 0 < len(bad) < len(losses)
    assert max(metrics_of(whole, "skipped_steps").values()) == len(bad)
    assert f"loss is nan at step {bad[0]}: the step was skipped" in capsys.readouterr().out
    assert sorted(set(losses) - set(metrics_of(whole, "loss"))) == bad  # JSON has no NaN
    for step in bad:
        path = Path(whole.output_dir, f"whole/skipped/step_{step}_process_0.npz")
        with np.load(path, allow_pickle=False) as kept:
            assert kept["step"] == step
            assert BAD_BYTE in kept["tokens"]
    state, _ = final_state(whole)
    chex.assert_tree_all_finite(state.params)

    stopped = dataclasses.replace(whole, name="stopped")
    assert not train(stopped, on_step=History(stop_at=bad[0])).finished
    train(stopped)
    chex.assert_trees_all_equal(final_state(stopped), final_state(whole))
    for name in ("loss", "skipped_steps"):
        assert metrics_of(stopped, name) == metrics_of(whole, name)

    strict = dataclasses.replace(whole, name="strict", max_skipped_steps=0)
    with pytest.raises(DivergenceError, match=f"loss is nan at step {bad[0]}, .*in .*npz"):
        train(strict)


def test_a_parameter_that_is_not_finite_is_not_saved(small, monkeypatch):
    def make(*args):
        functions = make_train_functions(*args)
        return functions._replace(is_finite=lambda state: int(state.step) < 5)

    monkeypatch.setattr(trainer, "make_train_functions", make)
    with pytest.raises(DivergenceError, match="a parameter or moment .* step 6.*is of step 4"):
        train(small)
    assert steps_of(small) == [4]


@pytest.mark.slow
def test_data_that_cannot_be_read_any_more(small, whole, monkeypatch, capsys):
    read, count = TrainIterator.__next__, 0

    def fail(self):
        nonlocal count
        count += 1
        if count == 4:
            raise ValueError("expected a readable file")
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainIterator, "__next__", fail)
        with pytest.raises(ValueError, match="expected a readable file"):
            train(small)
    assert "data cannot be read: saved a checkpoint at step 3" in capsys.readouterr().out
    train(small)
    chex.assert_trees_all_equal(final_state(small), final_state(whole))


@pytest.fixture
def limit_file_size():
    """A function: no file may grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# orbax's threads outlive the event loop in which their writing failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_no_room_for_a_checkpoint_and_room_made(small, whole, limit_file_size, capfd):
    saving = dataclasses.replace(small, checkpoint_every=2)
    saved = Path(small.output_dir, "run/checkpoints/2")

    def fill_disk(step, metrics):
        if step == 3:
            while not saved.exists():
                time.sleep(0.01)
            limit_file_size(8192)

    with pytest.raises(
        SaveError, match="not be written, the newest is of step 2: .*; make room"
    ) as caught:
        train(saving, on_step=fill_disk)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    limit_file_size(resource.RLIM_INFINITY)
    train(saving)
    chex.assert_trees_all_equal(final_state(saving), final_state(whole))


@pytest.mark.slow
def test_clocks_may_jump(small, monkeypatch):
    """By an hour, back and forth."""
    clocks = {name: getattr(time, name) for name in ("time", "monotonic", "perf_counter")}
    offset = 0.0

    def move_clocks(step, metrics):
        nonlocal offset
        offset = -3600.0 if step % 2 else 3600.0

    for name, clock in clocks.items():
        monkeypatch.setattr(time, name, lambda clock=clock: clock() + offset)
    assert train(small, on_step=move_clocks).finished
    rates = metrics_of(small, "tokens_per_second").values()
    assert rates
    assert all(0 < rate < 1e9 for rate in rates)


def test_a_clock_that_stands(monkeypatch, small):
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    speed = Throughput(small.model, compute_dtype="float32", seq_len=24, devices=jax.devices()[:1])
    for _ in range(3):
        speed.step_done(100.0)
    assert speed.read() == {}


def signal_when_called(owner, name, number, monkeypatch):
    original, sent = getattr(owner, name), []

    def send_first(*args, **kwargs):
        if not sent:
            sent.append(number)
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, send_first)


@pytest.mark.parametrize("where", [pytest.param("save", marks=pytest.mark.slow), "validation"])
def test_a_signal_during(where, small, whole, monkeypatch):
    """The step that is being saved or validated is the last one; a resumed run makes up for it."""
    with monkeypatch.context() as patch:
        if where == "save":
            signal_when_called(Checkpoints, "save", signal.SIGTERM, patch)
        else:
            signal_when_called(trainer._Run, "_validation", signal.SIGHUP, patch)
        result = train(small)
    assert (result.step, result.finished) == (4, False)
    assert bool(metrics_of(small, "validation_loss")) == (where == "save")
    assert train(small).finished
    chex.assert_trees_all_equal(final_state(small), final_state(whole))
    assert metrics_of(small, "validation_loss") == metrics_of(whole, "validation_loss")


def test_sigusr1_saves_and_the_run_goes_on(small, whole):
    saving = dataclasses.replace(small, keep_last=5)
    assert train(saving, on_step=History(stop_at=1, number=signal.SIGUSR1)).finished
    assert steps_of(saving) == [2, 4, 6]
    chex.assert_trees_all_equal(final_state(saving), final_state(whole))


@pytest.mark.slow
def test_an_ignored_signal_stays_ignored(small):
    """`nohup` starts a process that ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = train(small, on_step=History(stop_at=1, number=signal.SIGHUP))
        assert result.finished
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_failing_sample_and_plot_end_no_run(small, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no\nfont")

    for name in ("generate", "plot_loss"):
        monkeypatch.setattr(trainer, name, fail)
    result = train(dataclasses.replace(small, sample_tokens=3))
    assert result.finished
    assert result.sample is None
    out = capsys.readouterr().out
    for what in ("sample", "plots"):
        assert f"{what}: failed with RuntimeError: no font\n" in out
    assert metrics_of(small, "final_validation_loss")


def test_a_prompt_is_read_before_the_first_step(small, tmp_path, monkeypatch):
    def refuse(text):
        raise ValueError(f"cannot encode {text!r}")

    load_data = trainer.load_data

    def load(*args, **kwargs):
        data = load_data(*args, **kwargs)
        monkeypatch.setattr(data.tokenizer, "encode", refuse)
        return data

    monkeypatch.setattr(trainer, "load_data", load)
    with pytest.raises(ValueError, match="cannot encode 'def '"):
        train(small)
    assert not Path(small.output_dir, small.name).exists()


def test_metrics_that_cannot_be_written(small, monkeypatch):
    def fail(self, step, metrics):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.MetricsWriter, "write", fail)
    with pytest.raises(SaveError, match=f"{METRICS_FILE}: the metrics of step 1 .*No space left"):
        train(small)
