"""A process that tokenizes units of work: `python -m moda_jax.data.worker`, started by `prepare`.

Lines of JSON come in: the job, then units. Lines of JSON go out: progress, entries, errors. It
imports no JAX, which would take seconds and memory, and ends as soon as its parent has.
"""

import contextlib
import json
import os
import queue
import select
import signal
import sys
import threading
import time
from typing import IO, Any

_LOOK_SECONDS = 0.3
_REPORT_SECONDS = 0.2


def main() -> None:
    # What libraries print must not come between the lines; Ctrl-C is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(2, 1)
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), name="orders", daemon=True).start()
    try:
        _work(orders, answers)
    except BrokenPipeError:  # the parent ended, and the other thread has not seen it yet
        os._exit(1)


def _listen(orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Passes orders on; ends the process when the parent closes the pipe or is gone.

    A process that the parent forked may keep the pipe open, so the parent's id is looked at too.
    """
    parent = os.getppid()
    buffer = b""
    while True:
        ready, _, _ = select.select([0], [], [], _LOOK_SECONDS)
        content = os.read(0, 1 << 16) if ready else b""
        if (ready and not content) or os.getppid() != parent:
            os._exit(0)
        *lines, buffer = (buffer + content).split(b"\n")
        for line in lines:
            orders.put(json.loads(line))


def _work(orders: queue.SimpleQueue[dict[str, Any]], answers: IO[str]) -> None:
    from moda_jax.data.shards import Job, Progress, write_shard
    from moda_jax.data.units import Unit

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    job = Job(**orders.get())
    tokenizer = None
    while True:
        order = orders.get()
        number = order["number"]
        reported = time.monotonic()

        def report(progress: Progress) -> None:
            nonlocal reported
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                answer(number=number, progress=vars(progress))  # noqa: B023  (used in this round)

        try:
            tokenizer = tokenizer or job.load_tokenizer()
            entry = write_shard(job, tokenizer, number, Unit.from_json(order["unit"]), report)
            answer(number=number, entry=entry)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, MemoryError) as error:
            kind = "value" if isinstance(error, ValueError) else "system"
            answer(number=number, error=str(error) or type(error).__name__, kind=kind)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
    sys.stdout.flush()
