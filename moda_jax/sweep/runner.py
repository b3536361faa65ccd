"""Runs a sweep: one process after another, each a run, resumable after any interruption."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

from moda_jax.sweep.experiment import Run
from moda_jax.sweep.results import (
    Result,
    changed_settings,
    read_result,
    result_path,
    write_result,
)
from moda_jax.sweep.table import describe_stale
from moda_jax.train.errors import (
    EXIT_DIVERGED,
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    EXIT_STOPPED,
)

WORKER = ("-m", "moda_jax.sweep.worker")
"""What the interpreter runs for every run."""

_ROOT = Path(__file__).resolve().parent.parent.parent
_FORWARDED = ("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1")


class Runner:
    """Starts the runs of a share that are not over yet, one after another.

    A context manager: inside of it signals go on to the run in progress, each as often as it came.
    """

    def __init__(
        self,
        file: Path,
        *,
        output_dir: str,
        results_dir: Path,
        stop_after: float | None,
        say: Callable[[str], None] = print,
    ) -> None:
        """`stop_after`: seconds from now after which the run in progress saves and all ends."""
        self._file, self._output_dir, self._results_dir = file, output_dir, results_dir
        self._ends = None if stop_after is None else time.monotonic() + stop_after
        self._say = say
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped_by: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for name in _FORWARDED:
            number = getattr(signal, name, None)  # Windows has two of them
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name != "SIGUSR1":
            self._stopped_by = name
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def run_all(self, runs: Sequence[Run]) -> int:
        """Starts what is not over; returns the sweep's exit status (`moda_jax.train.errors`).

        EXIT_FINISHED: all are over, diverged ones included; EXIT_SOME_FAILED: the others are;
        EXIT_STOPPED or EXIT_INTERRUPTED: by a signal or the time limit, and the same command goes
        on.
        """
        failed: list[str] = []
        for number, run in enumerate(runs, start=1):
            place = f"[{number}/{len(runs)}] {run.name}:"
            problem, is_over = self._look_at(run, place)
            if not is_over and problem is None:
                if self._is_to_stop():
                    return self._stop(run)
                self._say(f"{place} starting; its output goes to {self._log_of(run)}")
                status = self._start(run)
                if self._stopped_by is not None and status not in (EXIT_FINISHED, EXIT_DIVERGED):
                    return self._stop(run)
                if status in (EXIT_STOPPED, EXIT_INTERRUPTED):  # somebody signalled the run itself
                    self._stopped_by = "a signal"
                    return self._stop(run)
                problem = self._judge(run, place, status)
            if problem is not None:
                self._say(f"{place} failed: {problem}")
                failed.append(run.name)
        if failed:
            self._say(f"failed: {', '.join(failed)}; the same command tries them again")
        return EXIT_SOME_FAILED if failed else EXIT_FINISHED

    def _look_at(self, run: Run, place: str) -> tuple[str | None, bool]:
        """(what is wrong with the result that is there, whether the run is over)."""
        path = result_path(self._results_dir, run)
        try:
            result = read_result(path)
        except ValueError as error:
            return str(error), False
        if result is None or not result.is_over:
            return None, False
        if changes := changed_settings(result, run.config):
            return describe_stale(path, changes), False
        self._say(f"{place} {_describe(result)}, as before")
        return None, True

    def _judge(self, run: Run, place: str, status: int) -> str | None:
        """Says how a run ended; returns why it failed, if it did."""
        path = result_path(self._results_dir, run)
        result = read_result(path)
        if status in (EXIT_FINISHED, EXIT_DIVERGED) and result is not None and result.is_over:
            self._say(f"{place} {_describe(result)}")
            return None
        if result is None or status < 0 or status == 1:  # the process wrote no result of its own
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            message = f"its process ended with {how}; see {self._log_of(run)}"
            result = Result(label=run.label, seed=run.seed, status="failed", message=message)
            write_result(path, result)
        return result.message or "no reason given"

    def _start(self, run: Run) -> int:
        """Runs a process to its end; returns its exit status, minus a signal's number if killed.

        It has a session of its own, so that Ctrl-C in a terminal reaches it once, through here.
        """
        log = self._log_of(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *WORKER, str(self._file), run.name, self._output_dir,
                   str(self._results_dir)]  # fmt: skip
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(os.environ),
                start_new_session=True,
            )
            if self._stopped_by is not None:  # it came before there was a child to tell
                self._child.terminate()
            return self._wait(self._child)

    def _wait(self, child: "subprocess.Popen[bytes]") -> int:
        if self._ends is None:
            return child.wait()
        try:
            return child.wait(timeout=max(self._ends - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._is_to_stop()
            child.terminate()
            return child.wait()

    def _is_to_stop(self) -> bool:
        if self._stopped_by is None and self._ends is not None and time.monotonic() >= self._ends:
            self._stopped_by = "--stop-after"
        return self._stopped_by is not None

    def _stop(self, run: Run) -> int:
        self._say(f"{self._stopped_by}: stopped at {run.name}; the same command goes on from there")
        return EXIT_INTERRUPTED if self._stopped_by == "SIGINT" else EXIT_STOPPED

    def _log_of(self, run: Run) -> Path:
        return Path(run.config.output_dir, f"{run.name}.log")


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """With this library importable, wherever the process that starts others found it."""
    paths = [str(_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def _describe(result: Result) -> str:
    if result.status == "diverged":
        return f"diverged at step {result.steps} ({result.message})"
    loss = "no loss" if result.validation_loss is None else f"loss {result.validation_loss:.4f}"
    rate = result.tokens_per_second
    return f"finished, {loss}" + ("" if rate is None else f", {rate:,.0f} tokens/s")
