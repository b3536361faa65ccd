"""metrics.jsonl across kills and resumes, TensorBoard, Weights & Biases missing and there."""

import json
import math
import resource
import sys
import types

import pytest

from moda_jax.train import metrics
from moda_jax.train.metrics import METRICS_FILE, MetricsWriter, read_metrics

CONFIG = {"name": "run"}


def open_writer(directory, restored_step=0, *, wandb=False):
    return MetricsWriter(directory, restored_step=restored_step, config=CONFIG, wandb=wandb)


def write(directory, steps, *, restored_step=0):
    writer = open_writer(directory, restored_step)
    for step in steps:
        writer.write(step, {"loss": 1.0 / step})
    writer.close()


def test_lines_are_visible_at_once(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(3, {"loss": 0.1, "learning_rate": 1e-3})
    assert read_metrics(tmp_path / METRICS_FILE) == [
        {"step": 3, "loss": 0.1, "learning_rate": 1e-3}
    ]
    writer.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_resume_drops_the_steps_that_run_again(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], restored_step=2)
    steps = [record["step"] for record in read_metrics(tmp_path / METRICS_FILE)]
    assert steps == [1, 2, 3, 4, 5]


def test_no_checkpoint_means_a_fresh_file(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 1


def test_resume_drops_final_metrics_of_the_shorter_run(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(2, {"loss": 0.5})
    writer.write(2, {"final_validation_loss": 0.4})
    writer.close()
    write(tmp_path, [3], restored_step=2)
    assert [record["step"] for record in read_metrics(tmp_path / METRICS_FILE)] == [2, 3]


def test_half_written_last_line(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write(tmp_path, [3], restored_step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_missing_wandb_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="Config.wandb.*not installed"):
        open_writer(tmp_path, wandb=True)


def test_wandb_gets_the_metrics_and_the_same_run_again(tmp_path, monkeypatch):
    calls = []

    class FakeRun:
        def log(self, metrics, step):
            calls.append((step, metrics))

        def finish(self):
            calls.append("finish")

    ids = []
    fake = types.ModuleType("wandb")
    fake.init = lambda *, id, **_: ids.append(id) or FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        writer = open_writer(tmp_path, step - 1, wandb=True)
        writer.write(step, {"loss": 0.5})
        writer.close()
    assert calls == [(1, {"loss": 0.5}), "finish", (2, {"loss": 0.5}), "finish"]
    assert ids[0] == ids[1]
    (tmp_path / "wandb_id.txt").write_bytes(b"\0\0")  # after a loss of power
    open_writer(tmp_path, 2, wandb=True).close()
    assert len(ids[2]) == 12


def test_not_a_number_is_left_out(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "skipped_steps": 1.0})
    writer.close()
    assert (tmp_path / METRICS_FILE).read_text() == '{"step": 1, "skipped_steps": 1.0}\n'


def test_a_failing_tensorboard_is_said_once_and_ends_nothing(tmp_path, monkeypatch, capsys):
    def fail(self, step, metrics):
        raise OSError("no\nspace")

    monkeypatch.setattr(metrics._TensorBoard, "write", fail)
    write(tmp_path, [1, 2])
    assert [record["step"] for record in read_metrics(tmp_path / METRICS_FILE)] == [1, 2]
    out = capsys.readouterr().out
    assert out.startswith("TensorBoard: failed with OSError: no space; ")
    assert out.count("\n") == 1


def test_no_room_for_a_line_and_room_made(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / METRICS_FILE
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = open_writer(tmp_path, restored_step=2)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
        with pytest.raises(OSError):  # noqa: PT011  (a full disk and this limit differ in the number)
            writer.write(3, {"loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.close()
    assert path.read_text().endswith('{"step": 3')  # cut off, as by a full disk
    write(tmp_path, [3], restored_step=2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
