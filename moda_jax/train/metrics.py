"""Where the numbers of a run go: metrics.jsonl, TensorBoard and, if asked for, Weights & Biases."""

import contextlib
import errno
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

METRICS_FILE = "metrics.jsonl"
FINAL = "final_"
"""Prefix of the metrics that belong to the end of a run."""
DEPTH_MASS = "depth_attention_mass"
"""The share of attention on depth slots, mean over the layers that see any; with /LAYER, of one."""
_FLUSH_SECONDS = 10.0


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics file, in order, without lines that are none.

    A kill cuts the last line off, and a machine that loses power may leave zeros or anything else.
    """
    if not path.exists():
        return []
    records = map(_parse_line, path.read_bytes().split(b"\n"))
    return [record for record in records if record is not None]


def _parse_line(line: bytes) -> dict[str, float] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        return None
    has_step = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if has_step else None


class MetricsWriter:
    """Appends metrics by step; continues the files of an earlier part of the run.

    What the earlier part wrote after the restored step is dropped, since those steps will be run
    again, and so are its final metrics, since the run goes on.
    """

    def __init__(
        self,
        directory: Path,
        *,
        restored_step: int,
        config: Mapping[str, Any],
        wandb: bool,
        say: Callable[[str], None] = print,
    ) -> None:
        """`say` gets a line when TensorBoard or W&B fail, which ends no run."""
        self._say = say
        self._mirrors: dict[str, _Mirror] = {}
        if wandb:
            self._mirrors["Weights & Biases"] = _Wandb(directory, config)
        path = directory / METRICS_FILE
        kept = [record for record in read_metrics(path) if _stays(record, restored_step)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, path)  # a kill leaves the old file or the new one
        # Without a buffer: nothing is left that could fail when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._mirrors["TensorBoard"] = _TensorBoard(directory / "tensorboard", restored_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line of the finite metrics (JSON has no NaN); a reader sees it at once.

        Raises OSError if metrics.jsonl cannot be written.
        """
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        line = json.dumps({"step": step, **metrics}).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._mirror(lambda mirror: mirror.write(step, metrics))

    def close(self) -> None:
        self._file.close()
        self._mirror(lambda mirror: mirror.close())

    def _mirror(self, use: Callable[["_Mirror"], None]) -> None:
        for name, mirror in list(self._mirrors.items()):
            try:
                use(mirror)
            except Exception as error:  # whatever their libraries raise
                with contextlib.suppress(Exception):
                    self._mirrors.pop(name).close()
                reason = " ".join(str(error).split())
                self._say(
                    f"{name}: failed with {type(error).__name__}: {reason}; the rest of the "
                    f"metrics goes to {METRICS_FILE} only"
                )


class _Mirror(Protocol):
    """Another place for the same metrics."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """An event file that is written by the thread that calls.

    tensorboardX's SummaryWriter writes in a thread; when the disk is full the thread dies and the
    next `add_scalar` waits for it forever.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        """TensorBoard itself hides what earlier files hold from `purge_step` on."""
        folder.mkdir(exist_ok=True)
        self._flushed = time.monotonic()
        self._events = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.SessionStatus.START)
        self._events.write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            summary = scalar(name, value)
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._events.flush()  # and fsync, which is slow on some disks
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


def _stays(record: Mapping[str, float], restored_step: int) -> bool:
    is_final = any(name.startswith(FINAL) for name in record)
    return record["step"] <= restored_step and not is_final


class _Wandb:
    """The run's Weights & Biases counterpart, found again by an id kept in `directory`."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self._run = _start_wandb(directory, config)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _start_wandb(directory: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "Config.wandb: expected the wandb package, which is not installed; "
            "install the extra `wandb` or leave --wandb out"
        ) from error
    id_file = directory / "wandb_id.txt"
    if not id_file.exists() or not re.fullmatch(rb"[0-9a-f]{12}", id_file.read_bytes()):
        id_file.write_text(uuid.uuid4().hex[:12])
    return wandb.init(
        project="moda-jax",
        name=str(config["name"]),
        id=id_file.read_text(),
        resume="allow",
        config=dict(config),
        dir=str(directory),
    )
