"""The processes of a run: how they find each other, and how signals reach all of them together."""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from moda_jax.train.errors import EXIT_STOPPED

SAVE = "SIGUSR1"
"""Asks for a checkpoint; training goes on."""
_STOPS = ("SIGTERM", "SIGHUP", "SIGINT")
_NAMES = (SAVE, *_STOPS)  # of several processes' requests the last one here counts


def initialize_processes() -> None:
    """Joins a run of several processes if JAX_COORDINATOR_ADDRESS is set, once per process.

    JAX_NUM_PROCESSES and JAX_PROCESS_ID say the rest where no cluster manager does.
    """
    if "JAX_COORDINATOR_ADDRESS" not in os.environ or jax.distributed.is_initialized():
        return
    num_processes, process_id = (
        int(os.environ[name]) if name in os.environ else None
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    )
    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"], num_processes=num_processes, process_id=process_id
    )


class RunSignals:
    """What signals ask of a run: SIGTERM, SIGHUP and Ctrl-C to save and stop, SIGUSR1 to save.

    The loop asks between steps. Python's handlers wait while the main thread compiles or waits for
    the device, so a second thread hears signals too: it ends the process at once on a second stop
    signal (status 128 + its number), and on the first SIGTERM or SIGHUP while `all_is_saved`
    (status 75). A signal that the process was started to ignore (nohup) stays ignored.
    """

    def __init__(self, agree_every: int) -> None:
        self._agree_every = agree_every
        self._stop: str | None = None
        self._wants_save = False
        self._previous: dict[int, Any] = {}
        self._ending = threading.Lock()
        self.all_is_saved = True
        """Whether nothing would be lost if the process ended now."""

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread handle signals
        self._heard, self._sent = socket.socketpair()
        self._sent.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._sent.fileno(), warn_on_full_buffer=False)
        for name in _NAMES:
            number = getattr(signal, name, None)  # Windows has two of them
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._sent.close()
        self._listener.join()
        self._heard.close()

    def _receive(self, number: int, _: FrameType | None) -> None:
        """Runs in the main thread, as soon as Python has it again."""
        name = signal.Signals(number).name
        if name == SAVE:
            self._wants_save = not self.all_is_saved
        elif not self.all_is_saved:
            self._stop = name
        elif name == "SIGINT":
            raise KeyboardInterrupt
        else:
            self._end_saved(name)

    def _listen(self) -> None:
        """Runs in a thread of its own, at once; a handler would wait for compiled code."""
        stops = 0
        while numbers := self._heard.recv(1):
            number = numbers[0]
            if number not in self._previous:
                continue
            name = signal.Signals(number).name
            stops += name in _STOPS
            if name == SAVE and self.all_is_saved:
                _say(f"{name}: all steps are saved")
            elif name in _STOPS and stops > 1:
                _say(f"{name} again: ending at once")
                os._exit(128 + number)
            elif name in ("SIGTERM", "SIGHUP") and self.all_is_saved:
                self._end_saved(name)
            elif name in _STOPS:
                end = "interrupting" if self.all_is_saved else "finishing the step and saving"
                again = "Ctrl-C" if name == "SIGINT" else name
                _say(f"{name}: {end}; {again} again ends at once")

    def _end_saved(self, name: str) -> NoReturn:
        with self._ending:  # whichever thread comes first
            _say(f"{name}: all steps are saved; the same command goes on from there")
            os._exit(EXIT_STOPPED)

    def requested(self, step: int) -> str | None:
        """Name of the signal that asks for something after `step`, the same on every process.

        SIGUSR1 is named once. Several processes agree only now and then, since asking makes them
        wait for each other.
        """
        if jax.process_count() > 1 and step % self._agree_every:
            return None
        own = self._stop or (SAVE if self._wants_save else None)
        self._wants_save = False
        if jax.process_count() == 1:
            return own
        codes = {None: 0} | {name: code for code, name in enumerate(_NAMES, start=1)}
        code = int(multihost_utils.process_allgather(np.array(codes[own])).max())
        return next(name for name, value in codes.items() if value == code)

    @property
    def stop(self) -> str | None:
        """Name of the signal that asks this process to stop; None in a run of several.

        There all have to agree first.
        """
        return self._stop if jax.process_count() == 1 else None


def _say(line: str) -> None:
    # os.write, since the main thread may be in the middle of a print.
    os.write(2, f"\n{line}\n".encode())


def gather_json(local: Any) -> list[Any]:
    """The JSON-serialisable `local` of every process, in the order of the processes."""
    if jax.process_count() == 1:
        return [local]
    text = np.frombuffer(json.dumps(local).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def on_main(action: Callable[[], Any]) -> Any:
    """The JSON-serialisable result of `action`, which the first process runs for all.

    Raises its ValueError or OSError on every process, as ValueError where there are several: none
    waits for one that has ended.
    """
    if jax.process_count() == 1:
        return action()
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"result": action()}
        except (ValueError, OSError) as error:
            outcome = {"error": str(error)}
    outcome = gather_json(outcome)[0]
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["result"]
