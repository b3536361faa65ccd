"""The command line of `train.py`: a config file, overrides by dotted names, one-line errors."""

import contextlib
import dataclasses
import io
import logging
import os
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from moda_jax.config import DEPTH_CONFIGS, Config
from moda_jax.train.run_folder import read_run_config

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.py"

_EXIT_BAD_INPUT = 2  # as argparse and tyro
_EXIT_INTERRUPTED = 130  # as a shell reports a process ended by SIGINT
_TRACEBACK_SWITCH = "MODA_JAX_TRACEBACK"

_DESCRIPTION = f"""Trains a language model with Mixture-of-Depths Attention.

CONFIG.py is a Python file that defines `config`, a moda_jax.config.Config; it comes first and
is configs/tiny.py when left out. Every setting below overrides one field of it, and the
defaults shown are that file's. The folder of a run in its place, as in `train.py runs/NAME`,
goes on with that run, wherever the folder is now. --model.depth NAME takes another way of
using depth, whose own settings are --model.depth.FIELD then: {", ".join(DEPTH_CONFIGS)}.
A run that was stopped resumes when it is started again; outputs go to <output-dir>/<name>.
{_TRACEBACK_SWITCH}=1 shows the traceback of an error."""


def _quiet_libtpu() -> None:
    """The development tools bring libtpu, as a compiler; JAX loads it, and without a TPU it
    complains on stderr about these two, which then mean nothing.
    """
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev/vfio").glob("[0-9]*")):
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-1")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` (default: `sys.argv[1:]`) and trains.

    Returns the exit status: 0, 2 after bad input (one line on stderr says what was expected),
    or 130 after Ctrl-C before training took over the signal. Raises SystemExit after `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        config = parse_config(arguments)
        # What only training needs takes a second to import: not for a mistyped option.
        from moda_jax.train.trainer import train

        _quiet_libtpu()
        if os.environ.get(_TRACEBACK_SWITCH) != "1":
            # orbax logs the traceback of a failed write, which is raised besides.
            logging.getLogger("absl").setLevel(logging.CRITICAL)
        train(config)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except (ValueError, NotImplementedError, OSError) as error:
        if os.environ.get(_TRACEBACK_SWITCH) == "1":
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return _EXIT_BAD_INPUT
    return 0


def parse_config(arguments: Sequence[str]) -> Config:
    """Returns the config of `[CONFIG.py] [--dotted.overrides]`.

    Raises ValueError, naming the file or the field, for whatever cannot be used; SystemExit
    after printing the help text.
    """
    overrides = list(arguments)
    path = DEFAULT_CONFIG
    if overrides and not overrides[0].startswith("-"):
        path = Path(overrides.pop(0))
    config, overrides = _with_mechanism(load_config(path), overrides)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                Config,
                default=config,
                args=overrides,
                prog="train.py [CONFIG.py]",
                description=_DESCRIPTION,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_unbox(messages.getvalue())) from None


def _with_mechanism(config: Config, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """Takes `--model.depth NAME` out of the overrides and puts that mechanism's defaults in place.

    NAME says which settings `--model.depth.FIELD` means, so it is looked for first. Raises
    ValueError for a missing or unknown name.
    """
    rest, names = [], []
    arguments = iter(overrides)
    for argument in arguments:
        option, has_value, value = argument.partition("=")
        if option != "--model.depth":
            rest.append(argument)
        else:
            names.append(value if has_value else next(arguments, ""))
    if not names:
        return config, rest
    name = names[-1].replace("-", "_")
    if name not in DEPTH_CONFIGS:
        raise ValueError(
            f"--model.depth: expected one of {', '.join(DEPTH_CONFIGS)}, got {names[-1]!r}"
        )
    if name == config.model.depth.name:  # the file's settings of the same mechanism stay
        return config, rest
    model = dataclasses.replace(config.model, depth=DEPTH_CONFIGS[name]())
    return dataclasses.replace(config, model=model), rest


def load_config(path: Path) -> Config:
    """The `config` of the local Python file `path`, which is run; or of the run in folder `path`.

    Raises ValueError, naming the file, if it is missing, fails, or defines no `config: Config`.
    """
    if path.is_dir():
        return read_run_config(path)
    if not path.is_file():
        raise ValueError(f"config file: expected a Python file, got {str(path)!r} (not found)")
    try:
        namespace = runpy.run_path(str(path))
    except Exception as error:
        detail = f"{type(error).__name__}: {_one_line(error)}"
        raise ValueError(f"config file {str(path)!r} failed with {detail}") from error
    config = namespace.get("config")
    if not isinstance(config, Config):
        raise ValueError(
            f"config file {str(path)!r}: expected it to define `config`, a "
            f"moda_jax.config.Config, got {type(config).__name__}"
        )
    return config


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _unbox(text: str) -> str:
    """Returns tyro's boxed message as one line, with the first option it suggests instead.

    A box, drawn in Unicode or ASCII as the terminal allows, holds sections divided by horizontal
    rules: the message, then hints. The message names
    the option, or a dataclass before our own message, which names its field.
    """
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    inner = [line for line in lines[1:] if line]
    text = " ".join("\0" if set(line) <= {"─", "-"} else line for line in inner)
    # In ASCII a rule stands below the title too: no section before it.
    sections = [section.strip() for section in text.split("\0") if section.strip()]
    message = re.sub(r"^Error parsing (\w\S*: )?", "", sections[0])
    hints = [section for section in sections[1:] if "Perhaps you meant" in section]
    suggestion = re.search(r"--[\w.-]+", hints[0]) if hints else None
    return f"{message} (did you mean {suggestion[0]}?)" if suggestion else message
