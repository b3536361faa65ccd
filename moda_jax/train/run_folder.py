"""What a run's folder holds beside its results, so that it needs nothing but its corpus.

config.json has the settings, the tokenizer's file is copied, and corpus.json says where the text
was and how to recognise it. So the folder can be moved, and `train.py FOLDER` goes on.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moda_jax.config import Config, DataConfig, dataclass_from_json, to_json
from moda_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from moda_jax.data.units import NAMED

if TYPE_CHECKING:  # the command line reads a folder's config without opening data
    from moda_jax.data.loader import Data

CONFIG_FILE = "config.json"
CORPUS_FILE = "corpus.json"


def write_run_folder(directory: Path, config: Config, data: "Data") -> None:
    """Writes the settings, the tokenizer and the corpus's place and fingerprint.

    Each file is the old or the new one whenever the process is killed.
    """
    corpus = {
        "sources": [
            {
                "name": source.name,
                "path": _absolute(source.path),
                "validation": source.validation and _absolute(source.validation),
                "fingerprint": source.fingerprint,
                "train_documents": source.train_documents,
                "validation_documents": source.validation_documents,
                "bytes": source.num_bytes,
            }
            for source in data.sources
        ]
    }
    _replace(directory / CORPUS_FILE, _to_bytes(corpus))
    write_settings(directory, config, data.tokenizer)


def write_settings(directory: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer and the settings: all that a folder needs beside checkpoints."""
    if (content := tokenizer.content) is not None:
        _replace(directory / TOKENIZER_FILE, content)
    _replace(directory / CONFIG_FILE, _to_bytes(to_json(config)))


def is_written(directory: Path) -> bool:
    """Whether `write_run_folder` has finished there before."""
    return (directory / CONFIG_FILE).is_file()


def read_run_config(directory: Path) -> Config:
    """The config with which the run in `directory` goes on, wherever the folder is now.

    Name and output folder are the folder's, the tokenizer is its copy, and a corpus that was given
    by a relative path is looked for where it was.

    Raises ValueError, naming the file and the setting, if config.json is missing or damaged.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ValueError(
            f"expected a Python file or the folder of a run, with {CONFIG_FILE} in it, got the "
            f"folder {str(directory)!r}"
        )
    try:
        config = dataclass_from_json(_read_json(path), Config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    folder = directory if directory.name not in ("", "..") else directory.resolve()
    return dataclasses.replace(
        config,
        name=folder.name,
        output_dir=str(folder.parent),
        data=dataclasses.replace(
            _where_it_was(directory, config.data),
            tokenizer=_tokenizer_in(directory, config.data.tokenizer),
        ),
    )


def load_folder_tokenizer(
    directory: Path, data: Mapping[str, Any], *, expected: str | None
) -> Tokenizer:
    """The tokenizer of the run in `directory`.

    Args:
        directory: of the run.
        data: the settings of its DataConfig.
        expected: fingerprint of the tokenizer with which the checkpoint was trained.

    Raises ValueError if it is another tokenizer or gone.
    """
    path = _tokenizer_in(directory, data["tokenizer"])
    tokenizer = load_tokenizer(path, data.get("eos_token"))
    if tokenizer.fingerprint != expected:
        raise ValueError(
            f"{path}: expected the tokenizer with which the model was trained (fingerprint "
            f"{expected}), got another one ({tokenizer.fingerprint}); put that file back"
        )
    return tokenizer


def _tokenizer_in(directory: Path, name: str) -> str:
    """The folder's copy, or `name` itself: it needs no file, or a run of long ago copied none."""
    copy = directory / TOKENIZER_FILE
    return str(copy) if name != "bytes" and copy.is_file() else name


def _where_it_was(directory: Path, data: DataConfig) -> DataConfig:
    """With the texts' absolute paths, as the run found them, in place of relative ones."""
    sources = data.texts
    paths = [path for source in sources for path in (source.path, source.validation) if path]
    if paths == [_absolute(path) for path in paths] or not (directory / CORPUS_FILE).is_file():
        return data
    corpus = _read_json(directory / CORPUS_FILE)
    found = corpus.get("sources") if isinstance(corpus, Mapping) else None
    if not isinstance(found, list) or len(found) != len(sources):
        raise ValueError(
            f"{directory / CORPUS_FILE}: expected {len(sources)} sources, got {found!r}"
        )
    placed = tuple(
        dataclasses.replace(
            source,
            path=_text_in(directory, place, "path"),
            validation=source.validation and _text_in(directory, place, "validation"),
        )
        for source, place in zip(sources, found, strict=True)
    )
    if data.sources:
        return dataclasses.replace(data, sources=placed)
    return dataclasses.replace(data, source=placed[0].path, validation=placed[0].validation)


def _text_in(directory: Path, place: Any, name: str) -> str:
    text = place.get(name) if isinstance(place, Mapping) else None
    if not isinstance(text, str):
        raise ValueError(f"{directory / CORPUS_FILE}: expected a text as {name}, got {text!r}")
    return text


def _absolute(source: str) -> str:
    return source if source in NAMED else str(Path(source).expanduser().absolute())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: expected JSON, got a damaged file ({error})") from error


def _to_bytes(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2) + "\n").encode()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
