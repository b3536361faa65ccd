"""Runs in processes of their own: kill -9 at any moment, and what each signal ends with."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import pytest

from moda_jax.train.trainer import train
from tests.compiled_once import compiled_once  # noqa: F401  (a fixture)
from tests.runs import (  # noqa: F401  (two are fixtures)
    config_fixture,
    corpus_fixture,
    final_state,
    make_small,
    metrics_of,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def small(config):
    return make_small(config)


def write_config(config, folder, more=""):
    path = folder / "config.py"
    path.write_text(f"from moda_jax.config import *\nconfig = {config!r}\n{more}")
    return str(path)


@pytest.mark.slow
def test_killed_at_any_moment_it_is_bitwise_the_undisturbed_run(small, tmp_path):
    kills = 16
    killed = dataclasses.replace(small, steps=6 * kills, checkpoint_every=1, eval_every=1000)
    whole = dataclasses.replace(killed, name="whole", checkpoint_every=1000)
    train(whole)
    # What the whole run compiled, but not its place: a kill may leave half an entry there.
    cache = shutil.copytree(jax.config.jax_compilation_cache_dir, tmp_path / "compiled")
    command = [sys.executable, "-m", "tests.killed_runs"]
    command += [write_config(killed, tmp_path), str(kills), str(cache)]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert set(seen["ends"]) <= {-signal.SIGKILL, 0}
    assert seen["ends"].count(-signal.SIGKILL) > kills // 2
    assert seen["saving"] > 0
    assert seen["last"] == 0
    chex.assert_trees_all_equal(final_state(killed), final_state(whole))
    assert metrics_of(killed, "loss") == metrics_of(whole, "loss")


# Compiled code that takes for ever: the main thread is in C, so Python's handlers do not run.
STUCK = """
import hashlib
from moda_jax.train import trainer

def get_stuck(*args, **kwargs):
    print("stuck", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def make(*args, make=trainer.make_train_functions):
    functions = make(*args)
    calls = iter(range(100))
    step = lambda *args: (get_stuck if next(calls) == {step} else functions.train_step)(*args)
    return functions._replace(train_step=step)

if {step} is None:
    trainer.generate = get_stuck
else:
    trainer.make_train_functions = make
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "signals", "status", "says"),
    [
        (0, ["SIGTERM"], 75, "SIGTERM: all steps are saved; the same command goes on from there"),
        (0, ["SIGUSR1", "SIGHUP"], 75, "SIGHUP: all steps are saved"),
        (2, ["SIGTERM", "SIGTERM"], 143, "SIGTERM again: ending at once"),
        (2, ["SIGINT", "SIGINT"], 130, "SIGINT again: ending at once"),
        (None, ["SIGTERM"], 75, "SIGTERM: all steps are saved"),
    ],
    ids=["compiling", "compiling-other", "stepping-twice", "stepping-ctrl-c", "sampling"],
)
def test_a_signal_is_heard_while_the_main_thread_is_busy(
    small, tmp_path, step, signals, status, says
):
    quick = dataclasses.replace(small, steps=4, sample_tokens=3)
    script = write_config(quick, tmp_path, STUCK.format(step=step))
    command = [sys.executable, "train.py", script]
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert any("stuck" in line for line in process.stdout)
            for number, name in enumerate(signals, start=1):
                process.send_signal(getattr(signal, name))
                if number < len(signals):  # heard, before the next one is sent
                    assert any(name in line for line in process.stderr)
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == status
    assert says in error
    if step is None:  # the finished steps stay, and the outputs are made by the next start
        assert train(quick).finished
