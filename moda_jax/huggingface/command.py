"""The commands `moda-jax import DIR --name RUN` and `moda-jax export RUN DIR`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moda_jax.cli import exit_status, parse_options
from moda_jax.config import Config
from moda_jax.data.prepare import print_line
from moda_jax.huggingface.exporting import DType, export_checkpoint
from moda_jax.huggingface.importing import import_checkpoint
from moda_jax.train.errors import EXIT_FINISHED

_IMPORT = """Makes a run of a Hugging Face checkpoint.

DIR holds config.json, safetensors (one file, or several with their index) and tokenizer.json of an
OLMo 2, Llama or Qwen3 model. Training goes on with `moda-jax train RUN`, load_trained opens it.
What this project does not compute as transformers does is refused by its name. PyTorch is not
needed."""

_EXPORT = """Writes a run's model as a Hugging Face checkpoint into the new folder DIR.

MoDA models take modeling_moda.py along, which transformers opens with trust_remote_code=True."""


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """What the command line sets."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the checkpoint."""
    name: str
    """The run's: its folder is <output-dir>/<name>."""
    output_dir: str = "runs"
    """Where runs are."""
    tokenizer: str | None = None
    """Path of a tokenizer.json, or "bytes"; None: the one in DIR."""
    eos_token: str | None = None
    """The token that ends documents; None: the one that the checkpoint declares."""
    ignore: tuple[str, ...] = ()
    """Settings of config.json that are not known, and do not change the model."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What the command line sets."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A new or empty folder."""
    step: Literal["newest", "best"] | int = "newest"
    """Of the checkpoint; best: by validation loss."""
    dtype: DType | None = None
    """Of the tensors; None: as they are kept, float32 unless they were imported."""


def main_import(argv: Sequence[str], *, program: str = "moda-jax import") -> int:
    """Parses `argv` and imports; returns the exit status (`moda_jax.train.errors`)."""

    def run() -> int:
        options = parse_options(ImportOptions, argv, prog=program, description=_IMPORT)
        Config(options.name)  # the name is checked as that of any run
        config = import_checkpoint(
            options.source,
            Path(options.output_dir) / options.name,
            tokenizer=options.tokenizer,
            eos_token=options.eos_token,
            ignore=options.ignore,
            say=print_line,
        )
        print_line(f"imported: {Path(config.output_dir) / config.name}")
        return EXIT_FINISHED

    return exit_status(run)


def main_export(argv: Sequence[str], *, program: str = "moda-jax export") -> int:
    """Parses `argv` and exports; returns the exit status (`moda_jax.train.errors`)."""

    def run() -> int:
        options = parse_options(ExportOptions, argv, prog=program, description=_EXPORT)
        export_checkpoint(
            options.run, options.directory, step=options.step, dtype=options.dtype, say=print_line
        )
        return EXIT_FINISHED

    return exit_status(run)
