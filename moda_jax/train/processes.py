"""The processes of a run: how they find each other, and how signals stop all of them together."""

import json
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils


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


class StopSignals:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop sees between steps."""

    def __init__(self, agree_every: int) -> None:
        self._agree_every = agree_every
        self._received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        if number == signal.SIGINT:
            # os.write, since a handler may interrupt a print. The next Ctrl-C kills at once, even
            # while Python waits for the device.
            os.write(2, b"\nfinishing the step and saving; Ctrl-C again ends at once\n")
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def requested(self, step: int) -> str | None:
        """Name of the signal that asks for a stop after `step`, the same on every process.

        Several processes agree only now and then, since asking makes them wait for each other.
        """
        if jax.process_count() == 1:
            return self._received
        if step % self._agree_every:
            return None
        codes = {None: 0, "SIGTERM": 1, "SIGINT": 2}
        code = int(multihost_utils.process_allgather(np.array(codes[self._received])).max())
        return next(name for name, value in codes.items() if value == code)


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
