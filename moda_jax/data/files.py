"""The files of a corpus: those of a folder, none dropped silently, and compressed ones."""

import collections
import contextlib
import gzip
import hashlib
import importlib
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz")
TEXT_SUFFIXES = (".txt",)
PARQUET_SUFFIXES = (".parquet",)


class Found(NamedTuple):
    """What `find_files` finds in a folder."""

    paths: list[Path]
    """Sorted."""
    others: dict[str, int]
    """Number of the files that are not read, by the end of their names."""


def find_files(
    folder: Path,
    kinds: Sequence[tuple[str, ...]],
    *,
    leave_out: Path | None = None,
) -> Found:
    """The files under `folder` of the first of `kinds` that it has; others are counted.

    A kind is the suffixes of its files; upper and lower case are equal. Linked folders are
    followed, and each folder is read once, so a link to an enclosing one ends there. The folder
    `leave_out`, which may lie in `folder`, is not entered. Raises ValueError for a folder that
    cannot be listed.
    """
    files = sorted(_walk(folder, leave_out))
    of_kinds = ([path for path in files if has_suffix(path, kind)] for kind in kinds)
    kept = next(filter(None, of_kinds), [])
    others = collections.Counter(_kind(path) for path in sorted(set(files).difference(kept)))
    return Found(kept, dict(others.most_common()))


def has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def is_compressed(path: Path) -> bool:
    return has_suffix(path, (".gz", ".zst", ".xz"))


def _walk(folder: Path, leave_out: Path | None) -> Iterator[Path]:
    """All files; a folder that a link leads to comes after the ones that lie there."""
    seen: set[tuple[int, int]] = set()
    if leave_out is not None and leave_out.is_dir():
        status = leave_out.stat()
        seen.add((status.st_dev, status.st_ino))
    waiting, links = [folder], collections.deque[Path]()
    while waiting or links:
        here = waiting.pop() if waiting else links.popleft()
        with readable(here):
            status = here.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            path = here / entry.name
            with readable(path):
                is_folder = entry.is_dir()
            if not is_folder:
                yield path
            elif entry.is_symlink():
                links.append(path)
            else:
                waiting.append(path)


def _kind(path: Path) -> str:
    return path.suffix.lower() or "without suffix"


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what goes wrong in reading `path` into a ValueError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"DataConfig.source: cannot read {path}: {reason}; check the path and its permissions"
        ) from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def unpack(packed: IO[bytes], path: Path) -> Iterator[Any]:
    """The content of the open file `packed`, unpacked as the end of its name says.

    The position of `packed` says how much of it was read. Raises ValueError if Python lacks
    Zstandard.
    """
    if has_suffix(path, (".gz",)):
        with gzip.open(packed, "rb") as file:
            yield file
    elif has_suffix(path, (".xz",)):
        with lzma.open(packed, "rb") as file:
            yield file
    elif has_suffix(path, (".zst",)):
        zstd = _import_zstd(path)
        # Published corpora are packed with windows beyond the default limit of 128 MiB.
        options = {zstd.DecompressionParameter.window_log_max: 31}
        try:
            with zstd.open(packed, "rb", options=options) as file:
                yield file
        except zstd.ZstdError as error:
            raise OSError(str(error)) from error
    else:
        yield packed


def _import_zstd(path: Path) -> Any:
    for name in ("compression.zstd", "backports.zstd"):  # Python 3.14's own, and the same before
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise ValueError(
        f"DataConfig.source: {path} needs Python 3.14 or the package backports.zstd: "
        f"python -m pip install backports.zstd (the extra `zstd`), or unpack the file"
    )
