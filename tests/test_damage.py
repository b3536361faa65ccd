"""Damaged checkpoints: each is named, none is used, and the newest one that is whole is."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from moda_jax import load_trained
from moda_jax.config import Config, ModelConfig
from moda_jax.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from moda_jax.train import checkpoint
from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.manifest import MANIFEST, find_damage
from moda_jax.train.metrics import METRICS_FILE, MetricsWriter, read_metrics
from moda_jax.train.run_folder import CONFIG_FILE, read_run_config
from moda_jax.train.train_step import TrainState
from moda_jax.train.trained import DamagedCheckpointWarning
from tests.corpora import write_tokenizer
from tests.models import FLOAT32, random_model

CONFIG = Config(
    name="run",
    model=ModelConfig(
        vocab_size=264,
        num_layers=1,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        mlp_dim=8,
    ),
    execution=FLOAT32,
)
DATA = {"identity": {"tokenizer": "bytes"}, "grain": {"position": 7}}
LOSSES = {4: 2.0, 8: 1.0}


def state_of(step):
    params = nnx.state(random_model(CONFIG.model))
    moments = jax.tree.map(np.zeros_like, params)
    params = jax.tree.map(lambda leaf: leaf + np.float32(step), params)
    return jax.tree.map(jax.numpy.asarray, TrainState(np.int32(step), params, {"mu": moments}))


@pytest.fixture(scope="module")
def states():
    return {step: state_of(step) for step in LOSSES}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, states):
    """The folder of a run with two checkpoints, which no test changes."""
    run = tmp_path_factory.mktemp("saved") / "run"
    checkpoints = Checkpoints(run / "checkpoints", keep_last=2)
    for step, state in states.items():
        checkpoints.save(step, state, data=DATA, config=CONFIG, validation_loss=LOSSES[step])
    checkpoints.close()
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def restore(run, abstract):
    """The restored state, and the lines about damage; saves the step after the damage again."""
    checkpoints = Checkpoints(run / "checkpoints", keep_last=2)
    with checkpoints:
        restored = checkpoints.restore(abstract, CONFIG)
        checkpoints.save(8, abstract, data=DATA, config=CONFIG, validation_loss=None)
    return restored.state, checkpoints.damaged


def payload(folder):
    """A data file with parameters in it: the largest one."""
    files = (folder / "params").rglob("*")
    return max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_every_flipped_bit_is_noticed(run):
    folder = run / "checkpoints" / "8"
    assert find_damage(folder, 8) is None
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if path.parent != folder or path.name == MANIFEST]
    sizes = np.array([path.stat().st_size for path in files])
    rng = np.random.default_rng(0)
    # Every file once, and data more often; bits of a JSON file change names and numbers alike.
    chosen = [*range(len(files)), *rng.choice(len(files), 40, p=sizes / sizes.sum())]
    assert len(chosen) > 60
    for number in chosen:
        position, bit = int(rng.integers(sizes[number])), int(rng.integers(8))
        flip(files[number], position, bit)
        assert find_damage(folder, 8) is not None, (files[number], position, bit)
        flip(files[number], position, bit)
    assert find_damage(folder, 8) is None


def missing_folder(folder):
    shutil.rmtree(folder / "params")


def truncated_file(folder):
    path = payload(folder)
    path.write_bytes(path.read_bytes()[:-7])


def flipped_bit(folder):
    flip(payload(folder), 100, 3)


def emptied_json(folder):
    (folder / "run" / "metadata").write_bytes(b"")


def emptied_metrics(folder):
    (folder / "metrics" / "metrics").write_bytes(b"")


def emptied_notes(folder):
    (folder / "_CHECKPOINT_METADATA").write_bytes(b"")


def parameters_of_another_step(folder):
    shutil.rmtree(folder / "params")
    shutil.copytree(folder.parent / "4" / "params", folder / "params")


def removed_marker(folder):
    (folder / "commit_success.txt").unlink()


def no_manifest(folder):
    (folder / MANIFEST).unlink()


def torn_manifest(folder):
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-40])


def manifest_of_another_kind(folder):
    (folder / MANIFEST).write_text("[3]")


def copy_of_another_step(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "4", folder)


def a_file_in_its_place(folder):
    path = payload(folder)
    path.unlink()
    path.mkdir()


FAULTS = {
    missing_folder: r"params/\S* is missing",
    truncated_file: r"params/\S* has \d+ bytes instead of \d+",
    flipped_bit: r"the content of params/\S* has changed",
    emptied_json: "run/metadata has 0 bytes instead of",
    emptied_metrics: "metrics/metrics has 0 bytes instead of",
    emptied_notes: "the content of _CHECKPOINT_METADATA has changed",
    parameters_of_another_step: r"params/\S* (is missing|has)",
    removed_marker: "commit_success.txt is missing",
    no_manifest: "it has no manifest: it is unfinished, or of an earlier version",
    torn_manifest: "its manifest cannot be read",
    manifest_of_another_kind: "its manifest cannot be read",
    copy_of_another_step: "it was saved as step 4: the folder was renamed or copied",
    a_file_in_its_place: r"params/\S* is missing",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_run_goes_on_from_the_newest_one_that_is_whole(run, states, fault):
    fault(run / "checkpoints" / "8")
    state, damaged = restore(run, states[8])
    chex.assert_trees_all_equal(state, states[4])
    (line,) = damaged
    assert re.match(rf"checkpoint 8 is damaged: {FAULTS[fault]}", line)
    aside = run / "checkpoints" / "8.damaged"
    assert f"kept as {aside}" in line
    assert "\n" not in line
    assert aside.is_dir()
    assert find_damage(run / "checkpoints" / "8", 8) is None  # saved again


def test_a_renamed_step_folder(run, states):
    (run / "checkpoints" / "8").rename(run / "checkpoints" / "12")
    state, (line,) = restore(run, states[8])
    assert "checkpoint 12 is damaged: it was saved as step 8" in line
    assert int(state.step) == 4


def test_an_older_damaged_one_stands_in_nobodys_way(run, states):
    """orbax reads every checkpoint's validation loss when it starts."""
    emptied_metrics(run / "checkpoints" / "4")
    state, (line,) = restore(run, states[8])
    assert "checkpoint 4 is damaged: metrics/metrics has 0 bytes" in line
    chex.assert_trees_all_equal(state, states[8])


