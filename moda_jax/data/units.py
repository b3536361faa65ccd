"""Units of work: the parts of a source, each of which becomes one shard of tokens.

Where a source is cut follows from its files alone, so that any number of workers makes the same
shards. Every kind of unit lists its documents; a document's text is read when it is asked for, in
parts, so that one bad document can be left out and a long one never has to fit into memory.
"""

import codecs
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from moda_jax.data import arrow
from moda_jax.data.files import (
    JSON_SUFFIXES,
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    find_files,
    has_suffix,
    is_compressed,
    readable,
    unpack,
)

UNIT_BYTES = 1 << 25
"""Of input, about: what one worker takes at a time, and what a killed one loses at most. A source
is cut into `_UNITS` or more, so that many workers have work, unless they were smaller than
`_LEAST_UNIT`."""

_UNITS, _LEAST_UNIT = 64, 1 << 20

KINDS = (
    "a .txt file, a .jsonl file (also .gz, .zst, .xz), a .parquet file, a folder of one of these, "
    "or a Hugging Face dataset's folder"
)

# The test suite is larger than the library, and not the text one wants a model to write.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

_PART_BYTES = 1 << 18
_SECTION_BYTES = 1 << 16
_FEWEST_SECTIONS = 64
_LONG_LINE = 1 << 10
_LEAST_CODE, _MOST_CODE = 500, 300_000
_OPENING_BYTES = 1 << 12
"""What opening a small file costs, as bytes read: a unit of a million empty ones would be slow."""


class BadRecord(ValueError):
    """One document cannot be used; those around it can."""


class Piece(NamedTuple):
    """A part of one file."""

    path: str
    start: int
    """In bytes; of a Parquet or Arrow file in row groups or record batches."""
    end: int


Kind = Literal["texts", "python", "sections", "lines", "parquet", "arrow"]


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one worker reads in one go."""

    kind: Kind
    pieces: tuple[Piece, ...]
    size: int
    """Bytes of input."""
    section_bytes: int = 0
    """Of kind "sections": the length at which a section goes on to the end of its line only."""

    def describe(self) -> str:
        """The files and the range, in words."""
        first, last = self.pieces[0], self.pieces[-1]
        if len(self.pieces) > 1:
            return f"{len(self.pieces):,} files, {first.path} to {last.path}"
        if self.kind in ("texts", "python") or is_compressed(Path(first.path)):
            return first.path
        of = {"parquet": "row groups", "arrow": "record batches"}.get(self.kind, "bytes")
        return f"{first.path}, {of} {first.start:,} to {first.end:,}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Unit":
        return cls(**fields | {"pieces": tuple(Piece(*piece) for piece in fields["pieces"])})


class FileState(NamedTuple):
    """What shows that a file changed, without reading it."""

    path: str
    """Absolute."""
    size: int
    """In bytes."""
    modified: int
    """Nanoseconds."""


class SourcePlan(NamedTuple):
    """A source and how it is cut."""

    units: list[Unit]
    files: list[FileState]
    is_one_text: bool
    """The documents are sections of one text, in its order."""
    ignored: str
    """How many files of a folder are not read, by kind, for messages; or empty."""


class Document(NamedTuple):
    """One document of a unit, not read yet."""

    name: Callable[[], str]
    """The file (and line), for messages."""
    parts: Callable[[], Iterable[str]]
    """Reads the text, in parts; raises BadRecord if it cannot be used."""
    consumed: int
    """Bytes of the unit's input up to the end of this document, about."""


def list_stdlib() -> list[Path]:
    """The source files of the running Python's standard library, without its tests; sorted."""
    return _list_python(sysconfig.get_paths()["stdlib"], _SKIPPED_FOLDERS)


def list_python() -> list[Path]:
    """The source files of the standard library and of the installed packages; sorted.

    Those of 500 bytes to 300 KB, tests included, one of several equal ones.
    """
    places = sysconfig.get_paths()
    found: dict[Path, None] = {}
    for place in ("stdlib", "purelib", "platlib"):
        found.update(dict.fromkeys(_list_python(places[place], {"__pycache__"})))
    sized = [(path, path.stat().st_size) for path in found if path.is_file()]
    kept = [(path, size) for path, size in sized if _LEAST_CODE <= size <= _MOST_CODE]
    # Of files with one name and size the content is looked at; a copy has both.
    alike = collections.Counter((path.name, size) for path, size in kept)
    seen: set[bytes] = set()
    unique = []
    for path, size in sorted(kept):
        if alike[path.name, size] > 1:
            digest = hashlib.blake2b(path.read_bytes()).digest()
            if digest in seen:
                continue
            seen.add(digest)
        unique.append(path)
    return unique


