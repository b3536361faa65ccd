"""The table of measured tile sizes, by kernel, head size, heads per key head, and architecture.

It is tuned.json, written by `python -m benchmarks.tune --backend triton`; `tiles.heuristic` decides
what it lacks. A config is a frozen dataclass of ints. Nothing is measured while a model trains.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config", bound=Any)


def table_key(kernel: str, head_dim: int, group: int, is_causal: bool, device: str) -> str:
    """For instance "depth_forward H64 G8 causal sm_90"."""
    return f"{kernel} H{head_dim} G{group} {'causal' if is_causal else 'full'} {device}"


class Table:
    """Entries by `table_key`: {"config": fields, "ms": ..., "default_ms": ...}; read once."""

    def __init__(self, path: Path):
        self.path = path
        self._entries: dict[str, Any] | None = None

    def read(self) -> dict[str, Any]:
        if self._entries is None:
            self._entries = json.loads(self.path.read_text()) if self.path.exists() else {}
        return self._entries

    def write(self, entries: dict[str, Any]) -> None:
        """Adds entries to the file, in place of those with the same keys."""
        self._entries = dict(sorted((self.read() | entries).items()))
        self.path.write_text(json.dumps(self._entries, indent=1) + "\n")

    def lookup(self, key: str, default: Config) -> Config:
        """The measured config, or `default`; a field that the entry lacks is `default`'s.

        Raises:
            ValueError: the table names a field that the config does not have: tune again.
        """
        entry = self.read().get(key)
        if entry is None:
            return default
        known = {field.name for field in dataclasses.fields(default)}
        if unknown := sorted(set(entry["config"]) - known):
            raise ValueError(
                f"{self.path.name}: {key!r} has {', '.join(unknown)}, {type(default).__name__} "
                "does not; run benchmarks/tune.py again"
            )
        return dataclasses.replace(default, **entry["config"])