def test_damaged_ones_pile_up_under_names_of_their_own(run, states):
    for name in ("8.damaged", "8.damaged-2"):
        flipped_bit(run / "checkpoints" / "8")
        restore(run, states[8])
        assert (run / "checkpoints" / name).is_dir()


def test_no_whole_checkpoint_is_one_line_and_changes_nothing(run):
    flipped_bit(run / "checkpoints" / "8")
    removed_marker(run / "checkpoints" / "4")
    before = sorted(run.rglob("*"))
    expected = "expected a checkpoint that is whole, got 8: .* has changed; 4: commit_success.txt"
    with pytest.raises(ValueError, match=expected) as caught:
        Checkpoints(run / "checkpoints", keep_last=2)
    assert "\n" not in str(caught.value)
    assert sorted(run.rglob("*")) == before
    with pytest.raises(ValueError, match="expected a checkpoint that is whole"):
        load_trained(run)


@pytest.mark.parametrize(
    ("fault", "step"),
    [(flipped_bit, "newest"), (flipped_bit, "best"), (emptied_metrics, "best"),
     (emptied_json, "newest"), (no_manifest, "newest")],
)  # fmt: skip
def test_load_trained_passes_over_a_damaged_one_loudly(run, fault, step):
    fault(run / "checkpoints" / "8")
    before = sorted(run.rglob("*"))
    expected = f"checkpoint 8 is damaged: {FAULTS[fault]}.*; checkpoint 4 is loaded instead"
    with pytest.warns(DamagedCheckpointWarning, match=expected):
        found = load_trained(run, step=step)
    assert found.step == 4
    assert sorted(run.rglob("*")) == before
    with pytest.raises(ValueError, match="expected a checkpoint that is whole, got checkpoint 8"):
        load_trained(run, step=8)


