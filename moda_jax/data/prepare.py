"""Raw text into a folder of token shards: `prepare`, and the command `moda-jax prepare`.

A prepared folder holds:

- `shard-00000.array_record` ...: the tokens. A shard's stream is its documents', each followed by
  the end-of-document token; a record is `block_tokens` ids of it, little-endian, the last one of a
  shard shorter. No block and no document reaches from one shard into the next.
- `ends.npy` int64 [documents]: stream tokens up to the end of each document, over all shards;
  `digests.npy` uint64 [documents]: blake2b of each text; `sizes.npy` int64 [documents]: its UTF-8
  bytes.
- `tokenizer.json`, if the tokenizer has a file.
- `index.json`, written last: what there is, and the SHA-256 of every shard and array.
- `plan.json`: the state of the input's files; `prepare.lock`: empty, locked by who prepares.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moda_jax.data.files import hash_file
from moda_jax.data.pool import count_cores, run_workers
from moda_jax.data.prepared import FORMAT, INDEX_FILE, read_index
from moda_jax.data.progress import ProgressDisplay
from moda_jax.data.shards import (
    BLOCK_TOKENS,
    Job,
    OnError,
    read_finished,
    shard_name,
    token_dtype,
    write_json,
    write_shard,
)
from moda_jax.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from moda_jax.data.units import NAMED, SourcePlan, Unit, list_files, plan_source, stat_files
from moda_jax.terminal import escape_controls

PLAN_FILE = "plan.json"
LOCK_FILE = "prepare.lock"

_SMALL_BYTES = 1 << 22
"""Below that, tokenizing takes less time than starting a process."""
_DOCUMENT_FILES = {"ends.npy": np.int64, "digests.npy": np.uint64, "sizes.npy": np.int64}


@dataclasses.dataclass(frozen=True)
class PrepareSummary:
    """What a prepared folder holds, and what it took."""

    folder: Path
    documents: int
    tokens: int
    """The ends of documents included."""
    bytes: int
    """UTF-8, of the documents."""
    skipped: int
    """Bad documents that were left out."""
    shards: int
    kept_shards: int
    """Those that an earlier start had finished."""
    seconds: float
    new_tokens: int
    """Those of the shards that this start made."""

    def describe(self) -> str:
        """One line."""
        kept = f" ({self.kept_shards:,} kept)" if self.kept_shards else ""
        skipped = f"; {self.skipped:,} bad documents skipped" if self.skipped else ""
        return (
            f"{self.folder}: {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.bytes / 1e6:,.1f} MB, {self.tokens / max(self.bytes, 1):.3f} tokens a byte, "
            f"{self.shards:,} shards{kept} in {self.seconds:,.1f} s, "
            f"{self.new_tokens / max(self.seconds, 1e-9):,.0f} tokens/s{skipped}"
        )


def print_line(text: str) -> None:
    print(escape_controls(text), flush=True)


def prepare(
    source: str,
    output: str | Path,
    *,
    tokenizer: Tokenizer | str,
    text_field: str = "text",
    workers: int | None = None,
    on_error: OnError = "stop",
    say: Callable[[str], None] = print_line,
    quiet: bool = False,
) -> PrepareSummary:
    """Tokenizes raw text into the folder `output`, on several processes.

    The shards are the same bytes for any number of workers. Killed at any moment and called again
    it keeps the shards that were finished; when the input has changed since it starts over. A
    finished folder of the same input is left as it is.

    Args:
        source: as `moda_jax.data.units.list_files` describes.
        output: a new or empty folder, or one that was prepared before.
        tokenizer: of `load_tokenizer`, or the name that it takes.
        text_field: the field of a .jsonl record, or the column, that holds the text.
        workers: processes; None: one for each core. A small corpus is tokenized in this one.
        on_error: what a document that cannot be used does: "stop" raises, "skip" leaves it out.
        say: takes the messages, one line each.
        quiet: shows no progress.

    Raises:
        ValueError: an argument or the input cannot be used; one line that names file and line.
        OSError: the folder cannot be written to, or a worker was killed.
    """
    started = time.monotonic()
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected a positive number, got {workers}")
    if on_error not in ("stop", "skip"):
        raise ValueError(f'on_error: expected "stop" or "skip", got {on_error!r}')
    if tokenizer.content is None and not isinstance(tokenizer, ByteTokenizer):
        raise ValueError(
            f"tokenizer: expected bytes or one of a tokenizer.json, which other processes can make "
            f"again, got {type(tokenizer).__name__} without a file's content"
        )
    if is_prepared(source):
        raise ValueError(
            f"DataConfig.source: expected raw text, got the prepared folder {source!r}"
        )
    if not Path(source).expanduser().is_dir():
        list_files(source)  # before a folder is made for nothing
    folder = Path(output).expanduser()
    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK_FILE, say) as lock:
        plan = plan_source(source, text_field=text_field, leave_out=folder)
        index = _start(folder, plan, tokenizer, text_field, on_error, say)
        made: set[int] = set()
        if index is None:
            job = Job(
                str(folder),
                text_field,
                on_error,
                tokenizer.eos_token,
                tokenizer.content is not None,
            )
            entries = _make_shards(
                job, plan, tokenizer, made, workers=workers, lock=lock, say=say, quiet=quiet
            )
            _check_unchanged(source, plan)
            index = _finish(folder, source, plan, tokenizer, text_field, entries)
    shards = index["shards"]
    new = [shard for shard in shards if _number(shard["file"]) in made]
    return PrepareSummary(
        folder,
        index["documents"],
        index["tokens"],
        index["bytes"],
        index["skipped"],
        len(shards),
        len(shards) - len(new),
        time.monotonic() - started,
        sum(shard["tokens"] for shard in new),
    )


def find_index(folder: str | Path) -> dict[str, Any] | None:
    """The index of a prepared folder; None if it has none, or an index.json of something else.

    Raises ValueError for a damaged one, and for one of another version's format.
    """
    folder = Path(folder).expanduser()
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    with contextlib.suppress(OSError, ValueError, RecursionError):  # which `read_index` names
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not {"format", "tokenizer", "shards"} <= found.keys():
            return None
    return read_index(folder)


def is_complete(folder: Path, index: dict[str, Any], *, look_inside: bool = False) -> bool:
    """Whether the files that an index lists are there, with their sizes; or with their content."""
    try:
        sizes = {shard["file"]: shard["size"] for shard in index["shards"]}
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return False
        if not look_inside:
            return all((folder / name).is_file() for name in index["arrays"])
        hashes = {shard["file"]: shard["sha256"] for shard in index["shards"]} | index["arrays"]
        return all(hash_file(folder / name) == digest for name, digest in hashes.items())
    except OSError:
        return False


def _hash_units(units: list[Unit]) -> str:
    content = json.dumps([unit.to_json() for unit in units]).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def is_prepared(source: str) -> bool:
    """Whether `source` is a prepared folder rather than raw text."""
    return source not in NAMED and find_index(source) is not None


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Holds the lock file `path`, made if need be; waits for another process that does.

    Yields its descriptor: the lock lasts until everybody who inherited that has ended.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that prepares {path.parent}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def check_output(folder: Path) -> None:
    """Raises ValueError if `folder` holds something else than a prepared folder, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: expected a folder, got the file {str(folder)!r}")
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    if names and LOCK_FILE not in names and find_index(folder) is None:
        raise ValueError(
            f"output: expected a new or empty folder, or a prepared one, got {str(folder)!r}, "
            f"which holds other files, as {min(names)!r}"
        )


