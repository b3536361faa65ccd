"""Where the time of a start goes."""

import time

from moda_jax.train.start_clock import StartClock


def test_laps_add_up(monkeypatch):
    now = iter([10.0, 11.0, 13.0, 13.5, 99.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = StartClock(seconds_before=2.0)
    clock.lap("imports")
    clock.lap("data")
    clock.lap("compile")
    assert clock.end() == "first step after 5.5 s: imports 3.0, data 2.0, compile 0.5"
    clock.lap("later")
    assert not clock.is_running


def test_a_process_is_older_than_its_imports():
    clock = StartClock.of_process()
    clock.lap("imports")
    seconds = float(clock.end().split()[3])
    assert 0.0 <= seconds < 24 * 3600
