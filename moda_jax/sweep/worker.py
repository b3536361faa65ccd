"""One run of a sweep in a process of its own: `python -m moda_jax.sweep.worker ...`.

A run that is alone in its process leaves nothing behind, whatever it was: device memory, compiled
programs, settings of JAX, threads. The allocator's highest mark is that run's own, and a crash or
an out-of-memory kill ends one run, not the sweep. It costs the imports and the start of the device,
some seconds; compiled programs outlive a process in JAX's compilation cache.
"""

import dataclasses
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from moda_jax.config import Config
from moda_jax.sweep.experiment import Run, load_experiment
from moda_jax.sweep.results import (
    Result,
    code_version,
    result_path,
    summarize_folder,
    write_result,
)
from moda_jax.terminal import one_line
from moda_jax.train.errors import (
    EXIT_BAD_INPUT,
    EXIT_DIVERGED,
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    DivergenceError,
    RunError,
)
from moda_jax.train.trainer import train


def main(arguments: Sequence[str]) -> int:
    """Trains the run that `arguments` (file, run's name, output folder, results folder) name.

    Returns the exit status of `moda-jax train`; a run that is over or that failed has its result
    written by then.
    """
    file, name, output_dir, results_dir = arguments
    _stop_with(os.getppid())
    runs = load_experiment(Path(file)).runs(output_dir)
    run = next(run for run in runs if run.name == name)
    path = result_path(Path(results_dir), run)
    started = time.monotonic()
    try:
        finished = train(run.config).finished
    except DivergenceError as error:
        result = _result(run, "diverged", started, message=one_line(error))
        write_result(path, dataclasses.replace(result, steps=_step_in(error, result.steps)))
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_DIVERGED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ValueError, NotImplementedError, OSError, MemoryError) as error:
        write_result(path, Result(label=run.label, seed=run.seed, status="failed",
                                  message=one_line(error)))  # fmt: skip
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_status if isinstance(error, RunError) else EXIT_BAD_INPUT
    if not finished:
        return EXIT_STOPPED
    write_result(path, _result(run, "finished", started))
    return EXIT_FINISHED


def _result(run: Run, status: Any, started: float, message: str | None = None) -> Result:
    return Result(
        label=run.label,
        seed=run.seed,
        status=status,
        message=message,
        process_seconds=round(time.monotonic() - started, 1),
        peak_memory_bytes=_peak_memory(),
        device=_describe_device(run.config),
        jax_version=jax.__version__,
        code=code_version(),
        **summarize_folder(run),
    )


def _step_in(error: DivergenceError, logged: int) -> int:
    """The step that the message names; metrics.jsonl may end before it."""
    found = re.search(r"at step (\d+)", str(error))
    return int(found[1]) if found else logged


def _peak_memory() -> int | None:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(s["peak_bytes_in_use"]) for s in stats if "peak_bytes_in_use" in s]
    return max(peaks, default=None)


def _describe_device(config: Config) -> str:
    mesh = config.mesh
    return f"{mesh.data * mesh.fsdp * mesh.tensor} x {jax.devices()[0].device_kind}"


def _stop_with(parent: int) -> None:
    """Saves and stops when the sweep's own process has gone without a word.

    Otherwise a sweep that is started again would find its run's folder in use.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
