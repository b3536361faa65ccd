"""Documents of a corpus, read one at a time.

One pass at the start finds every document, checks that it can be read, hashes its text and notes
where it stands; the text itself stays on disk. The index takes 40 bytes a document.
"""

import array
import hashlib
import json
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

# The test suite is larger than the library, and not the text one wants a model to write.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

_Place = tuple[int, int, int]
"""Number (of a file, or of a line in a file), byte offset, length in bytes."""


class _Reader(Protocol):
    """One kind of source: lists its documents, reads one again, and names it in errors."""

    def scan(self) -> Iterator[tuple[_Place, str]]: ...

    def read(self, place: _Place) -> str: ...

    def name(self, place: _Place) -> str: ...


class _Files:
    """One document per file."""

    def __init__(self, paths: Sequence[pathlib.Path], *, python_source: bool = False) -> None:
        self._paths = paths
        self._python_source = python_source

    def scan(self) -> Iterator[tuple[_Place, str]]:
        for number in range(len(self._paths)):
            yield (number, 0, 0), self.read((number, 0, 0))

    def read(self, place: _Place) -> str:
        path = self._paths[place[0]]
        try:
            with path.open("rb") as file:
                # Python source names its own encoding in its first lines (PEP 263).
                encoding = (
                    tokenize.detect_encoding(file.readline)[0]
                    if self._python_source
                    else "utf-8-sig"
                )
                file.seek(0)
                return file.read().decode(encoding)
        except UnicodeDecodeError as error:
            raise _not_utf8(self.name(place), error) from error
        except OSError as error:
            raise _unreadable(path, error) from error

    def name(self, place: _Place) -> str:
        return str(self._paths[place[0]])


class _JsonLines:
    """One document per line of a .jsonl file; lines of white space are skipped."""

    def __init__(self, path: pathlib.Path, text_field: str) -> None:
        self._path = path
        self._text_field = text_field

    def scan(self) -> Iterator[tuple[_Place, str]]:
        offset = 0
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    place = (number, offset, len(line))
                    offset += len(line)
                    if line.strip():
                        yield place, self._parse(place, line)
        except OSError as error:
            raise _unreadable(self._path, error) from error

    def read(self, place: _Place) -> str:
        _, offset, length = place
        try:
            with self._path.open("rb") as file:
                file.seek(offset)
                return self._parse(place, file.read(length))
        except OSError as error:
            raise _unreadable(self._path, error) from error

    def name(self, place: _Place) -> str:
        return f"{self._path}:{place[0]}"

    def _parse(self, place: _Place, line: bytes) -> str:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise _not_utf8(self.name(place), error) from error
        except ValueError as error:
            raise ValueError(
                f"DataConfig.source: expected one JSON object per line, got {self.name(place)}: "
                f"{error}; repair or remove the line"
            ) from error
        text = record.get(self._text_field) if isinstance(record, dict) else None
        if isinstance(text, str):
            return text
        found = f"fields {sorted(record)}" if isinstance(record, dict) else "no JSON object"
        raise ValueError(
            f"DataConfig.text_field: expected a string field {self._text_field!r} in "
            f"{self.name(place)}, got {found}; set --data.text-field or repair the line"
        )


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _not_utf8(name: str, error: UnicodeError) -> ValueError:
    return ValueError(
        f"DataConfig.source: expected UTF-8 text, got {name}: {error}; convert or remove it"
    )


def _unreadable(path: pathlib.Path, error: OSError) -> ValueError:
    return ValueError(
        f"DataConfig.source: cannot read {path}: {error.strerror}; "
        f"check the path and its permissions"
    )


def _stdlib_files() -> list[pathlib.Path]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]


def _open_source(source: str, text_field: str) -> _Reader:
    if source == "stdlib":
        return _Files(_stdlib_files(), python_source=True)
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise ValueError(
            f'DataConfig.source: expected "stdlib", a folder of .txt files or a .jsonl file, '
            f"got {source!r}, which does not exist; check the path"
        )
    if path.is_dir():
        return _Files(sorted(path.rglob("*.txt")))
    if path.suffix == ".jsonl":
        return _JsonLines(path, text_field)
    raise ValueError(
        f"DataConfig.source: expected a folder of .txt files or a .jsonl file, got the file "
        f"{source!r}; name its folder or convert it"
    )


class Corpus:
    """The documents of a source that hold more than white space, in a fixed order.

    A random-access sequence of texts: `corpus[i]` reads document i from disk.
    `digests` [n] uint64: a hash of each text. `sizes` [n] int64: its length in UTF-8 bytes.
    """

    def __init__(self, source: str, *, text_field: str) -> None:
        """Reads the whole source once.

        Args:
            source: "stdlib" (the running Python's standard library, without its tests), a folder
                of .txt files (recursive, sorted by path), or a .jsonl file.
            text_field: the field of a .jsonl record that holds the text.

        Raises:
            ValueError: the source is missing, not UTF-8, malformed (file and line are named) or
                holds no document.
        """
        self._reader = _open_source(source, text_field)
        places, digests, sizes = array.array("q"), array.array("Q"), array.array("q")
        for place, text in self._reader.scan():
            if text.strip():
                content = self._encode(place, text)
                places.extend(place)
                digests.append(_digest(content))
                sizes.append(len(content))
        if not sizes:
            raise ValueError(
                f"DataConfig.source: expected at least one non-empty document, got none in "
                f"{source!r}; a folder needs .txt files, a .jsonl file needs records with text"
            )
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self.digests = np.array(digests, np.uint64)
        self.sizes = np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> str:
        """Reads document `index`; ValueError if it is not the text that was there at the start."""
        place = self._place(index)
        text = self._reader.read(place)
        if _digest(self._encode(place, text)) != self.digests[index]:
            raise ValueError(
                f"DataConfig.source: expected {self._reader.name(place)} as it was when the run "
                f"started, got another text; leave the corpus alone while a run reads it"
            )
        return text

    def name(self, index: int) -> str:
        """The file (and line) of document `index`, for messages."""
        return self._reader.name(self._place(index))

    def _place(self, index: int) -> _Place:
        number, offset, length = self._places[index].tolist()
        return number, offset, length

    def _encode(self, place: _Place, text: str) -> bytes:
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise _not_utf8(self._reader.name(place), error) from error
