"""Documents of a corpus, read one at a time.

One pass at the start finds every document, checks that it can be read, hashes its text and notes
where it stands; the text itself stays on disk. The index takes 40 bytes a document.
"""

import array
import functools
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moda_jax.data.files import JSON_SUFFIXES, TEXT_SUFFIXES, find_files, has_suffix
from moda_jax.data.sources import JsonLines, SectionedText, Source, TextFile, Unpacked, encode_utf8

# The test suite is larger than the library, and not the text one wants a model to write.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

_KINDS = "a .txt file, a .jsonl file (also .gz, .zst), or a folder of either"


class _Opened(NamedTuple):
    sources: Sequence[Source]
    ignored: str = ""


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _open_stdlib() -> _Opened:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    return _Opened([TextFile(path, python_source=True) for path in paths])


def _open_source(source: str, text_field: str) -> _Opened:
    if source == "stdlib":
        return _open_stdlib()
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(
            f'DataConfig.source: expected "stdlib", {_KINDS}, got {source!r}, which does not '
            f"exist; check the path"
        )
    unpacked = Unpacked()
    if path.is_dir():
        found = find_files(path)
        ignored = ", ".join(f"{count} {kind}" for kind, count in found.others.items())
        return _Opened(
            [
                TextFile(file)
                if has_suffix(file, TEXT_SUFFIXES)
                else JsonLines(file, text_field, unpacked)
                for file in found.paths
            ],
            ignored,
        )
    if has_suffix(path, TEXT_SUFFIXES):
        return _Opened([SectionedText(path)])
    if has_suffix(path, JSON_SUFFIXES):
        return _Opened([JsonLines(path, text_field, unpacked)])
    raise ValueError(
        f"DataConfig.source: expected {_KINDS}, got the file {source!r}; convert or rename it"
    )


class Corpus:
    """The documents of a source that hold more than white space, in a fixed order.

    A random-access sequence of texts: `corpus[i]` reads document i from disk.
    `digests` [n] uint64: a hash of each text. `sizes` [n] int64: its length in UTF-8 bytes.
    `is_one_text`: the documents are sections of one text, in its order.
    `ignored`: how many files of a folder are not read, by kind, for messages; or empty.
    """

    def __init__(self, source: str, *, text_field: str) -> None:
        """Reads the whole source once.

        Args:
            source: "stdlib" (the running Python's standard library, without its tests), a .txt
                file (one text in sections), a .jsonl file, which may end in .gz or .zst, or a
                folder of .txt or else .jsonl files (recursive, sorted by path).
            text_field: the field of a .jsonl record that holds the text.

        Raises:
            ValueError: the source is missing, not UTF-8, malformed (file and line are named) or
                holds no document.
        """
        self._sources, self.ignored = _open_source(source, text_field)
        self.is_one_text = any(isinstance(file, SectionedText) for file in self._sources)
        places, digests, sizes = array.array("q"), array.array("Q"), array.array("q")
        for number, file in enumerate(self._sources):
            for place, text in file.scan():
                if text.strip():
                    content = encode_utf8(text, functools.partial(file.name, place))
                    places.extend((number, *place))
                    digests.append(_digest(content))
                    sizes.append(len(content))
        if not sizes:
            raise ValueError(
                f"DataConfig.source: expected at least one non-empty document, got none in "
                f"{source!r}{f' (files of other kinds: {self.ignored})' if self.ignored else ''}; "
                f"a folder needs .txt or .jsonl files, a .jsonl file records with text"
            )
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self.digests = np.array(digests, np.uint64)
        self.sizes = np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> str:
        """Reads document `index`; ValueError if it is not the text that was there at the start."""
        file, offset, length = self._places[index].tolist()
        text = self._sources[file].read((offset, length))
        name = functools.partial(self.name, index)
        if _digest(encode_utf8(text, name)) != self.digests[index]:
            raise ValueError(
                f"DataConfig.source: expected {name()} as it was when the run started, got another "
                f"text; leave the corpus alone while a run reads it"
            )
        return text

    def name(self, index: int) -> str:
        """The file (and line) of document `index`, for messages."""
        file, offset, length = self._places[index].tolist()
        return self._sources[file].name((offset, length))
