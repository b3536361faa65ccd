"""The command `moda-jax prepare SOURCE --output FOLDER`: raw text into a prepared folder."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from moda_jax.cli import exit_status, find_config, load_config, parse_options
from moda_jax.config import Config, DataConfig
from moda_jax.data.loader import prepare_sources
from moda_jax.data.prepare import (
    LOCK_FILE,
    PrepareSummary,
    check_output,
    locked,
    prepare,
    print_line,
)
from moda_jax.data.prepared import read_index
from moda_jax.data.shards import OnError, write_json
from moda_jax.data.tokenizer import load_tokenizer
from moda_jax.data.tokenizer_training import SAMPLE_BYTES, train_tokenizer
from moda_jax.data.units import NAMED, list_files, stat_files
from moda_jax.train.errors import EXIT_FINISHED

_DESCRIPTION = """Tokenizes raw text once, into a folder that training reads.

SOURCE is "stdlib" (the Python standard library's source on this machine), "python" (that and the
installed packages), a .txt file (one text, cut into sections), a .jsonl file (also .gz, .zst,
.xz), a .parquet file, a folder of .txt or else .jsonl or else .parquet files, or a folder that
Hugging Face's save_to_disk wrote. The command can be stopped at any moment: started again it goes
on. The number of workers changes no byte.

SOURCE may also be a config, as `moda-jax train` takes it: all its texts are prepared where its runs
look for them, and --vocab-size trains its tokenizer, if that file is not there."""

TRAINED_FILE = "trained-tokenizer.json"
_TRAINING_FILE = "training.json"


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """What the command line sets."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Raw text, or a config."""
    output: str | None = None
    """A new or empty folder, or one that was prepared before; None: a config says where."""
    tokenizer: str = "bytes"
    """"bytes", or the path of a local tokenizer.json."""
    eos_token: str | None = None
    """The token of a tokenizer.json that ends documents; None: one of the usual names."""
    vocab_size: int | None = None
    """Trains a byte-level BPE tokenizer of so many tokens on the source first."""
    sample_bytes: int = SAMPLE_BYTES
    """Bytes of text that such a tokenizer is trained on, at most."""
    text_field: str = "text"
    """The field of a .jsonl record, or the column, that holds the document."""
    workers: int | None = None
    """Processes; None: one for each core."""
    on_error: OnError = "stop"
    """What to do with a document that cannot be used: stop with an error, or skip it."""


def main(argv: Sequence[str] | None = None, *, program: str = "moda-jax prepare") -> int:
    """Parses `argv` (default: `sys.argv[1:]`) and prepares.

    Returns the exit status (`moda_jax.train.errors`); after an error one line on stderr says what
    was expected. Raises SystemExit after `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        options = parse_options(PrepareOptions, arguments, prog=program, description=_DESCRIPTION)
        config = _config_of(options.source)
        if config is None:
            print_line(prepare_from(options).describe())
        else:
            prepare_config(config, options)
        return EXIT_FINISHED

    return exit_status(run)


def _config_of(source: str) -> Config | None:
    """The config of that name; None: `source` is a text."""
    path = find_config(source)
    is_text = source in NAMED or (Path(source).exists() and path.suffix != ".py")
    return load_config(path) if not is_text and path.suffix == ".py" else None


def prepare_config(config: Config, options: PrepareOptions) -> None:
    """Prepares all texts of a config, after it has trained the tokenizer if it is to.

    Raises ValueError for options that the config has; else as `prepare`.
    """
    free = dataclasses.replace(
        options, vocab_size=None, sample_bytes=SAMPLE_BYTES, workers=None, source=""
    )
    if free != PrepareOptions(""):
        raise ValueError(
            "moda-jax prepare: expected no settings beside a config but --vocab-size, "
            "--sample-bytes and --workers, since it has the others; change them there"
        )
    if options.vocab_size is not None:
        _train_for(config.data, options)
    folders = prepare_sources(
        config.data, config.prepared_folder, workers=options.workers, say=print_line
    )
    for text, folder in folders.items():
        index = read_index(folder)
        print_line(
            f"{text}: {index['documents']:,} documents, {index['tokens']:,} tokens, "
            f"{index['skipped']:,} skipped, in {folder}"
        )


def _train_for(data: DataConfig, options: PrepareOptions) -> None:
    assert options.vocab_size is not None
    path = Path(data.tokenizer).expanduser()
    if data.tokenizer == "bytes":
        raise ValueError(
            "--vocab-size: expected a config with the path of a tokenizer.json, got bytes"
        )
    if path.exists():
        print_line(f"{path} is there, and is kept")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(
        [text.path for text in data.texts],
        path,
        vocab_size=options.vocab_size,
        text_field=data.text_field,
        sample_bytes=options.sample_bytes,
        on_error=data.on_error,
        say=print_line,
    )


def prepare_from(options: PrepareOptions) -> PrepareSummary:
    """Trains the tokenizer if `options` ask for one, then prepares. Raises as `prepare`."""
    if options.output is None:
        raise ValueError("--output: expected a folder for the prepared text, got none")
    name, eos_token = options.tokenizer, options.eos_token
    if options.vocab_size is not None:
        if options.tokenizer != "bytes" or eos_token is not None:
            raise ValueError(
                f"--vocab-size: expected no --tokenizer and no --eos-token beside it, which says "
                f"to train one, got {options.tokenizer!r}, {eos_token!r}"
            )
        name = str(_trained(options))
    return prepare(
        options.source,
        options.output,
        tokenizer=load_tokenizer(name, eos_token),
        text_field=options.text_field,
        workers=options.workers,
        on_error=options.on_error,
    )


def _trained(options: PrepareOptions) -> Path:
    """The tokenizer of this source, from an earlier start if nothing has changed since."""
    assert options.output is not None
    folder = Path(options.output).expanduser()
    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TRAINED_FILE
    with locked(folder / LOCK_FILE, print_line):
        _, paths, _ = list_files(options.source, leave_out=folder)
        wanted = {
            "vocab_size": options.vocab_size,
            "sample_bytes": options.sample_bytes,
            "text_field": options.text_field,
            "files": [list(state) for state in stat_files(paths)],
        }
        try:
            before = json.loads((folder / _TRAINING_FILE).read_bytes())
        except (OSError, ValueError):
            before = None
        if before != wanted or not path.is_file():
            assert options.vocab_size is not None
            train_tokenizer(
                [options.source],
                path,
                vocab_size=options.vocab_size,
                text_field=options.text_field,
                sample_bytes=options.sample_bytes,
                on_error=options.on_error,
                leave_out=folder,
                say=print_line,
            )
            write_json(folder / _TRAINING_FILE, wanted)
    return path
