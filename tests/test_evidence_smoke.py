"""The whole chain of an experiment: `make evidence-smoke`, and one of the slow tests."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moda_jax.cli import DEFAULT_CONFIG
from moda_jax.sweep.results import read_result

ROOT = DEFAULT_CONFIG.parent.parent
# The process that starts the runs leaves the device's memory to them.
COMMAND = """
import sys
from jax._src import xla_bridge
from moda_jax.cli import command
status = command()
assert not xla_bridge.backends_are_initialized()
sys.exit(status)
"""


@pytest.mark.slow
def test_the_whole_chain(tmp_path):
    """Two configs and seeds, one run interrupted and resumed, one diverging; table, page, plot."""
    output, results = tmp_path / "runs", tmp_path / "results"
    arguments = ["sweep", "experiments/smoke.py", "--output-dir", str(output)]
    arguments += ["--results-dir", str(results)]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(*options):
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments, *options],
            cwd=ROOT, env=os.environ | cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def run(*options):
        process = start(*options)
        out, error = process.communicate(timeout=600)
        return process.returncode, out, error

    sweep = start()
    first = output / "smoke" / "plain_seed0"
    wait_for(lambda: has_text(first / "metrics.jsonl"), sweep)
    sweep.send_signal(signal.SIGTERM)
    out, error = sweep.communicate(timeout=300)
    assert sweep.returncode == 75, (out, error)
    assert "SIGTERM: stopped at plain_seed0; the same command goes on from there" in out
    assert not list(results.glob("*.json"))

    status, out, error = run()
    assert status == 0, (out, error)
    print(out)  # for people who call pytest with -s
    assert "resumed at step " in first.with_suffix(".log").read_text()
    assert "| `wild` | 0.01 M |" in out
    page = (results / "README.md").read_text()
    assert "0; seed 0 diverged at step 2 |" in page
    assert "| `moda` | `plain` |" in page
    assert (results / "losses.png").stat().st_size > 10_000
    files = sorted(results.glob("*.json"))
    assert [path.stem for path in files] == [
        "moda_seed0", "moda_seed1", "plain_seed0", "plain_seed1", "wild_seed0",
    ]  # fmt: skip
    for path in files:
        assert path.stat().st_size < 10_000
        result = read_result(path)
        assert result.status == ("diverged" if result.label == "wild" else "finished")
        if result.status == "finished":
            assert 2.0 < result.validation_loss < 4.5
            assert len(result.validation_curve) == 4
            assert result.steps == json.loads(path.read_text())["settings"]["steps"]

    before = {path.name: path.read_bytes() for path in results.iterdir()}
    status, again, error = run("--table")
    assert status == 0, error
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert [line for line in again.splitlines() if line.startswith("|")] == table
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def has_text(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def wait_for(condition, process) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