def test_load_trained_of_a_whole_run_is_silent(run, states, recwarn, caplog):
    found = load_trained(run)
    chex.assert_trees_all_equal(nnx.state(found.model), states[8].params)
    assert (found.step, load_trained(run, step="best").step) == (8, 8)
    assert not recwarn.list
    assert not caplog.records
    shutil.rmtree(run / "checkpoints" / "8" / "optimizer" / "d")  # which it does not read
    with pytest.warns(DamagedCheckpointWarning, match="optimizer/"):
        assert load_trained(run).step == 4


def test_load_trained_refuses_another_tokenizer(tmp_path, states):
    """The folder's copy is read, and compared with what the parameters were trained with."""
    run = tmp_path / "run"
    run.mkdir()
    write_tokenizer(run / TOKENIZER_FILE, "ab")
    gone = dataclasses.replace(CONFIG.data, tokenizer="gone.json")
    config = dataclasses.replace(CONFIG, data=gone)
    fingerprint = load_tokenizer(str(run / TOKENIZER_FILE)).fingerprint
    data = DATA | {"identity": {"tokenizer": fingerprint}}
    with Checkpoints(run / "checkpoints", keep_last=1) as checkpoints:
        checkpoints.save(4, states[4], data=data, config=config, validation_loss=None)
    assert load_trained(run).tokenizer.encode("b") == [1]
    write_tokenizer(run / TOKENIZER_FILE, "ba")
    with pytest.raises(ValueError, match="expected the tokenizer with which the model was trained"):
        load_trained(run)


def test_a_failed_save_costs_no_older_checkpoint(tmp_path, states, monkeypatch):
    """The disk is full when the manifest is written, and then there is room."""
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    options = {"data": DATA, "config": CONFIG, "validation_loss": None}
    checkpoints.save(4, states[4], **options)
    checkpoints.wait()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", refuse)
        checkpoints.save(8, states[8], **options)
        expected = "step 8 could not be written, the newest is of step 4: .* No space left"
        with pytest.raises(OSError, match=expected) as caught:
            checkpoints.wait()
    assert "\n" not in str(caught.value)
    assert find_damage(tmp_path / "4", 4) is None
    assert checkpoints.steps == [4]
    checkpoints.save(8, states[8], **options)
    checkpoints.close()
    assert find_damage(tmp_path / "8", 8) is None
    assert not (tmp_path / "4").exists()


def test_a_checkpoint_that_somebody_removed_under_the_run(run, states):
    with Checkpoints(run / "checkpoints", keep_last=1) as checkpoints:
        assert checkpoints.forget_missing() == []
        shutil.rmtree(run / "checkpoints" / "8")
        assert checkpoints.forget_missing() == [8]
        assert checkpoints.best_loss() == LOSSES[4]
        checkpoints.save(12, states[8], data=DATA, config=CONFIG, validation_loss=None)
    assert find_damage(run / "checkpoints" / "12", 12) is None


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "lo', b"\0\0\0\0", b"\xff\xfe\xe4", b"3\n", b"{}", b'{"step": "x"}']
)
def test_a_broken_tail_of_the_metrics_never_stops_a_run(tmp_path, tail):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n' + tail)
    writer = MetricsWriter(tmp_path, restored_step=2, config={"name": "run"}, wandb=False)
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("content", [b"", b'{"name": "ru', b"\xff", b"[]", b'{"steps": 3}'])
def test_a_damaged_config_is_one_line_that_names_it(tmp_path, content):
    path = Path(tmp_path, CONFIG_FILE)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_run_config(tmp_path)
    assert "\n" not in str(caught.value)
