"""How far a preparation is: a bar on a terminal, elsewhere a line now and then."""

import time
from collections.abc import Callable
from typing import Self

import rich.console
import rich.progress

from moda_jax.data.shards import Progress

_LINE_SECONDS = 10.0


class ProgressDisplay:
    """Sums what the units report and shows it, with rates since the display was made."""

    def __init__(self, total: int, done: int, *, say: Callable[[str], None], quiet: bool) -> None:
        """`total` and `done`: bytes of input in all, and of those that an earlier start did."""
        self._total = max(total, 1)
        self._before = done
        self._say = say
        self._quiet = quiet
        self._units: dict[int, Progress] = {}
        self._started = self._shown = time.monotonic()
        console = rich.console.Console(highlight=False, soft_wrap=True)
        self._is_terminal = console.is_terminal and not quiet
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("preparing"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            disable=not self._is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=self._total, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, number: int, progress: Progress) -> None:
        """What was done of unit `number` so far."""
        self._units[number] = progress
        now = time.monotonic()
        due = now - self._shown > (0.2 if self._is_terminal else _LINE_SECONDS)
        if due and not self._quiet:
            self._shown = now
            done, text = self._describe(now - self._started)
            if self._is_terminal:
                self._bar.update(self._task, completed=done, description=text)
            else:
                self._say(
                    f"preparing: {done / self._total:.0%} of {_megabytes(self._total)}, {text}"
                )

    def _describe(self, seconds: float) -> tuple[int, str]:
        consumed = sum(progress.consumed for progress in self._units.values())
        tokens = sum(progress.tokens for progress in self._units.values())
        done = min(self._before + consumed, self._total)
        left = (self._total - done) * seconds / consumed if consumed else 0.0
        eta = _time(left) if consumed else "-"
        return done, (
            f"{consumed / seconds / 1e6:,.1f} MB/s  {tokens / seconds:,.0f} tokens/s  ETA {eta}"
        )


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
