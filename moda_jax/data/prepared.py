"""Prepared text: token shards and their index, as `moda_jax.data.prepare` writes them.

A folder holds index.json (sizes, shards, tokenizer), the shards, and memory-mapped arrays of one
number a document. The documents' tokens, each followed by eos, are one stream over all shards; a
shard is an ArrayRecord file whose records are blocks of that stream.
"""

import bisect
import collections
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from moda_jax.data.files import hash_file

INDEX_FILE = "index.json"
FORMAT = 1
_READER_OPTIONS = "readahead_buffer_size:0"  # documents are read in a random order


class Block(NamedTuple):
    """A record of a shard."""

    shard: int
    record: int


class UnreadableBlockError(ValueError):
    """A block that cannot be read as it was written; `block` says which."""

    def __init__(self, message: str, block: Block) -> None:
        super().__init__(message)
        self.block = block


class PreparedText:
    """A prepared folder, opened for reading.

    `ends` [N] int64: the stream's length up to each document's end. `digests` [N] uint64: a hash
    of each text. `sizes` [N] int64: UTF-8 bytes. All are memory-mapped.
    """

    def __init__(self, folder: Path, *, cached_tokens: int = 0, open_shards: int = 64) -> None:
        """Opens `folder`, and checks what is read by its place.

        Args:
            folder: prepared text.
            cached_tokens: how many of the tokens that were read last are kept in memory.
            open_shards: how many files are open at a time.

        Raises:
            ValueError: the folder is incomplete, damaged or unknown; the file is named.
        """
        self.folder = folder
        self.index = read_index(folder)
        self.dtype = np.dtype(self.index["dtype"]).newbyteorder("<")
        self.eos_id: int = self.index["tokenizer"]["eos_id"]
        self.vocab_size: int = self.index["tokenizer"]["vocab_size"]
        self.ends = self._array("ends", np.int64)
        self.digests = self._array("digests", np.uint64)
        self.sizes = self._array("sizes", np.int64)
        self._block_tokens: int = self.index["block_tokens"]
        shards = self.index["shards"]
        tokens = [shard["tokens"] for shard in shards]
        blocks = [-(-count // self._block_tokens) for count in tokens]
        self._first_token = np.cumsum([0, *tokens])
        self._first_block = np.cumsum([0, *blocks])
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._cache: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._cached_blocks = cached_tokens // self._block_tokens
        self._open_shards = open_shards
        self._check()

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def num_tokens(self) -> int:
        """Of the stream: every document's tokens and its end."""
        return int(self._first_token[-1])

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Stream tokens of documents, their ends included, int64."""
        return self.ends[documents] - self.starts(documents)

    def starts(self, documents: np.ndarray) -> np.ndarray:
        """Where documents begin in the stream, int64."""
        return np.where(documents > 0, self.ends[np.maximum(documents, 1) - 1], 0)

    def name(self, position: int) -> str:
        """The shard and the document that holds a token of the stream, for messages."""
        document = int(np.searchsorted(self.ends, position, side="right"))
        shard = self._shard_of(position)
        return f"{self._path(shard)}, document {document} ({self.index['shards'][shard]['source']})"

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens [start, start + length) of several places, one behind the other.

        Args:
            starts: [n] int64, positions in the stream.
            lengths: [n] int64, at least 1; no range goes beyond its shard.

        Raises:
            UnreadableBlockError: a record is damaged or gone.
        """
        shard = np.searchsorted(self._first_token, starts, side="right") - 1
        within = starts - self._first_token[shard]
        first = self._first_block[shard] + within // self._block_tokens
        last = self._first_block[shard] + (within + lengths - 1) // self._block_tokens
        blocks = np.unique(ranges(first, last - first + 1))
        buffer = self._read_blocks(blocks)
        # Blocks that follow each other in a shard do so in the buffer, too.
        place = np.searchsorted(blocks, first) * self._block_tokens + within % self._block_tokens
        return buffer[ranges(place, lengths)]

    def unreadable(self, starts: np.ndarray, lengths: np.ndarray, block: Block) -> np.ndarray:
        """[n] bool: which ranges have tokens in `block`."""
        first = self._first_token[block.shard] + block.record * self._block_tokens
        return (starts < first + self._block_tokens) & (starts + lengths > first)

    def _read_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """Blocks of equal size, one behind the other; what a shard's last one lacks is 0."""
        contents = [self._cache.get(block, b"") for block in blocks.tolist()]
        missing = np.array([i for i, content in enumerate(contents) if not content], np.int64)
        shards = np.searchsorted(self._first_block, blocks[missing], side="right") - 1
        for shard in np.unique(shards).tolist():
            places = missing[shards == shard]
            records = (blocks[places] - self._first_block[shard]).tolist()
            found = self._read_records(shard, records)
            for place, record, content in zip(places.tolist(), records, found, strict=True):
                contents[place] = self._whole(shard, record, content)
        for block, content in zip(blocks.tolist(), contents, strict=True):
            self._cache[block] = content
            self._cache.move_to_end(block)
        while len(self._cache) > self._cached_blocks:
            self._cache.popitem(last=False)
        return np.frombuffer(b"".join(contents), self.dtype)

    def _whole(self, shard: int, record: int, content: bytes) -> bytes:
        """A record's content, filled up to the size of a block."""
        size = self._block_tokens
        expected = min(size, self.index["shards"][shard]["tokens"] - record * size)
        if len(content) != expected * self.dtype.itemsize:
            raise self._unreadable(shard, record, f"{len(content)} bytes")
        return content.ljust(size * self.dtype.itemsize, b"\0")

    def _read_records(self, shard: int, records: list[int]) -> list[bytes]:
        reader = self._reader(shard)
        try:
            return reader.read(records)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            for record in records:  # which of them it is
                try:
                    reader.read([record])
                except (RuntimeError, ValueError, IndexError, OSError) as one:
                    raise self._unreadable(shard, record, one) from one
            raise self._unreadable(shard, records[0], error) from error

    def _reader(self, shard: int) -> Any:
        reader = self._readers.pop(shard, None)
        if reader is None:
            self._check_size(shard)
            while len(self._readers) >= self._open_shards:
                self._readers.popitem(last=False)[1].close()
            try:  # what fails here is the system's, or all of the shard: nothing to read past
                reader = ArrayRecordReader(str(self._path(shard)), _READER_OPTIONS)
            except (RuntimeError, ValueError, OSError) as error:
                raise ValueError(
                    f"{self._path(shard)}: expected a shard that can be opened, got "
                    f"{' '.join(str(error).split())[:200]}"
                ) from error
        self._readers[shard] = reader
        return reader

    def _unreadable(self, shard: int, record: int, reason: object) -> UnreadableBlockError:
        return UnreadableBlockError(
            f"{self._path(shard)}: expected record {record} as it was written, got "
            f"{' '.join(str(reason).split())[:200]}; prepare the text again, or read past what is "
            f"damaged with --data.on-error skip",
            Block(shard, record),
        )

    def _shard_of(self, position: int) -> int:
        return bisect.bisect_right(self._first_token, position) - 1

    def _path(self, shard: int) -> Path:
        return self.folder / self.index["shards"][shard]["file"]

    def _array(self, name: str, dtype: Any) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            is_as_written = hash_file(path) == self.index["arrays"].get(path.name)
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: expected an array, got {error}; prepare again") from error
        if not is_as_written:  # a wrong place of a document would be a wrong row, silently
            raise ValueError(f"{path}: expected the array that was written, got another; prepare "
                             f"again")  # fmt: skip
        expected = (self.index["documents"],)
        if array.shape != expected or array.dtype != dtype:
            raise ValueError(
                f"{path}: expected {expected} of {np.dtype(dtype)}, got {array.shape} of "
                f"{array.dtype}; prepare again"
            )
        return array.view(np.ndarray)  # indexing a memmap itself costs more

    def _check(self) -> None:
        ends = self.ends
        total = int(ends[-1]) if len(ends) else 0
        if total != self.num_tokens or (len(ends) and int(ends[0]) < 1):
            raise ValueError(
                f"{self.folder}: expected {self.num_tokens:,} tokens in ends.npy, as in the "
                f"shards, got {total:,}; prepare again"
            )
        for shard in range(len(self.index["shards"])):
            self._check_size(shard)

    def _check_size(self, shard: int) -> None:
        path, expected = self._path(shard), self.index["shards"][shard]["size"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ValueError(f"{path}: expected a shard, got {error.strerror}") from error
        if size != expected:
            raise ValueError(
                f"{path}: expected {expected:,} bytes, as its index says, got {size:,}; copy it "
                f"again, or prepare again"
            )


def read_index(folder: Path) -> dict[str, Any]:
    """What index.json says. Raises ValueError, naming the file and the field."""
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the index of prepared text, got {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"{path}: expected format {FORMAT}, got {found!r}; prepare again")
    _check_fields(path, index, _FIELDS)
    _check_fields(path, index["tokenizer"], _TOKENIZER_FIELDS, "tokenizer.")
    for number, shard in enumerate(index["shards"]):
        _check_fields(path, shard, _SHARD_FIELDS, f"shards[{number}].")
        if Path(shard["file"]).name != shard["file"]:
            raise ValueError(f"{path}: expected a file of this folder, got {shard['file']!r}")
    if index["dtype"] not in ("uint16", "uint32") or not 0 < index["block_tokens"] <= 1 << 24:
        raise ValueError(
            f"{path}: expected dtype uint16 or uint32 and block_tokens >= 1, got "
            f"{index['dtype']!r} and {index['block_tokens']}"
        )
    for name in ("documents", "tokens", "bytes"):
        total = sum(shard[name] for shard in index["shards"])
        if total != index[name]:
            raise ValueError(f"{path}: expected {total} {name}, as in the shards, got "
                             f"{index[name]}")  # fmt: skip
    return index


_FIELDS = {
    "tokenizer": dict, "dtype": str, "block_tokens": int, "source": str, "text_field": str,
    "is_one_text": bool, "ignored": str, "documents": int, "tokens": int, "bytes": int,
    "skipped": int, "fingerprint": str, "arrays": dict, "shards": list,
}  # fmt: skip
_TOKENIZER_FIELDS = {"fingerprint": str, "vocab_size": int, "eos_id": int}
_SHARD_FIELDS = {
    "file": str, "source": str, "documents": int, "tokens": int, "bytes": int, "size": int,
    "sha256": str,
}  # fmt: skip


def _check_fields(path: Path, found: Any, fields: dict[str, type], prefix: str = "") -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected fields as {prefix.rstrip('.')}, got {found!r}")
    for name, kind in fields.items():
        value = found.get(name)
        if kind is int:
            is_kind = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        else:
            is_kind = isinstance(value, kind)
        if not is_kind:
            raise ValueError(f"{path}: expected {prefix}{name} as {kind.__name__}, got {value!r}")


class Split(NamedTuple):
    """The documents of a part of a text, in the order in which they are read unshuffled."""

    text: PreparedText
    documents: np.ndarray
    """[n], indices."""

    @property
    def num_tokens(self) -> int:
        """Targets: the tokens of the documents, their ends included."""
        return int(sum(self.text.lengths(part).sum() for part in _parts(self.documents)))

    @property
    def fingerprint(self) -> str:
        """Of the texts, in their order."""
        digest = hashlib.blake2b(digest_size=8)
        for part in _parts(self.documents):
            digest.update(self.text.digests[part].astype("<u8").tobytes())
        return digest.hexdigest()


def whole(text: PreparedText) -> Split:
    """All documents, in the order of their hashes: the first few are a fair sample."""
    return Split(text, _saved(text, "by_hash", lambda: np.argsort(text.digests)))


def split(text: PreparedText, fraction: float) -> tuple[Split, Split]:
    """(documents to train on, documents held out).

    A document's part follows from its text alone: it stays when others come, and equal documents
    lie on the same side. If a part would be empty it gets the document with the extreme hash. Of
    one text in sections, the last ones are held out.

    Raises ValueError if there are too few documents to hold one out.
    """
    if text.index["is_one_text"]:
        cut = _first_held_out(text, fraction)
        documents = np.arange(len(text))
        return Split(text, documents[:cut]), Split(text, documents[cut:])
    chosen = _held_out(text.digests, fraction)
    if chosen is None:
        raise ValueError(
            f"DataConfig.source: expected at least 2 different documents, to hold one out for "
            f"validation, got {len(text)} with 1 text; add documents or split the file"
        )

    def held_out() -> np.ndarray:
        (found,) = np.nonzero(chosen)
        return found[np.argsort(text.digests[found], kind="stable")]

    name = f"split_{fraction!r}"
    return (
        Split(text, _saved(text, f"{name}_train", lambda: np.nonzero(~chosen)[0])),
        Split(text, _saved(text, f"{name}_held_out", held_out)),
    )


def _held_out(digests: np.ndarray, fraction: float) -> np.ndarray | None:
    """[N] bool; None: all documents are equal."""
    chosen = digests < np.uint64(fraction * 2.0**64)
    if not chosen.any():
        chosen = digests == digests.min()
    if chosen.all():
        chosen = digests != digests.max()
    return chosen if chosen.any() else None


def _first_held_out(text: PreparedText, fraction: float) -> int:
    ends = np.cumsum(text.sizes)
    first = int(np.searchsorted(ends, (1 - fraction) * ends[-1], side="right"))
    first = min(max(first, 1), len(text) - 1)
    if not first:
        raise ValueError(
            "DataConfig.source: expected a text of at least 2 lines, to hold the last ones out for "
            "validation, got 1; give a longer text"
        )
    return first


def _saved(text: PreparedText, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """An array beside the text, memory-mapped; computed once, or always in a read-only folder.

    Who writes it at the same time writes the same.
    """
    path = text.folder / "splits" / f"{text.index['fingerprint']}_{name}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    array = compute()
    try:
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, array)
        os.replace(file.name, path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        return array


def _parts(documents: np.ndarray, size: int = 1 << 20) -> list[np.ndarray]:
    return [documents[i : i + size] for i in range(0, len(documents), size)]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[start, start + length) of every pair, one behind the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
