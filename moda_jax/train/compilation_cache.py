"""Compiled programs that the next start, of this run or of another, finds on disk.

JAX does the keeping. Its key holds the program, the compiler's options and version, and the
devices: of a CPU the instructions that it has, so machines may share a home. Here is what it leaves
open: where the folder is, how large it may grow, and what becomes of an entry whose writing was
killed. JAX's own limit (jax_compilation_cache_max_size) needs another package, and a lock that
every reader takes; the limit here is kept at each start, by the files' times.
"""

import contextlib
import importlib
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

MAX_BYTES = 2 << 30
"""Of all programs together, when a run starts; the least recently used ones go."""

_MIN_COMPILE_SECONDS = 0.1
"""JAX's default of a second leaves out half of what the tiny run compiles."""

_ENTRY = re.compile(r".*-[0-9a-f]{64}-cache")
_CHECKED = ".moda-jax-checked"
"""Its time says when the entries were looked at last."""
_ENABLED, _FOLDER = "jax_enable_compilation_cache", "jax_compilation_cache_dir"
_HIT = "/jax/compilation_cache/cache_hits"


class CompilationCache:
    """Keeps what JAX compiles while this is entered; afterwards JAX's settings are as before.

    A folder that cannot be used costs time, not the run: `description` says why.
    """

    def __init__(self, setting: str) -> None:
        """`setting`: Config.compilation_cache."""
        self._setting = setting
        self._previous: dict[str, Any] = {}
        self.description = ""
        """Where programs are kept and how many are there, or why not; for the start screen."""
        self.hits = 0
        """Programs that were found there."""

    def __enter__(self) -> Self:
        jax.monitoring.register_event_listener(self._count)
        self.description = self._open()
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._count)
        self._set(self._previous)

    def _open(self) -> str:
        if self._setting == "off":
            # A folder that JAX was told of by other means is not used either.
            self._set({_ENABLED: False})
            return "not kept (--compilation-cache off)"
        if self._setting == "auto":
            if not _read(_ENABLED):
                return "not kept (JAX's own setting)"
            if given := _read(_FOLDER):
                return f"kept in {given} (JAX's own setting)"
            if jax.process_count() > 1:
                # Only the first one writes. A process that finds a program while others compile it
                # leaves them waiting for its part of the work (XLA shares autotuning out).
                return "not kept by a run of several processes (--compilation-cache FOLDER does)"
        try:
            folder = _default_folder() if self._setting == "auto" else _make(self._setting)
            entries = tidy(folder)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: there is no home
            reason = error.strerror if isinstance(error, OSError) else error
            name = getattr(error, "filename", None)
            return f"not kept: {f'{name}: ' if name else ''}{reason}"
        self._set(
            {
                _ENABLED: True,
                _FOLDER: str(folder),
                "jax_persistent_cache_min_compile_time_secs": _MIN_COMPILE_SECONDS,
            }
        )
        size = sum(entries.values())
        found = f"{len(entries)} programs, {size / 1e6:.1f} MB" if entries else "empty"
        return f"kept in {folder} ({found})"

    def _set(self, settings: dict[str, Any]) -> None:
        if settings:
            self._previous = {name: _read(name) for name in settings}
            for name, value in settings.items():
                jax.config.update(name, value)
            reset_cache()  # JAX looks at the settings once

    def _count(self, event: str, **_: Any) -> None:
        self.hits += event == _HIT


def tidy(folder: Path) -> dict[Path, int]:
    """Removes what was half written and, beyond MAX_BYTES, what was not used for longest.

    JAX would warn of a torn entry at every start and never replace it. Each entry is read once,
    by the first start after it was written. Any number of processes may be doing this: one that
    loses an entry compiles.

    Returns the sizes of the entries that stay. Raises OSError if the folder is not writable.
    """
    marker = folder / _CHECKED
    last = marker.stat().st_mtime_ns if marker.exists() else 0
    marker.touch()  # before the entries are listed: what is written meanwhile is read next time
    entries: dict[Path, os.stat_result] = {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if _ENTRY.fullmatch(path.name):
                entries[path] = path.stat()
                if entries[path].st_mtime_ns >= last and not _is_whole(path.read_bytes()):
                    del entries[path]
                    path.unlink()
    total = sum(entry.st_size for entry in entries.values())
    # Reading moves st_atime, on many systems once a day: enough to tell what nobody needs.
    for path in sorted(entries, key=lambda p: max(entries[p].st_atime, entries[p].st_mtime)):
        if total <= MAX_BYTES:
            break
        total -= entries.pop(path).st_size
        path.unlink(missing_ok=True)
    return {path: entry.st_size for path, entry in entries.items()}


def _read(name: str) -> Any:
    return getattr(jax.config, name)


def _default_folder() -> Path:
    """The user's own, made if it is not there: an entry is code that JAX runs."""
    root = os.environ.get("XDG_CACHE_HOME")
    # The standard says that a relative path is to be ignored.
    base = Path(root) if root and os.path.isabs(root) else Path.home() / ".cache"
    folder = _make(base / "moda-jax" / "xla")
    if hasattr(os, "getuid"):
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & stat.S_IWOTH:
            raise ValueError(f"{folder}: expected a folder that only this user may write to")
    return folder


def _make(folder: str | Path) -> Path:
    path = Path(folder).expanduser().absolute()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _is_whole(entry: bytes) -> bool:
    """Whether the compressed `entry` has its end; True where its compression is not known."""
    if not entry.startswith(b"\x28\xb5\x2f\xfd"):  # JAX takes zlib where there is no zstd
        try:
            zlib.decompress(entry)
        except zlib.error:
            return False
        return True
    for module in _zstd_modules():
        try:
            module.decompress(entry)
        except Exception:  # each module has its own
            return False
        return True
    return True


def _zstd_modules() -> Iterator[ModuleType]:
    """Those that JAX would take."""
    for name in ("compression.zstd", "zstandard"):
        with contextlib.suppress(ImportError):
            yield importlib.import_module(name)
