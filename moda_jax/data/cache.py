"""Raw text prepared once: a run that starts again finds its tokens by the content of its corpus."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from moda_jax.data.files import readable
from moda_jax.data.prepare import find_index, is_complete, locked, prepare, print_line
from moda_jax.data.prepared import FORMAT, INDEX_FILE
from moda_jax.data.shards import BLOCK_TOKENS, OnError, write_json
from moda_jax.data.tokenizer import Tokenizer
from moda_jax.data.units import NAMED, FileState, list_files, stat_files

_KNOWN_FOLDER = "known"
_READ_BYTES = 1 << 20


def prepared_folder(
    source: str,
    cache_dir: str | Path,
    *,
    tokenizer: Tokenizer,
    text_field: str = "text",
    workers: int | None = None,
    on_error: OnError = "stop",
    say: Callable[[str], None] = print_line,
    quiet: bool = False,
) -> Path:
    """The prepared folder of `source`, which is prepared in `cache_dir` if it is raw text.

    It is called after the source and a hash of its files' content, the tokenizer and the text
    field, so that a corpus that was moved or touched is not prepared again and an edited one is. As
    long as no file's size and time has changed, none is read to find that out. Of several processes
    that ask at once, one reads and prepares and the others wait.

    Args:
        source: a prepared folder, or raw text as `moda_jax.data.units.list_files` describes.
        cache_dir: made if need be, like runs/prepared.
        tokenizer: of `load_tokenizer`.
        text_field, workers, on_error, say, quiet: as `prepare` takes them.

    Raises:
        ValueError: the source cannot be used, or was prepared with another tokenizer.
        OSError: the cache cannot be written to, or a worker was killed.
    """
    if source not in NAMED and (index := find_index(source)) is not None:
        theirs = index["tokenizer"]
        if theirs["fingerprint"] != tokenizer.fingerprint:
            raise ValueError(
                f"DataConfig.tokenizer: expected the tokenizer that {source!r} was prepared with, "
                f"{theirs['name']} ({theirs['fingerprint']}), got {tokenizer.fingerprint}; "
                f"name that file, or prepare the text again"
            )
        return Path(source).expanduser()
    cache = Path(cache_dir).expanduser()
    settings = [
        str(FORMAT),
        str(BLOCK_TOKENS),
        tokenizer.fingerprint,
        text_field,
    ]
    kind, paths, ignored = list_files(source)
    states = stat_files(paths)
    signature = _hash_texts([*settings, kind, ignored, json.dumps(states)])
    known = cache / _KNOWN_FOLDER / f"{signature}.json"
    if (folder := _find(cache, known, on_error)) is not None:
        return folder
    known.parent.mkdir(parents=True, exist_ok=True)
    with locked(known.with_suffix(".lock"), say):
        if (folder := _find(cache, known, on_error)) is not None:
            return folder
        content = _hash_texts([*settings, kind, ignored, *_describe_content(source, states)])
        name = re.sub(r"[^\w.-]+", "-", Path(source).resolve().stem if kind != "python" else source)
        folder = cache / f"{name or 'text'}-{content[:12]}"
        if not _is_whole(folder, on_error):
            prepare(
                source,
                folder,
                tokenizer=tokenizer,
                text_field=text_field,
                workers=workers,
                on_error=on_error,
                say=say,
                quiet=quiet,
            )
        # What was hashed may have changed before it was prepared: then the name is not its own.
        if stat_files(list_files(source)[1]) != states:
            (folder / INDEX_FILE).unlink()
            raise ValueError(
                f"DataConfig.source: expected {source!r} to stay as it is while it is prepared; "
                f"start again"
            )
        write_json(known, {"folder": folder.name})
        return folder


def _find(cache: Path, known: Path, on_error: OnError) -> Path | None:
    """The folder that an earlier start noted for files of these names, sizes and times."""
    try:
        folder = cache / json.loads(known.read_bytes())["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if _is_whole(folder, on_error, look_inside=False) else None


def _is_whole(folder: Path, on_error: OnError, *, look_inside: bool = True) -> bool:
    """Whether the folder is finished and undamaged, without records that were skipped in vain."""
    try:
        index = find_index(folder)
    except ValueError:
        return False
    if index is None or (index["skipped"] and on_error == "stop"):
        return False
    return is_complete(folder, index, look_inside=look_inside)


def _describe_content(source: str, states: list[FileState]) -> Iterable[str]:
    """For each file its place in the source and a hash of its bytes."""
    root = Path(source).expanduser().absolute()
    for state in states:
        path = Path(state.path)
        is_inside = source not in NAMED and root.is_dir() and path.is_relative_to(root)
        # Of a single file the name does not matter, but for what it says about the packing.
        yield str(path.relative_to(root)) if is_inside else "".join(path.suffixes)
        with readable(path), path.open("rb") as file:
            digest = hashlib.blake2b(digest_size=16)
            while block := file.read(_READ_BYTES):
                digest.update(block)
        yield digest.hexdigest()


def _hash_texts(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        content = text.encode("utf-8", "surrogateescape")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
