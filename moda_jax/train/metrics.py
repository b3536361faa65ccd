"""Where the numbers of a run go: metrics.jsonl, TensorBoard and, if asked for, Weights & Biases."""

import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
FINAL = "final_"
"""Prefix of the metrics that belong to the end of a run."""


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
        self, directory: Path, *, restored_step: int, config: Mapping[str, Any], wandb: bool
    ) -> None:
        self._wandb = _start_wandb(directory, config) if wandb else None
        path = directory / METRICS_FILE
        kept = [record for record in read_metrics(path) if _stays(record, restored_step)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, path)  # a kill leaves the old file or the new one
        self._file = path.open("a")
        # TensorBoard itself hides what earlier files hold from this step on.
        self._tensorboard = SummaryWriter(
            str(directory / "tensorboard"), purge_step=restored_step + 1
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line of metrics; a reader sees it at once."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _stays(record: Mapping[str, float], restored_step: int) -> bool:
    is_final = any(name.startswith(FINAL) for name in record)
    return record["step"] <= restored_step and not is_final


def _start_wandb(directory: Path, config: Mapping[str, Any]) -> Any:
    """The run's Weights & Biases counterpart, found again by an id kept in `directory`."""
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
