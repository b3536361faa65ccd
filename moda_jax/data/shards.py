"""Shards of a prepared folder: one unit of work, tokenized into one ArrayRecord file."""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from moda_jax.data.files import hash_file
from moda_jax.data.sections import sections_of
from moda_jax.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from moda_jax.data.units import BadRecord, Document, Unit, encode_utf8, read_unit

BLOCK_TOKENS = 2048
_WRITER_OPTIONS = "group_size:1,uncompressed"

_BATCH_CHARACTERS = 1 << 18
_HELD_TOKENS = 1 << 22
_WRITTEN_TOKENS = 1 << 16

OnError = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class Job:
    """What the units of one folder have in common."""

    folder: str
    text_field: str
    on_error: OnError
    eos_token: str | None
    has_file: bool
    """The tokenizer is the tokenizer.json in `folder`, else bytes."""

    def load_tokenizer(self) -> Tokenizer:
        if not self.has_file:
            return ByteTokenizer()
        return load_tokenizer(str(Path(self.folder, TOKENIZER_FILE)), self.eos_token)


@dataclasses.dataclass
class Progress:
    """What was done of a unit so far."""

    consumed: int = 0
    """Bytes of input."""
    documents: int = 0
    tokens: int = 0
    """Those that end documents included."""
    bytes: int = 0
    """UTF-8, of the documents that were kept."""
    skipped: int = 0
    """Bad documents."""


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """uint16, or uint32 if the ids need it; little-endian."""
    dtype = np.promote_types(np.min_scalar_type(tokenizer.vocab_size - 1), np.uint16)
    return np.dtype(dtype).newbyteorder("<")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def write_shard(
    job: Job,
    tokenizer: Tokenizer,
    number: int,
    unit: Unit,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Tokenizes a unit into shard `number` and returns the shard's entry of the index.

    Three files appear in the folder, each whole: NAME.array_record; NAME.npy, uint64 [3,
    documents]: stream tokens up to the end of each document, digests, UTF-8 bytes; and last
    NAME.json, the entry. A shard without documents has the last one alone.

    Raises:
        ValueError: the input cannot be used; names the file and the line.
        OSError: the folder cannot be written to.
    """
    folder, name = Path(job.folder), shard_name(number)
    records = folder / f"{name}.array_record"
    with whole_file(records) as partial:
        writer = _Writer(job, tokenizer, partial)
        try:
            writer.write(read_unit(unit, job.text_field), report)
        finally:
            writer.close()
        size, sha256 = partial.stat().st_size, hash_file(partial)
    ends, digests, sizes = (np.array(values, np.uint64) for values in writer.table())
    if len(ends):
        with whole_file(folder / f"{name}.npy") as partial, partial.open("wb") as file:
            np.save(file, np.stack((ends, digests, sizes)))
    else:
        records.unlink()
    progress = writer.progress
    entry = {
        "file": records.name,
        "source": unit.describe(),
        "documents": progress.documents,
        "tokens": progress.tokens,
        "bytes": progress.bytes,
        "skipped": progress.skipped,
        "size": size,
        "sha256": sha256,
    }
    write_json(folder / f"{name}.json", entry)
    return entry


def read_finished(folder: Path, number: int, *, on_error: OnError) -> dict[str, Any] | None:
    """The entry of shard `number`, if its files are whole and no document was left out in vain."""
    name = shard_name(number)
    try:
        entry = json.loads((folder / f"{name}.json").read_bytes())
        if entry["skipped"] and on_error == "stop":
            return None
        if not entry["documents"]:
            return entry
        documents = np.load(folder / f"{name}.npy", mmap_mode="r")
        is_whole = documents.shape == (3, entry["documents"])
        return (
            entry if is_whole and (folder / entry["file"]).stat().st_size == entry["size"] else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is there whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name, which becomes `path` at the end, on the disk; removed after an error."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class _Text:
    """A document on its way: its parts are read, then tokenized, then written."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.hash = hashlib.blake2b(digest_size=8)
        self.size = 0
        self.is_blank = True
        """So far."""
        self.is_read = False
        self.error: ValueError | None = None
        self.tokens = _Tokens()

    def parts(self) -> Iterator[str]:
        for part in self.document.parts():
            content = encode_utf8(part, self.document.name)
            self.hash.update(content)
            self.size += len(content)
            self.is_blank = self.is_blank and not part.strip()
            yield part
        self.is_read = True


class _Tokens:
    """The tokens of one document, kept until it is certain that it is wanted; many are on disk."""

    def __init__(self) -> None:
        self.count = 0
        self._arrays: list[np.ndarray] = []
        self._held = 0
        self._file: IO[bytes] | None = None
        self._dtype = np.dtype(np.uint8)

    def append(self, tokens: np.ndarray) -> None:
        self.count += len(tokens)
        self._held += len(tokens)
        self._arrays.append(tokens)
        if self._held > _HELD_TOKENS:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed when it was read)
            self._dtype = tokens.dtype
            for array in self._arrays:
                self._file.write(array.tobytes())
            self._arrays, self._held = [], 0

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._file is not None:
            self._file.seek(0)
            while content := self._file.read(_WRITTEN_TOKENS * self._dtype.itemsize):
                yield np.frombuffer(content, self._dtype)
        yield from self._arrays

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._arrays = []