def _start(
    folder: Path,
    plan: SourcePlan,
    tokenizer: Tokenizer,
    text_field: str,
    on_error: OnError,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """The index, if the folder is finished; else makes it ready for shards of this plan."""
    for path in folder.glob("*.partial"):
        path.unlink(missing_ok=True)
    wanted = {
        "format": FORMAT,
        "block_tokens": BLOCK_TOKENS,
        "tokenizer": tokenizer.fingerprint,
        "text_field": text_field,
        "units": _hash_units(plan.units),
        "files": [list(state) for state in plan.files],
    }
    try:
        index = find_index(folder)
    except ValueError as error:
        say(f"{error}: starting over")
        index = None
    try:
        before = json.loads((folder / PLAN_FILE).read_bytes())
    except (OSError, ValueError):
        before = None
    if before != wanted:
        if index is not None or before is not None:
            say(f"{folder} was prepared from another input or tokenizer: starting over")
    elif index is None:
        return None
    elif index["skipped"] and on_error == "stop":
        say(f"{folder} was prepared without {index['skipped']:,} bad documents: starting over")
    elif is_complete(folder, index, look_inside=True):
        _remove_sidecars(folder)
        return index
    else:
        say(f"{folder} has not what its index lists: starting over")
    _clear(folder)
    if tokenizer.content is not None:
        (folder / TOKENIZER_FILE).write_bytes(tokenizer.content)
    write_json(folder / PLAN_FILE, wanted)
    return None


def _clear(folder: Path) -> None:
    for name in (INDEX_FILE, PLAN_FILE, TOKENIZER_FILE, *_DOCUMENT_FILES):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("shard-*"):
        path.unlink()


def _remove_sidecars(folder: Path) -> None:
    for pattern in ("shard-*.npy", "shard-*.json"):
        for path in folder.glob(pattern):
            path.unlink()


def _make_shards(
    job: Job,
    plan: SourcePlan,
    tokenizer: Tokenizer,
    made: set[int],
    *,
    workers: int | None,
    lock: int,
    say: Callable[[str], None],
    quiet: bool,
) -> list[dict[str, Any]]:
    """The entries of all shards, in order; adds the numbers of the new ones to `made`."""
    folder = Path(job.folder)
    entries: dict[int, dict[str, Any]] = {}
    missing = []
    for number, unit in enumerate(plan.units):
        entry = read_finished(folder, number, on_error=job.on_error)
        if entry is None:
            missing.append((number, unit))
        else:
            entries[number] = entry
    if entries:
        say(f"{folder}: {len(entries):,} of {len(plan.units):,} shards are there already")

    def finished(number: int, entry: dict[str, Any]) -> None:
        entries[number] = entry
        made.add(number)

    total = sum(unit.size for unit in plan.units)
    left = sum(unit.size for _, unit in missing)
    display = ProgressDisplay(total, total - left, say=say, quiet=quiet)
    with display:
        if left < _SMALL_BYTES:
            for number, unit in missing:
                report = functools.partial(display.update, number)
                entry = write_shard(job, tokenizer, number, unit, report)
                finished(number, entry)
        else:
            run_workers(
                job,
                missing,
                workers=min(workers or count_cores(), len(missing)),
                lock=lock,
                display=display,
                finished=finished,
            )
    return [entries[number] for number in range(len(plan.units))]


def _check_unchanged(source: str, plan: SourcePlan) -> None:
    now = stat_files(Path(state.path) for state in plan.files)
    changed = [old.path for old, new in zip(plan.files, now, strict=True) if old != new]
    if changed:
        raise ValueError(
            f"DataConfig.source: expected {source!r} to stay as it is while it is prepared, but "
            f"{changed[0]} was changed; start again"
        )


def _finish(
    folder: Path,
    source: str,
    plan: SourcePlan,
    tokenizer: Tokenizer,
    text_field: str,
    entries: list[dict[str, Any]],
) -> dict[str, Any]:
    """Joins what the shards' own files say about documents, and writes the index."""
    documents = sum(entry["documents"] for entry in entries)
    skipped = sum(entry["skipped"] for entry in entries)
    if not documents:
        bad = f"; {skipped:,} bad ones were skipped" if skipped else ""
        raise ValueError(
            f"DataConfig.source: expected at least one non-empty document, got none in "
            f"{source!r}{f' (files of other kinds: {plan.ignored})' if plan.ignored else ''}; "
            f"a folder needs .txt or .jsonl or .parquet files, a .jsonl file records with text, "
            f"and the text tokens of the tokenizer{bad}"
        )
    fingerprint = hashlib.blake2b(digest_size=8)
    shards = [(number, entry) for number, entry in enumerate(entries) if entry["documents"]]
    columns = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.partial", mode="w+", dtype=dtype, shape=(documents,)
        )
        for name, dtype in _DOCUMENT_FILES.items()
    }
    row = tokens = 0
    for number, entry in shards:
        ends, digests, sizes = np.load(folder / f"{shard_name(number)}.npy")
        rows = slice(row, row + entry["documents"])
        columns["ends.npy"][rows] = ends + np.uint64(tokens)
        columns["digests.npy"][rows] = digests
        columns["sizes.npy"][rows] = sizes
        fingerprint.update(digests.astype("<u8").tobytes())
        row, tokens = rows.stop, tokens + entry["tokens"]
    for name, column in columns.items():
        column.flush()
        os.replace(folder / f"{name}.partial", folder / name)
    index = {
        "format": FORMAT,
        "tokenizer": {
            "name": "bytes" if tokenizer.content is None else TOKENIZER_FILE,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "eos_token": tokenizer.eos_token,
        },
        "dtype": token_dtype(tokenizer).name,
        "block_tokens": BLOCK_TOKENS,
        "source": source,
        "text_field": text_field,
        "is_one_text": plan.is_one_text,
        "ignored": plan.ignored,
        "documents": documents,
        "tokens": tokens,
        "bytes": sum(entry["bytes"] for entry in entries),
        "skipped": skipped,
        "fingerprint": fingerprint.hexdigest(),
        "arrays": {name: hash_file(folder / name) for name in _DOCUMENT_FILES},
        "shards": [entry for _, entry in shards],
    }
    write_json(folder / INDEX_FILE, index)
    _remove_sidecars(folder)
    return index


def _number(file: str) -> int:
    return int(file.removeprefix("shard-").partition(".")[0])


if __name__ == "__main__":
    from moda_jax.data.prepare_command import main

    sys.exit(main(program="python -m moda_jax.data.prepare"))
