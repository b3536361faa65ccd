"""The mass on depth by layer, as a run's metrics have it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moda_jax.train.metrics import DEPTH_MASS

_BY_LAYER = f"{DEPTH_MASS}/"


def mass_by_step(
    records: Sequence[dict[str, float]], path: Path
) -> tuple[list[int], list[int], np.ndarray]:
    """(steps of the validations, layers, mass [layers, steps]) of the records of `path`.

    The mass of a layer is the share of its attention on depth slots. Raises ValueError if no
    validation has it by layer.
    """
    found = {
        int(record["step"]): {
            int(name.removeprefix(_BY_LAYER)): value
            for name, value in record.items()
            if name.startswith(_BY_LAYER)
        }
        for record in records
        if any(name.startswith(_BY_LAYER) for name in record)
    }
    if not found:
        if any(DEPTH_MASS in record for record in records):
            reason = "only its mean over the layers (what an earlier version wrote)"
        else:
            reason = "none: no validation yet, or a model whose attention reads no depth slots"
        raise ValueError(f"{path}: expected {_BY_LAYER}LAYER of some validation, got {reason}")
    steps = sorted(found)
    layers = sorted({layer for values in found.values() for layer in values})
    mass = np.array([[found[step].get(layer, np.nan) for step in steps] for layer in layers])
    return steps, layers, mass
