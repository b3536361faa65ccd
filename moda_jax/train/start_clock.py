"""Where the time goes until the first step is done."""

import os
import time
from pathlib import Path
from typing import Self


class StartClock:
    """Seconds of each part of a start, in their order; `end` makes later laps count for nothing."""

    def __init__(self, *, seconds_before: float = 0.0) -> None:
        """`seconds_before` have passed already, and belong to the first lap."""
        self._first = self._last = time.perf_counter() - seconds_before
        self._laps: dict[str, float] = {}
        self.is_running = True

    @classmethod
    def of_process(cls) -> Self:
        """A clock that has run since the process was started, where the system knows when."""
        return cls(seconds_before=_process_age())

    def lap(self, name: str) -> None:
        """The time since the lap before was spent on `name`."""
        if self.is_running:
            now = time.perf_counter()
            self._laps[name] = self._laps.get(name, 0.0) + now - self._last
            self._last = now

    def end(self) -> str:
        """One line: the seconds in all, and those of each lap."""
        self.is_running = False
        laps = ", ".join(f"{name} {max(spent, 0.0):.1f}" for name, spent in self._laps.items())
        return f"first step after {max(self._last - self._first, 0.0):.1f} s: {laps}"


def _process_age() -> float:
    """Seconds since this process was started; 0 where there is no /proc."""
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
