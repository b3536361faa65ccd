"""Runs that are killed again and again: `python -m tests.killed_runs CONFIG.py KILLS CACHE`.

Each run is a fork of this process, which imports everything and starts no thread of JAX: a kill
costs no import. CACHE keeps what JAX compiled. Prints a line of JSON: how each run ended, minus the
signal's number or 0 for a run that was quicker, and how many were killed in a save.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import jax

from moda_jax.cli import load_config
from moda_jax.config import Config
from moda_jax.train.trainer import train

_SECONDS_TO_THE_FIRST_KILL = 4.0


def start(config: Config) -> int:
    """Process id of a fork that trains."""
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as silent:
            os.dup2(silent.fileno(), 1)
        train(config, on_step=lambda step, metrics: time.sleep(0.02))
        os._exit(0)
    return pid


def kill_in_a_save(pid: int, folder: Path, delay: float) -> bool:
    """Whether a checkpoint was half written when the run was killed."""
    while not (saving := list(folder.glob("*.orbax-checkpoint-tmp"))):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return any(path.exists() for path in saving)


def main(config: Config, kills: int) -> None:
    folder = Path(config.output_dir, config.name, "checkpoints")
    rng = random.Random(0)
    ends, saving = [], 0
    for kill in range(kills):
        pid = start(config)
        if kill % 2:
            saving += kill_in_a_save(pid, folder, rng.uniform(0.0, 0.02))
        else:
            time.sleep(rng.uniform(0.0, _SECONDS_TO_THE_FIRST_KILL))
            os.kill(pid, signal.SIGKILL)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    last = os.waitstatus_to_exitcode(os.waitpid(start(config), 0)[1])
    print(json.dumps({"ends": ends, "saving": saving, "last": last}))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "os.fork")
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", sys.argv[3])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    main(load_config(Path(sys.argv[1])), int(sys.argv[2]))
