"""Tile sizes that were measured, by kernel, head size, query heads per key head, and device.

`tuned.json` beside this module is written by `python -m benchmarks.tune`; what it lacks falls back
to each kernel's heuristic. A config of tile sizes is a frozen dataclass of ints and bools.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, TypeVar

import jax

TABLE = Path(__file__).with_name("tuned.json")

Config = TypeVar("Config", bound=Any)


def table_key(kernel: str, head_dim: int, group: int, is_causal: bool, device_kind: str) -> str:
    """For instance "forward H64 G8 causal NVIDIA H200"."""
    return f"{kernel} H{head_dim} G{group} {'causal' if is_causal else 'full'} {device_kind}"


def tuned(kernel: str, default: Config, *, head_dim: int, group: int, is_causal: bool) -> Config:
    """The measured config for the device at hand, or `default`.

    A field that the table's entry lacks has `default`'s value.

    Raises:
        ValueError: the table names a field that the config does not have: tune again.
    """
    if jax.default_backend() != "gpu":
        return default
    key = table_key(kernel, head_dim, group, is_causal, jax.devices()[0].device_kind)
    entry = read_table().get(key)
    if entry is None:
        return default
    known = {field.name for field in dataclasses.fields(default)}
    if unknown := sorted(set(entry["config"]) - known):
        raise ValueError(
            f"{TABLE.name}: {key!r} has {', '.join(unknown)}, {type(default).__name__} does not; "
            "run benchmarks/tune.py again"
        )
    return dataclasses.replace(default, **entry["config"])


@functools.cache
def read_table() -> dict[str, Any]:
    """Entries by `table_key`: {"config": fields, "ms": ..., "default_ms": ...}."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write_entries(entries: dict[str, Any]) -> None:
    """Adds entries to the table, in place of those with the same keys."""
    merged = read_table() | entries
    TABLE.write_text(json.dumps(dict(sorted(merged.items())), indent=1) + "\n")
    read_table.cache_clear()
