"""Configs as nested dicts of JSON, for config.json and checkpoints."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from moda_jax.config.depth import DEPTH_CONFIGS, DepthConfig
from moda_jax.config.model import ModelConfig

_T = TypeVar("_T")


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts; a mechanism's settings begin with its name."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    named = {"name": config.name} if isinstance(config, DepthConfig) else {}
    return named | {name: _value_to_json(value) for name, value in fields.items()}


def _value_to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_value_to_json(x) for x in value]
    return to_json(value) if dataclasses.is_dataclass(value) else value


def from_json(model: Any) -> ModelConfig:
    """The ModelConfig that `to_json` wrote; see `dataclass_from_json`."""
    if isinstance(model, Mapping):  # an older version is named first, not its settings' names
        _depth_from_json(model.get("depth"), "model.depth.")
    return dataclass_from_json(model, ModelConfig, "model.")


def dataclass_from_json(settings: Any, cls: type[_T], prefix: str = "") -> _T:
    """The `cls`, a config dataclass, that `to_json` wrote.

    A setting that is not there has its default: it is younger than the file.

    Args:
        settings: nested dicts.
        cls: Config, or one of its parts.
        prefix: stands before a field's name in errors: "model." for a ModelConfig.

    Raises:
        ValueError: an unknown setting, a missing one that has no default, or a value that `cls`
            refuses; or a model written before mechanisms had settings of their own.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"{prefix.rstrip('.') or cls.__name__}: expected settings by name, got {settings!r}"
        )
    types = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in settings.keys() - fields.keys():
        close = difflib.get_close_matches(name, fields, n=1)
        hint = f"; did you mean {prefix}{close[0]}?" if close else ""
        raise ValueError(
            f"{prefix}{name}: expected a setting of {cls.__name__}, which has none of this name"
            f"{hint}"
        )
    for name, field in fields.items():
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in settings and not has_default:
            raise ValueError(f"{prefix}{name}: expected a value, got none")
    return cls(
        **{
            name: _value_from_json(value, types[name], f"{prefix}{name}.")
            for name, value in settings.items()
        }
    )


def _value_from_json(value: Any, kind: Any, prefix: str) -> Any:
    if kind is DepthConfig:
        return _depth_from_json(value, prefix)
    if typing.get_origin(kind) is tuple and isinstance(value, Sequence):
        (part, _) = typing.get_args(kind)
        return tuple(
            _value_from_json(x, part, f"{prefix}{number}.") for number, x in enumerate(value)
        )
    is_part = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    return dataclass_from_json(value, kind, prefix) if is_part else value


def _depth_from_json(depth: Any, prefix: str) -> DepthConfig:
    if not isinstance(depth, Mapping) or depth.get("name") not in tuple(DEPTH_CONFIGS):
        raise ValueError(
            f"{prefix.rstrip('.')}: expected the settings of one of {sorted(DEPTH_CONFIGS)}, got "
            f"{depth!r}; a checkpoint of an older version cannot be loaded"
        )
    settings = {key: value for key, value in depth.items() if key != "name"}
    return dataclass_from_json(settings, DEPTH_CONFIGS[depth["name"]], prefix)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
