"""What happens when a loss or gradient is not finite: skip the step, and stop after too many."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moda_jax.train.errors import DivergenceError

SKIPPED_FOLDER = "skipped"
_KEPT_BATCHES = 8


def divergence(what: str, latest_step: int | None) -> DivergenceError:
    """The error that ends a run because of `what`, and that says where the same command goes on."""
    if latest_step is None:
        kept = "there is no checkpoint yet"
    else:
        kept = f"the newest checkpoint is of step {latest_step}"
    return DivergenceError(
        f"{what}: training diverged and was stopped, {kept}; lower --optimizer.learning-rate or "
        f"raise --optimizer.warmup-steps"
    )


class SkippedSteps:
    """Counts the steps that `train_step` skipped and keeps their batches.

    The batches of this process go to skipped/step_<step>_process_<process>.npz in the run's folder,
    the newest few of them.
    """

    def __init__(self, directory: Path, *, max_in_a_row: int) -> None:
        self._folder = directory / SKIPPED_FOLDER
        self._max = max_in_a_row
        self._in_a_row = 0
        self.too_many: str | None = None
        """Once a step more than allowed was skipped: what was seen last."""

    def observe(
        self, step: int, metrics: Mapping[str, float], batch: Mapping[str, np.ndarray]
    ) -> str | None:
        """Returns a line that says what was skipped; None for a step that was not."""
        wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
        if not wrong:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        seen = f"{wrong[0]} is {metrics[wrong[0]]} at step {step}"
        kept = self._keep(step, metrics, batch)
        if self._in_a_row > self._max:
            self.too_many = f"{seen}, the last of {self._in_a_row} in a row ({kept})"
        return (
            f"{seen}: the step was skipped, {self._in_a_row} in a row, {self._max} allowed, "
            f"{metrics['skipped_steps']:.0f} in all; {kept}"
        )

    def _keep(
        self, step: int, metrics: Mapping[str, float], batch: Mapping[str, np.ndarray]
    ) -> str:
        process = f"_process_{jax.process_index()}.npz"
        path = self._folder / f"step_{step}{process}"
        arrays: dict[str, Any] = {"step": np.int32(step), **batch}
        arrays |= {name: np.float32(metrics[name]) for name in ("loss", "grad_norm")}
        try:
            self._folder.mkdir(exist_ok=True)
            np.savez_compressed(path, **arrays)
            kept = sorted(self._folder.glob(f"step_*{process}"), key=_step_of)
            for old in kept[:-_KEPT_BATCHES]:
                old.unlink()
        except OSError as error:
            return f"its batch could not be kept in {path}: {error.strerror}"
        return f"its batch is in {path}"


def _step_of(path: Path) -> int:
    return int(path.name.split("_")[1])
