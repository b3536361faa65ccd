"""The manifest of a checkpoint: what its files hold, so that damage to them is seen.

`write_manifest` is called when all of a checkpoint's files are complete and before its folder gets
its name, so every checkpoint that a run has finished has one. Files are hashed with SHA-256, which
common processors compute in hardware; reading a checkpoint back costs about as much again as
restoring it.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

# orbax completes these two after the manifest, when it gives the folder its name.
_COMMIT_MARKER = "commit_success.txt"
_NOTES = "_CHECKPOINT_METADATA"
_NOTES_LATE_FIELD = "commit_timestamp_nsecs"

_HASHING_THREADS = 4


def write_manifest(folder: Path, step: int) -> None:
    """Writes the manifest of the checkpoint of `step` whose complete files lie in `folder`."""
    names = _files_of(folder)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        entries = pool.map(lambda name: _describe(folder / name), names)
        files = dict(zip(names, entries, strict=True))
    manifest = {"step": step, "notes": _read_notes(folder)[0], "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path, step: int, items: Collection[str] | None = None) -> str | None:
    """What is wrong with the checkpoint of `step` in `folder`, in a few words; None if nothing is.

    Args:
        folder: of the checkpoint.
        step: the one that its name says.
        items: the parts whose content is read and compared; of the others only the sizes are.
            None: all parts.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        saved_step, notes, entries = (manifest[name] for name in ("step", "notes", "files"))
        files = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except FileNotFoundError:
        return "it has no manifest: it is unfinished, or of an earlier version"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    if saved_step != step:
        return f"it was saved as step {saved_step!r}: the folder was renamed or copied"
    if not (folder / _COMMIT_MARKER).is_file():
        return f"{_COMMIT_MARKER} is missing"
    found_notes, committed = _read_notes(folder)
    if found_notes != notes or not isinstance(committed, int):
        return f"the content of {_NOTES} has changed"
    for name, (size, _) in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    return _find_changed(folder, _in_items(files, items))


def _find_changed(folder: Path, files: Mapping[str, tuple[int, str]]) -> str | None:
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = pool.map(lambda name: _try_hash(folder / name), files)
        for (name, (_, expected)), found in zip(files.items(), hashes, strict=True):
            if found is None:
                return f"{name} cannot be read"
            if found != expected:
                return f"the content of {name} has changed"
    return None


def _in_items(
    files: Mapping[str, tuple[int, str]], items: Collection[str] | None
) -> dict[str, tuple[int, str]]:
    return {
        name: entry
        for name, entry in files.items()
        if items is None or name.partition("/")[0] in items
    }


def _files_of(folder: Path) -> list[str]:
    """Names, relative to `folder`, of all files whose content is final."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(set(names) - {MANIFEST, _COMMIT_MARKER, _NOTES})


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _try_hash(path: Path) -> str | None:
    try:
        return _hash(path)
    except OSError:
        return None


def _read_notes(folder: Path) -> tuple[Any, Any]:
    """orbax's own notes on the checkpoint, and the time that it adds last; None: not readable."""
    try:
        notes = json.loads((folder / _NOTES).read_bytes())
        return notes, notes.pop(_NOTES_LATE_FIELD, None)
    except (OSError, ValueError, AttributeError):
        return None, None
