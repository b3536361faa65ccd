"""How far an evaluation is: a bar on a terminal, elsewhere a line now and then."""

import time
from types import TracebackType
from typing import Self

import rich.console
import rich.progress

from moda_jax.evaluate.scoring import Report

_LINE_SECONDS = 10.0


class ProgressBar:
    """Bars one after another, each of a number of rows or requests, with their rate."""

    def __init__(self) -> None:
        console = rich.console.Console(highlight=False, soft_wrap=True)
        self._is_terminal = console.is_terminal
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[rate]}"),
            console=console,
            disable=not self._is_terminal,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def track(self, name: str) -> Report:
        """A new bar; what it returns is told how much is done, and of how much."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        task = self._bar.add_task(name, total=None, rate="")
        started = shown = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal shown
            now = time.monotonic()
            speed = done / max(now - started, 1e-9)
            rate = f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"
            if self._is_terminal:
                self._bar.update(task, completed=done, total=total, rate=rate)
            elif now - shown > _LINE_SECONDS:
                shown = now
                print(f"{name}: {done:,} of {total:,}, {rate}", flush=True)

        return report
