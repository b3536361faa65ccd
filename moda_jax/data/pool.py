"""Worker processes that tokenize units side by side.

They are programs of their own (`moda_jax.data.worker`), not forks and not multiprocessing's: a fork
of a process that runs JAX may hang, and multiprocessing would run a caller's script again.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from moda_jax.data.progress import ProgressDisplay
from moda_jax.data.shards import Job, Progress
from moda_jax.data.units import Unit

_ROOT = Path(__file__).resolve().parents[2]


def count_cores() -> int:
    """Those this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_workers(
    job: Job,
    units: Iterable[tuple[int, Unit]],
    *,
    workers: int,
    lock: int,
    display: ProgressDisplay,
    finished: Callable[[int, dict[str, Any]], None],
) -> None:
    """Tokenizes numbered units, in order, on `workers` processes; calls `finished` for each.

    `lock`: a file descriptor that the workers keep open, so that the lock on it lasts until the
    last of them has ended.

    Raises:
        ValueError: the input cannot be used: the first unit's error, whatever the processes' pace.
        OSError: a shard could not be written.
        ChildProcessError: a worker was killed.
    """
    waiting = iter(units)
    failed: dict[int, Exception] = {}
    with _started(job, workers, lock) as processes, selectors.DefaultSelector() as selector:
        for process in processes:
            selector.register(process.answers, selectors.EVENT_READ, process)
            process.order(next(waiting, None))
        # What comes after the first error is not waited for; what comes before may have its own.
        while any(
            process.number is not None and process.number < min(failed, default=sys.maxsize)
            for process in processes
        ):
            for key, _ in selector.select():
                process = key.data
                for answer in process.read():
                    number = answer["number"]
                    if "progress" in answer:
                        display.update(number, Progress(**answer["progress"]))
                        continue
                    if "error" in answer:
                        kind = ValueError if answer["kind"] == "value" else OSError
                        failed[number] = kind(answer["error"])
                    else:
                        assert process.unit is not None
                        entry = answer["entry"]
                        display.update(number, finished_progress(process.unit, entry))
                        finished(number, entry)
                    process.order(None if failed else next(waiting, None))
    if failed:
        raise failed[min(failed)]


def finished_progress(unit: Unit, entry: dict[str, Any]) -> Progress:
    return Progress(
        unit.size, entry["documents"], entry["tokens"], entry["bytes"], entry["skipped"]
    )


@contextlib.contextmanager
def _started(job: Job, count: int, lock: int) -> Iterator[list["_Process"]]:
    processes: list[_Process] = []
    try:
        for _ in range(count):
            processes.append(_Process(job, lock))
        yield processes
    finally:
        for process in processes:
            process.end()


class _Process:
    """A worker, seen from its parent."""

    def __init__(self, job: Job, lock: int) -> None:
        environment = os.environ | {
            # One core each: the library's own threads would only get in each other's way.
            "TOKENIZERS_PARALLELISM": "false",
            "RAYON_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", "")))
            ),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moda_jax.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            pass_fds=(lock,),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self.answers = self._process.stdin, self._process.stdout
        self._buffer = b""
        self.number: int | None = None
        self.unit: Unit | None = None
        self._send(dataclasses.asdict(job))

    def order(self, numbered: tuple[int, Unit] | None) -> None:
        """Gives it a unit; None: it has nothing to do."""
        self.number, self.unit = numbered or (None, None)
        if self.unit is not None:
            self._send({"number": self.number, "unit": self.unit.to_json()})

    def read(self) -> Iterator[dict[str, Any]]:
        """The answers that have come, at least a part of one; raises if the process is gone."""
        content = os.read(self.answers.fileno(), 1 << 16)
        if not content:
            raise self._gone()
        *lines, self._buffer = (self._buffer + content).split(b"\n")
        yield from map(json.loads, lines)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._orders.close()
        self.answers.close()

    def _send(self, content: dict[str, Any]) -> None:
        line = memoryview(json.dumps(content).encode("ascii") + b"\n")
        try:
            while line:
                line = line[self._orders.write(line) :]
        except BrokenPipeError:
            raise self._gone() from None

    def _gone(self) -> ChildProcessError:
        status = self._process.wait()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        reading = f" while it read {self.unit.describe()}" if self.unit else ""
        hint = "; is memory short? try fewer workers" if status == -signal.SIGKILL else ""
        return ChildProcessError(f"a worker process ended {how}{reading}{hint}")