class _Writer:
    """Documents into the token stream of one shard."""

    def __init__(self, job: Job, tokenizer: Tokenizer, path: Path) -> None:
        self.progress = Progress()
        self._skips = job.on_error == "skip"
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer)
        self._end = np.array([tokenizer.eos_id], self._dtype)
        self._sections = sections_of(tokenizer)
        self._records = _open_writer(path)
        self._path = path
        self._queue: list[tuple[_Text, str]] = []
        self._queued = 0
        self._stream: list[np.ndarray] = []
        self._streamed = 0
        self._table: tuple[list[int], list[int], list[int]] = ([], [], [])

    def table(self) -> tuple[list[int], list[int], list[int]]:
        """The ends, digests and sizes of the documents."""
        return self._table

    def write(self, documents: Iterator[Document], report: Callable[[Progress], None]) -> None:
        for document in documents:
            self._add(_Text(document))
            self.progress.consumed = document.consumed
            report(self.progress)
        self._encode()
        report(self.progress)
        self._write_blocks(last=True)

    def close(self) -> None:
        try:
            self._records.close()
        except RuntimeError as error:
            raise OSError(f"cannot write {self._path}: {error}") from error

    def _add(self, text: _Text) -> None:
        """Queues the sections of a document, and an empty one that ends it."""
        try:
            for section in self._sections(text.parts()):
                if section:
                    self._enqueue(text, section)
        except BadRecord as error:
            if not self._skips:
                raise
            text.error = error
        self._enqueue(text, "")

    def _enqueue(self, text: _Text, section: str) -> None:
        self._queue.append((text, section))
        self._queued += len(section)
        if self._queued >= _BATCH_CHARACTERS or len(self._queue) >= _BATCH_CHARACTERS >> 4:
            self._encode()

    def _encode(self) -> None:
        queue, self._queue, self._queued = self._queue, [], 0
        # Not the empty ones, which only mark ends, nor those of texts that are known to be blank.
        wanted = [
            (text, section)
            for text, section in queue
            if section and not (text.is_blank and text.is_read)
        ]
        sections = [section for _, section in wanted]
        try:
            arrays = self._tokenizer.encode_batch(sections) if sections else []
        except ValueError:
            arrays = [self._encode_one(text, section) for text, section in wanted]
        for (text, _), array in zip(wanted, arrays, strict=True):
            text.tokens.append(array)
        for text, section in queue:
            if not section:
                self._finish(text)

    def _encode_one(self, text: _Text, section: str) -> np.ndarray:
        try:
            (array,) = self._tokenizer.encode_batch([section])
            return array
        except ValueError as error:
            named = ValueError(f"{error} (in {text.document.name()})")
            if not self._skips:
                raise named from error
            text.error = named
            return np.empty(0, self._dtype)

    def _finish(self, text: _Text) -> None:
        if text.error is not None:
            self.progress.skipped += 1
        elif not text.is_blank and text.tokens.count:
            for array in text.tokens:
                self._put(array)
            self._put(self._end)
            progress = self.progress
            progress.documents += 1
            progress.tokens += text.tokens.count + 1
            progress.bytes += text.size
            digest = int.from_bytes(text.hash.digest())
            for column, value in zip(
                self._table, (progress.tokens, digest, text.size), strict=True
            ):
                column.append(value)
        text.tokens.close()

    def _put(self, tokens: np.ndarray) -> None:
        self._stream.append(tokens)
        self._streamed += len(tokens)
        if self._streamed >= _WRITTEN_TOKENS:
            self._write_blocks(last=False)

    def _write_blocks(self, *, last: bool) -> None:
        stream = np.concatenate([np.empty(0, self._dtype), *self._stream], dtype=self._dtype)
        whole = len(stream) if last else len(stream) // BLOCK_TOKENS * BLOCK_TOKENS
        try:
            for start in range(0, whole, BLOCK_TOKENS):
                self._records.write(stream[start : min(start + BLOCK_TOKENS, whole)].tobytes())
        except RuntimeError as error:
            raise OSError(f"cannot write {self._path}: {error}") from error
        self._stream = [stream[whole:].copy()]
        self._streamed = len(stream) - whole


def _open_writer(path: Path) -> Any:
    try:
        return ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    except RuntimeError as error:
        raise OSError(f"cannot write {path}: {error}") from error
