"""How a sweep starts its runs, what it makes of how they end, and how it is interrupted."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from moda_jax.cli import DEFAULT_CONFIG
from moda_jax.config import Config, ModelConfig, ResidualConfig
from moda_jax.sweep import Experiment, runner
from moda_jax.sweep.results import Result, read_result, settings_of, write_result

CONFIG = Config(name="x", model=ModelConfig(depth=ResidualConfig()))

# In place of a run: what it does is its label's. A run's own result was prepared by the test.
WORKER = """
import os, pathlib, shutil, signal, sys, time
_, name, output_dir, results_dir = sys.argv[1:]
folder = pathlib.Path(output_dir)
with open(folder / "started", "a") as started:
    started.write(name + "\\n")
if name.startswith("crash"):
    os.kill(os.getpid(), signal.SIGKILL)
if name.startswith("bug"):
    raise TypeError("a bug")
if name.startswith("slow") and not (folder / "stopped").exists():
    def stop(*_):
        (folder / "stopped").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").touch()
    time.sleep(60)
shutil.copy(folder / "prepared" / (name + ".json"), pathlib.Path(results_dir) / (name + ".json"))
sys.exit({"wild": 3, "bad": 2}.get(name.partition("_")[0], 0))
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function that runs runs of these labels; returns the status. `lines` are what it said."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(runner, "WORKER", (str(worker),))
    results = tmp_path / "results"
    results.mkdir()
    lines: list[str] = []

    def start(*labels, stop_after=None, config=CONFIG):
        experiment = Experiment(name="e", title="E", configs=dict.fromkeys(labels, config))
        runs = experiment.runs(str(tmp_path))
        for run in runs:
            status = {"wild": "diverged", "bad": "failed"}.get(run.label, "finished")
            message = {"wild": "loss is nan", "bad": "out of memory"}.get(run.label)
            result = Result(label=run.label, seed=0, status=status, message=message, steps=7,
                            settings=settings_of(run.config), validation_loss=3.5)  # fmt: skip
            write_result(tmp_path / "prepared" / f"{run.name}.json", result)
        with runner.Runner(
            worker, output_dir=str(tmp_path), results_dir=results, stop_after=stop_after,
            say=lines.append,
        ) as started:  # fmt: skip
            return started.run_all(runs)

    start.lines, start.folder, start.results = lines, tmp_path, results
    return start


def started(sweep):
    return (sweep.folder / "started").read_text().split()


def test_a_divergence_is_a_result_and_nothing_is_repeated(sweep):
    assert sweep("good", "wild") == 0
    assert read_result(sweep.results / "wild_seed0.json").status == "diverged"
    assert any("diverged at step 7 (loss is nan)" in line for line in sweep.lines)
    assert sweep("good", "wild", "more") == 0
    assert started(sweep) == ["good_seed0", "wild_seed0", "more_seed0"]
    assert sum("as before" in line for line in sweep.lines) == 2


def test_failures_are_recorded_and_named_and_the_others_run(sweep):
    assert sweep("bad", "crash", "bug", "good") == 1
    assert read_result(sweep.results / "bad_seed0.json").message == "out of memory"
    crashed = read_result(sweep.results / "crash_seed0.json")
    assert crashed.status == "failed"
    assert "its process ended with signal SIGKILL; see " in crashed.message
    assert "status 1" in read_result(sweep.results / "bug_seed0.json").message
    assert "TypeError: a bug" in (sweep.folder / "e" / "bug_seed0.log").read_text()
    assert read_result(sweep.results / "good_seed0.json").validation_loss == 3.5
    expected = "failed: bad_seed0, crash_seed0, bug_seed0; the same command tries them again"
    assert sweep.lines[-1] == expected
    sweep("bad", "good")
    assert started(sweep)[4:] == ["bad_seed0"]


def test_a_result_of_other_settings_or_a_damaged_one_is_a_failure_and_stays(sweep):
    assert sweep("good") == 0
    before = (sweep.results / "good_seed0.json").read_bytes()
    assert sweep("good", config=dataclasses.replace(CONFIG, steps=9)) == 1
    assert "steps 1000 -> 9" in "\n".join(sweep.lines)
    assert (sweep.results / "good_seed0.json").read_bytes() == before
    (sweep.results / "good_seed0.json").write_text("{")
    assert sweep("good") == 1
    assert "got a damaged file" in "\n".join(sweep.lines)
    assert started(sweep) == ["good_seed0"]


def test_a_time_limit_stops_the_run_in_progress_and_the_same_command_goes_on(sweep):
    assert sweep("slow", "good", stop_after=1.0) == 75
    assert sweep.lines[-1].startswith("--stop-after: stopped at slow_seed0; the same command goes")
    assert not list(sweep.results.iterdir())
    assert sweep("slow", "good") == 0
    assert started(sweep) == ["slow_seed0", "slow_seed0", "good_seed0"]


def test_a_time_limit_between_runs(sweep):
    assert sweep("good", stop_after=1e-6) == 75
    assert not (sweep.folder / "started").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_goes_on_to_the_run(sweep, number, status):
    def send():
        while not (sweep.folder / "ready").exists():
            time.sleep(0.01)
        if number == signal.SIGINT:  # whose run would end as by Ctrl-C
            (sweep.folder / "stopped").touch()
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert sweep("slow", "good") == status
    thread.join()
    assert started(sweep) == ["slow_seed0"]
    assert (sweep.folder / "stopped").exists()
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.slow
def test_a_run_whose_sweep_was_killed_saves_and_ends(tmp_path):
    """Else the sweep that is started again would find the run's folder in use."""
    command = [sys.executable, "-c", "from moda_jax.cli import command; command()", "sweep"]
    command += ["experiments/smoke.py", "--output-dir", str(tmp_path)]
    command += ["--results-dir", str(tmp_path / "results")]
    sweep = subprocess.Popen(command, cwd=DEFAULT_CONFIG.parent.parent)
    log = tmp_path / "smoke" / "plain_seed0.log"
    wait_for(lambda: log.exists() and b"step 5/120" in log.read_bytes())
    sweep.kill()
    sweep.wait()
    wait_for(lambda: b"SIGTERM: saved a checkpoint at step" in log.read_bytes())
    wait_for(lambda: not (tmp_path / "smoke" / "plain_seed0" / "owner.json").exists())


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
