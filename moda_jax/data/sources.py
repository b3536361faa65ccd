"""Where documents come from: text files, sections of one long text, lines of JSON.

Every kind lists its documents with their places, reads one again by its place, and names it in
errors.
"""

import json
import os
import tempfile
import tokenize
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

from moda_jax.data.files import is_compressed, open_binary, readable

_SECTION_BYTES = 1 << 16
_FEWEST_SECTIONS = 64
_LONG_LINE = 1 << 10

Place = tuple[int, int]
"""Byte offset and length in bytes."""


class Source(Protocol):
    """One file, of a kind."""

    def scan(self) -> Iterator[tuple[Place, str]]:
        """Every document with its place, in order. Raises ValueError for what cannot be read."""
        ...

    def read(self, place: Place) -> str:
        """The document at a place that `scan` gave."""
        ...

    def name(self, place: Place) -> str:
        """The file, and where in it, for messages."""
        ...


class TextFile:
    """A file that is one document."""

    def __init__(self, path: Path, *, python_source: bool = False) -> None:
        self._path = path
        self._python_source = python_source

    def scan(self) -> Iterator[tuple[Place, str]]:
        yield (0, 0), self.read((0, 0))

    def read(self, place: Place) -> str:
        with readable(self._path), self._path.open("rb") as file:
            # Python source names its own encoding in its first lines (PEP 263).
            encoding = (
                tokenize.detect_encoding(file.readline)[0] if self._python_source else "utf-8-sig"
            )
            file.seek(0)
            return _decode(file.read(), encoding, lambda: self.name(place))

    def name(self, place: Place) -> str:
        return str(self._path)


class SectionedText:
    """One text, cut at line ends into sections that are documents of their own.

    A section has about 64 KiB, a short text about 64 sections: enough to share out to processes,
    and to hold the last ones out.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def scan(self) -> Iterator[tuple[Place, str]]:
        with readable(self._path), self._path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            wanted = max(1, min(_SECTION_BYTES, size // _FEWEST_SECTIONS))
            offset = 0
            while section := file.read(wanted):
                section += _rest_of_line(file, max(wanted, _LONG_LINE))
                place = (offset, len(section))
                offset += len(section)
                yield place, self._decode(place, section)

    def read(self, place: Place) -> str:
        return self._decode(place, _read_at(self._path, place))

    def name(self, place: Place) -> str:
        return f"{self._path}, bytes {place[0]} to {sum(place)}"

    def _decode(self, place: Place, section: bytes) -> str:
        encoding = "utf-8" if place[0] else "utf-8-sig"
        return _decode(section, encoding, lambda: self.name(place))


class JsonLines:
    """One document per line of a .jsonl file, plain or compressed; blank lines are skipped.

    A compressed file cannot be read at random: its lines are copied, once, into `unpacked`.
    """

    def __init__(self, path: Path, text_field: str, unpacked: "Unpacked") -> None:
        self._path = path
        self._text_field = text_field
        self._unpacked = unpacked if is_compressed(path) else None
        self._start = 0

    def scan(self) -> Iterator[tuple[Place, str]]:
        if self._unpacked is not None:
            self._start = self._unpacked.size
        offset = self._start
        with readable(self._path), open_binary(self._path) as file:
            for line in file:
                if self._unpacked is not None:
                    self._unpacked.append(line)
                place = (offset, len(line))
                offset += len(line)
                if line.strip():
                    yield place, self._parse(place, line)

    def read(self, place: Place) -> str:
        return self._parse(place, self._read_at(place))

    def name(self, place: Place) -> str:
        return f"{self._path}:{1 + self._count_lines(place[0])}"

    def _count_lines(self, end: int) -> int:
        block = 1 << 20
        return sum(
            self._read_at((start, min(block, end - start))).count(b"\n")
            for start in range(self._start, end, block)
        )

    def _read_at(self, place: Place) -> bytes:
        return _read_at(self._path, place) if self._unpacked is None else self._unpacked.read(place)

    def _parse(self, place: Place, line: bytes) -> str:
        content = _decode(line, "utf-8-sig", lambda: self.name(place))
        try:
            record = json.loads(content)
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


class Unpacked:
    """The lines of compressed files in one nameless temporary file, in the folder TMPDIR."""

    def __init__(self) -> None:
        self.size = 0
        self._file: IO[bytes] | None = None

    def append(self, line: bytes) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the corpus)
                weakref.finalize(self, self._file.close)
            self._file.write(line)
        except OSError as error:
            raise ValueError(
                f"DataConfig.source: cannot unpack into {tempfile.gettempdir()}: "
                f"{error.strerror}; make room there, or set TMPDIR to another folder"
            ) from error
        self.size += len(line)

    def read(self, place: Place) -> bytes:
        assert self._file is not None
        self._file.flush()
        # By offset: the threads that read have no position in common.
        return os.pread(self._file.fileno(), place[1], place[0])


def encode_utf8(text: str, name: Callable[[], str]) -> bytes:
    """The bytes of a document; ValueError, with its name, if it holds half a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise _not_utf8(name(), error) from error


def _decode(content: bytes, encoding: str, name: Callable[[], str]) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_utf8(name(), error) from error


def _not_utf8(name: str, error: UnicodeError) -> ValueError:
    return ValueError(
        f"DataConfig.source: expected UTF-8 text, got {name}: {error}; convert or remove it"
    )


def _read_at(path: Path, place: Place) -> bytes:
    with readable(path), path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _rest_of_line(file: IO[bytes], at_most: int) -> bytes:
    """Reads to the end of the line; where that is farther, to the end of a character (UTF-8)."""
    rest = file.readline(at_most)
    while not rest.endswith(b"\n") and (byte := file.read(1)):
        if byte[0] & 0xC0 != 0x80:  # the next character begins here
            file.seek(-1, os.SEEK_CUR)
            break
        rest += byte
    return rest
