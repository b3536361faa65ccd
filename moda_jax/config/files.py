"""Configs as nested dicts of JSON, for config.json and checkpoints."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moda_jax.config.depth import DEPTH_CONFIGS, DepthConfig
from moda_jax.config.model import ModelConfig


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts; a mechanism's settings begin with its name."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    named = {"name": config.name} if isinstance(config, DepthConfig) else {}
    return named | {
        name: to_json(value) if dataclasses.is_dataclass(value) else value
        for name, value in fields.items()
    }


def from_json(model: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that `to_json` wrote.

    Raises ValueError if it was written before mechanisms had settings of their own.
    """
    depth = model.get("depth")
    if not isinstance(depth, Mapping) or depth.get("name") not in DEPTH_CONFIGS:
        raise ValueError(
            f"model.depth: expected the settings of one of {sorted(DEPTH_CONFIGS)}, got {depth!r}; "
            "a checkpoint of an older version cannot be loaded"
        )
    settings = {key: value for key, value in depth.items() if key != "name"}
    return ModelConfig(**{**model, "depth": DEPTH_CONFIGS[depth["name"]](**settings)})
