"""The command `moda-jax prepare SOURCE --output FOLDER`: raw text into a prepared folder."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from moda_jax.cli import exit_status, parse_options
from moda_jax.data.prepare import (
    LOCK_FILE,
    PrepareSummary,
    check_output,
    locked,
    prepare,
    print_line,
)
from moda_jax.data.shards import OnError, write_json
from moda_jax.data.tokenizer import load_tokenizer
from moda_jax.data.tokenizer_training import SAMPLE_BYTES, train_tokenizer
from moda_jax.data.units import list_files, stat_files
from moda_jax.train.errors import EXIT_FINISHED

_DESCRIPTION = """Tokenizes raw text once, into a folder that training reads.

SOURCE is "stdlib" (the Python standard library's source on this machine), a .txt file (one text,
cut into sections), a .jsonl file (also .gz, .zst, .xz), a .parquet file, a folder of .txt or else
.jsonl or else .parquet files, or a folder that Hugging Face's save_to_disk wrote. The command can
be stopped at any moment: started again it goes on. The number of workers changes no byte."""

TRAINED_FILE = "trained-tokenizer.json"
_TRAINING_FILE = "training.json"


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """What the command line sets."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Raw text."""
    output: str
    """A new or empty folder, or one that was prepared before."""
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
        print_line(prepare_from(options).describe())
        return EXIT_FINISHED

    return exit_status(run)


def prepare_from(options: PrepareOptions) -> PrepareSummary:
    """Trains the tokenizer if `options` ask for one, then prepares. Raises as `prepare`."""
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
                options.source,
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