def _list_python(place: str, skipped: Set[str]) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(place):
        folders[:] = set(folders) - skipped
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


NAMED = {"stdlib": list_stdlib, "python": list_python}
"""Texts that are no file or folder of the user's, by the name that a source gives them."""


def list_files(source: str, *, leave_out: Path | None = None) -> tuple[Kind, list[Path], str]:
    """The kind of a source, its files in order, and those of other kinds in its folder, in words.

    Args:
        source: "stdlib" (the running Python's standard library, without its tests), "python"
            (that and the installed packages), a .txt file (one text in sections), a .jsonl file,
            which may end in .gz, .zst or .xz, a .parquet file, a folder of .txt or else .jsonl or
            else .parquet files (recursive, sorted by path), or a folder that Hugging Face's
            `save_to_disk` wrote.
        leave_out: a folder in that of the source that is not part of it.

    Raises:
        ValueError: there is no such source, or it is of another kind.
    """
    if source in NAMED:
        return "python", NAMED[source](), ""
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(
            f'DataConfig.source: expected "stdlib", "python", {KINDS}, got {source!r}, which does '
            f"not exist; check the path"
        )
    if path.is_dir():
        if (saved := arrow.list_saved_dataset(path)) is not None:
            return "arrow", saved, ""
        found = find_files(
            path, (TEXT_SUFFIXES, JSON_SUFFIXES, PARQUET_SUFFIXES), leave_out=leave_out
        )
        ignored = ", ".join(f"{count} {kind}" for kind, count in found.others.items())
        kinds = {_kind_of(file) for file in found.paths} or {"texts"}
        return kinds.pop(), found.paths, ignored
    if has_suffix(path, TEXT_SUFFIXES):
        return "sections", [path], ""
    if has_suffix(path, (*JSON_SUFFIXES, *PARQUET_SUFFIXES)):
        return _kind_of(path), [path], ""
    raise ValueError(
        f"DataConfig.source: expected {KINDS}, got the file {source!r}; convert or rename it"
    )


def _kind_of(path: Path) -> Kind:
    if has_suffix(path, TEXT_SUFFIXES):
        return "texts"
    return "lines" if has_suffix(path, JSON_SUFFIXES) else "parquet"


def stat_files(paths: Iterable[Path]) -> list[FileState]:
    """Raises ValueError, naming it, for a file that is not there."""
    states = []
    for path in paths:
        with readable(path):
            status = path.stat()
        states.append(FileState(os.path.abspath(path), status.st_size, status.st_mtime_ns))
    return states


def plan_source(source: str, *, text_field: str, leave_out: Path | None = None) -> SourcePlan:
    """Cuts a source, as `list_files` describes it, into units; reads little of it.

    Raises ValueError if the source cannot be used, or no Parquet or Arrow column has that name.
    """
    kind, paths, ignored = list_files(source, leave_out=leave_out)
    files = stat_files(paths)
    unit_bytes = min(UNIT_BYTES, max(_LEAST_UNIT, sum(file.size for file in files) // _UNITS))
    section_bytes = 0
    pieces: Iterator[tuple[Piece, int]]
    if kind in ("texts", "python"):
        pieces = (
            (Piece(str(path), 0, state.size), state.size + _OPENING_BYTES)
            for path, state in zip(paths, files, strict=True)
        )
    elif kind == "sections":
        size = files[0].size
        section_bytes = max(1, min(_SECTION_BYTES, size // _FEWEST_SECTIONS))
        cuts = _cut_sections(paths[0], size, section_bytes, unit_bytes)
        pieces = _ranges(paths[0], cuts)
    elif kind == "lines":
        pieces = itertools.chain.from_iterable(
            _ranges(
                path,
                [0, state.size]
                if is_compressed(path)
                else _cut_lines(path, state.size, unit_bytes),
            )
            for path, state in zip(paths, files, strict=True)
        )
    else:
        groups = arrow.list_row_groups if kind == "parquet" else arrow.list_record_batches
        pieces = (
            (Piece(str(path), number, number + 1), size)
            for path in paths
            for number, size in enumerate(groups(path, text_field))
        )
    units = list(_gather(kind, pieces, section_bytes, unit_bytes))
    return SourcePlan(units, files, kind == "sections", ignored)


def _ranges(path: Path, cuts: list[int]) -> Iterator[tuple[Piece, int]]:
    for start, end in itertools.pairwise(cuts):
        yield Piece(str(path), start, end), end - start


def _gather(
    kind: Kind, pieces: Iterable[tuple[Piece, int]], section_bytes: int, unit_bytes: int
) -> Iterator[Unit]:
    """Units of pieces in a row; small files share one, a compressed file has its own."""
    gathered: list[Piece] = []
    size = 0

    def unit() -> Unit:
        return Unit(kind, tuple(gathered), size, section_bytes)

    for piece, piece_size in pieces:
        alone = is_compressed(Path(piece.path))
        if gathered and (alone or size + piece_size > unit_bytes):
            yield unit()
            gathered, size = [], 0
        if gathered and gathered[-1].path == piece.path and gathered[-1].end == piece.start:
            gathered[-1] = gathered[-1]._replace(end=piece.end)
        else:
            gathered.append(piece)
        size += piece_size
        if alone or size >= unit_bytes:
            yield unit()
            gathered, size = [], 0
    if gathered:
        yield unit()


def _cut_lines(path: Path, size: int, unit_bytes: int) -> list[int]:
    """The first line starts after each `unit_bytes`, with 0 and `size`."""
    cuts = [0]
    with readable(path), path.open("rb") as file:
        for target in range(unit_bytes, size, unit_bytes):
            if target <= cuts[-1]:
                continue
            if (start := _next_line(file, target)) >= size:
                break
            cuts.append(start)
    return [*cuts, size]


def _next_line(file: IO[bytes], position: int) -> int:
    """The start of the first line that begins at `position` or later; the end if none does."""
    file.seek(position - 1)
    while block := file.read(1 << 16):
        if (found := block.find(b"\n")) >= 0:
            return file.tell() - len(block) + found + 1
    return file.tell()


def _cut_sections(path: Path, size: int, section_bytes: int, unit_bytes: int) -> list[int]:
    """The first section starts after each `unit_bytes`, with 0 and `size`."""
    cuts, end = [0], 0
    with readable(path), path.open("rb") as file:
        while end < size:
            file.seek(end + section_bytes)
            end += section_bytes + len(_rest_of_section(file, section_bytes))
            if end - cuts[-1] >= unit_bytes and end < size:
                cuts.append(end)
    return [*cuts, size]


def _rest_of_section(file: IO[bytes], section_bytes: int) -> bytes:
    return rest_of_line(file, max(section_bytes, _LONG_LINE))


def rest_of_line(file: IO[bytes], at_most: int) -> bytes:
    """Reads to the end of the line; where that is farther, to the end of a character (UTF-8)."""
    rest = file.readline(at_most)
    for _ in range(3):  # a character has no more bytes after its first one
        if rest.endswith(b"\n") or not (byte := file.read(1)):
            break
        if byte[0] & 0xC0 != 0x80:  # the next character begins here
            file.seek(-1, os.SEEK_CUR)
            break
        rest += byte
    return rest


def read_unit(unit: Unit, text_field: str) -> Iterator[Document]:
    """The documents of a unit, in order, blank ones included.

    Raises ValueError if a file cannot be read; what is wrong with one document is raised when its
    parts are read.
    """
    readers: dict[Kind, Callable[[Piece], Iterator[Document]]] = {
        "texts": _read_text_file,
        "python": _read_python_file,
        "sections": functools.partial(_read_sections, section_bytes=unit.section_bytes),
        "lines": functools.partial(_read_lines, text_field=text_field),
        "parquet": functools.partial(_read_rows, text_field=text_field, rows=arrow.parquet_rows),
        "arrow": functools.partial(_read_rows, text_field=text_field, rows=arrow.stream_rows),
    }
    before = 0
    for number, piece in enumerate(unit.pieces):
        for document in readers[unit.kind](piece):
            yield document._replace(consumed=before + document.consumed)
        before = unit.size * (number + 1) // len(unit.pieces)


def _read_text_file(piece: Piece) -> Iterator[Document]:
    yield Document(lambda: piece.path, lambda: _text_parts(piece.path), piece.end)


def _text_parts(name: str) -> Iterator[str]:
    path = Path(name)
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with readable(path), path.open("rb") as file:
        while True:
            block = file.read(_PART_BYTES)
            held = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                where = offset - held + error.start
                raise _not_utf8(
                    name,
                    f"'utf-8' codec can't decode byte 0x{error.object[error.start]:02x} in "
                    f"position {where}: {error.reason}",
                ) from error
            if not block:
                return
            offset += len(block)


def _read_python_file(piece: Piece) -> Iterator[Document]:
    def parts() -> Iterator[str]:
        path = Path(piece.path)
        with readable(path), path.open("rb") as file:
            # Python source names its own encoding in its first lines (PEP 263).
            try:
                encoding = tokenize.detect_encoding(file.readline)[0]
                file.seek(0)
                text = _decode(file.read(), encoding, lambda: piece.path)
            except (SyntaxError, LookupError) as error:  # no such encoding, or none of text
                raise _not_utf8(piece.path, error) from error
            yield text

    yield Document(lambda: piece.path, parts, piece.end)


def _read_sections(piece: Piece, section_bytes: int) -> Iterator[Document]:
    path = Path(piece.path)
    with readable(path), path.open("rb") as file:
        file.seek(piece.start)
        start = piece.start
        while start < piece.end and (section := file.read(section_bytes)):
            section += _rest_of_section(file, section_bytes)
            end = start + len(section)
            name = functools.partial("{}, bytes {} to {}".format, path, start, end)
            encoding = "utf-8" if start else "utf-8-sig"
            parts = functools.partial(_decoded, section, encoding, name)
            yield Document(name, parts, end - piece.start)
            start = end


def _read_lines(piece: Piece, text_field: str) -> Iterator[Document]:
    path = Path(piece.path)
    packed = is_compressed(path)
    with readable(path), path.open("rb") as raw, unpack(raw, path) as file:
        if not packed:
            file.seek(piece.start)
        start, number = piece.start, 0
        while (packed or start < piece.end) and (line := file.readline()):
            number += 1
            end = start + len(line)
            if line.strip():
                name = (
                    functools.partial("{}:{}".format, path, number)
                    if packed
                    else functools.partial(_name_line, path, start)
                )
                consumed = raw.tell() if packed else end - piece.start
                yield Document(name, functools.partial(_parse, line, text_field, name), consumed)
            start = end


def _name_line(path: Path, start: int) -> str:
    """Counts the lines before the byte `start`: only for a message, so nobody else pays for it."""
    lines, left = 1, start
    with readable(path), path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            lines += block.count(b"\n")
            left -= len(block)
    return f"{path}:{lines}"


def _parse(line: bytes, text_field: str, name: Callable[[], str]) -> tuple[str]:
    content = _decode(line, "utf-8-sig", name)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRecord(
            f"DataConfig.source: expected one JSON object per line, got {name()}: "
            f"{error}; repair or remove the line"
        ) from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if isinstance(text, str):
        return (text,)
    found = f"fields {sorted(record)}" if isinstance(record, dict) else "no JSON object"
    raise BadRecord(
        f"DataConfig.text_field: expected a string field {text_field!r} in {name()}, got {found}; "
        f"set --data.text-field (of moda-jax prepare: --text-field) or repair the line"
    )


def _read_rows(
    piece: Piece, text_field: str, rows: Callable[..., Iterator[arrow.Row]]
) -> Iterator[Document]:
    path = Path(piece.path)
    with readable(path):
        for row in rows(path, piece.start, piece.end, text_field):
            name = functools.partial("{}, row {}".format, path, row.number)
            yield Document(name, functools.partial(_row_text, row, text_field, name), row.consumed)


def _row_text(row: arrow.Row, text_field: str, name: Callable[[], str]) -> tuple[str]:
    try:
        text = row.read()
    except UnicodeDecodeError as error:
        raise _not_utf8(name(), error) from error
    if text is None:
        raise BadRecord(
            f"DataConfig.text_field: expected a string in the column {text_field!r} of {name()}, "
            f"got null; fill or remove the row"
        )
    return (text,)


def encode_utf8(text: str, name: Callable[[], str]) -> bytes:
    """The bytes of a document; BadRecord, with its name, if it holds half a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise _not_utf8(name(), error) from error


def _decoded(content: bytes, encoding: str, name: Callable[[], str]) -> tuple[str]:
    return (_decode(content, encoding, name),)


def _decode(content: bytes, encoding: str, name: Callable[[], str]) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_utf8(name(), error) from error


def _not_utf8(name: str, error: object) -> BadRecord:
    return BadRecord(
        f"DataConfig.source: expected UTF-8 text, got {name}: {error}; convert or remove it"
    )
