"""The command line: a config, overrides by dotted names, one-line errors."""

import contextlib
import dataclasses
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tyro

from moda_jax.config import DEPTH_CONFIGS, Config
from moda_jax.options import short_help, sort_arguments
from moda_jax.python_file import SHIPPED, run_python_file
from moda_jax.terminal import discard_output, escape_controls, one_line
from moda_jax.train.errors import (
    EXIT_BAD_INPUT,
    EXIT_DIVERGED,
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    EXIT_NOT_SAVED,
    EXIT_PIPE,
    EXIT_STOPPED,
    RunError,
)
from moda_jax.train.run_folder import read_run_config
from moda_jax.train.start_clock import StartClock

DEFAULT_CONFIG = SHIPPED / "tiny.py"

_TRACEBACK_SWITCH = "MODA_JAX_TRACEBACK"

_DESCRIPTION = f"""Trains a language model with Mixture-of-Depths Attention.

CONFIG is a Python file that defines `config`, a moda_jax.config.Config, the name of one that comes
along, as tiny_moda (without it, tiny), or the folder of a run, which then goes on. Every setting
overrides one field of it, and the defaults shown are that file's. --model.depth NAME takes another
way of using depth, whose own settings are --model.depth.FIELD then:
{", ".join(DEPTH_CONFIGS)}.
--lr is --optimizer.learning-rate. A stopped run resumes when it is started again; outputs go to
<output-dir>/<name>.
SIGTERM, SIGHUP and Ctrl-C save and stop, SIGUSR1 saves and goes on, a second signal ends at once.
Exit status: {EXIT_FINISHED} finished; {EXIT_STOPPED} saved and stopped ({EXIT_INTERRUPTED}: by
Ctrl-C), the same command goes on; {EXIT_BAD_INPUT} bad input; {EXIT_DIVERGED} diverged;
{EXIT_NOT_SAVED} a checkpoint or the metrics could not be written.
{_TRACEBACK_SWITCH}=1 shows the traceback of an error."""


def _quiet_libtpu() -> None:
    """The development tools bring libtpu, as a compiler; JAX loads it, and without a TPU it
    complains on stderr about these two, which then mean nothing.
    """
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev/vfio").glob("[0-9]*")):
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-1")


class _Command(NamedTuple):
    usage: str
    function: str
    """module:name of what takes the arguments and returns the exit status."""


_COMMANDS = {
    "train": _Command(
        "[CONFIG] [--SETTING VALUE ...]   trains a language model", "moda_jax.cli:main"
    ),
    "prepare": _Command(
        "SOURCE --output FOLDER ...     tokenizes text once, for training",
        "moda_jax.data.prepare_command:main",
    ),
    "sweep": _Command(
        "FILE [--OPTION ...]              runs configs times seeds, and makes their table",
        "moda_jax.sweep.command:main",
    ),
    "eval": _Command(
        "RUN [--OPTION ...]                perplexity of texts, and scores of tasks",
        "moda_jax.evaluate.command:main",
    ),
    "generate": _Command(
        "RUN --prompt TEXT ...         continues texts with the model of a run",
        "moda_jax.train.generate_command:main",
    ),
    "visualize": _Command(
        "RUN --text FILE ...          draws where a run's attention looks",
        "moda_jax.visualize.command:main",
    ),
    "import": _Command(
        "DIR --name RUN                  makes a run of a Hugging Face checkpoint",
        "moda_jax.huggingface.command:main_import",
    ),
    "export": _Command(
        "RUN DIR                         writes a run as a Hugging Face checkpoint",
        "moda_jax.huggingface.command:main_export",
    ),
}


def command() -> int:
    """The installed command `moda-jax NAME ...`; returns the exit status of that command."""
    name, *arguments = sys.argv[1:] or [""]
    if found := _COMMANDS.get(name):
        module, _, function = found.function.partition(":")

        def run() -> int:
            # Imported only now: what one command needs takes the others a second.
            main = getattr(importlib.import_module(module), function)
            _quiet_libtpu()
            return main(arguments, program=f"moda-jax {name}")

        return exit_status(run)  # Ctrl-C during an import, too, ends in a line
    if name in ("-h", "--help"):
        lines = [f"  moda-jax {command} {known.usage}" for command, known in _COMMANDS.items()]
        print("\n".join(["usage:", *lines, "", "moda-jax COMMAND --help says more."]), flush=True)
        return EXIT_FINISHED
    given = f", got {' '.join(sys.argv[1:])!r}" if sys.argv[1:] else ""
    names = ", ".join(_COMMANDS)
    print(
        escape_controls(f"usage: moda-jax COMMAND, one of {names}; moda-jax --help{given}"),
        file=sys.stderr,
    )
    return EXIT_BAD_INPUT


def main(argv: Sequence[str] | None = None, *, program: str = "train.py") -> int:
    """Parses `argv` (default: `sys.argv[1:]`) and trains.

    Returns the exit status (`moda_jax.train.errors`); after an error one line on stderr says what
    was expected. Raises SystemExit after `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        config = parse_config(arguments, program=program)
        # What only training needs takes a second to import: not for a mistyped option.
        from moda_jax.train.trainer import train

        _quiet_libtpu()
        finished = train(config, clock=StartClock.of_process()).finished
        sys.stdout.flush()
        return EXIT_FINISHED if finished else EXIT_STOPPED

    return exit_status(run)


def exit_status(run: Callable[[], int]) -> int:
    """What `run` returns; after an error its exit status, and one line on stderr."""
    try:
        return run()
    except BrokenPipeError:
        discard_output()
        return EXIT_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, NotImplementedError, OSError, MemoryError) as error:
        if os.environ.get(_TRACEBACK_SWITCH) == "1":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_status if isinstance(error, RunError) else EXIT_BAD_INPUT


def parse_config(arguments: Sequence[str], *, program: str = "train.py") -> Config:
    """Returns the config of `[CONFIG] [--dotted.overrides]`, in any order.

    Raises ValueError, naming the file or the field, for whatever cannot be used; SystemExit
    after printing the help text.
    """
    name, overrides, shown = sort_arguments(arguments)
    path = DEFAULT_CONFIG if name is None else find_config(name)
    config, overrides = _with_mechanism(load_config(path), overrides)
    usage = f"{program} [CONFIG]"
    if shown == "--help":
        print(f"usage: {usage} [--SETTING VALUE ...]\n\n{_DESCRIPTION}\n{short_help(config)}\n\n"
              f"{program} --help-all shows every setting.", flush=True)  # fmt: skip
        raise SystemExit(0)
    if shown:
        overrides.append("--help")
    return parse_options(Config, overrides, default=config, prog=usage, description=_DESCRIPTION)


_Options = TypeVar("_Options")


def parse_options(kind: type[_Options], arguments: Sequence[str], **settings: Any) -> _Options:
    """`tyro.cli` with its boxed messages as one line: ValueError instead of a usage error."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(kind, args=arguments, **settings)
    except SystemExit as stop:
        if stop.code in (0, None):
            sys.stdout.flush()
            raise
        raise ValueError(_unbox(messages.getvalue())) from None


def find_config(name: str) -> Path:
    """The path `name`, or the shipped config of that name."""
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path
    shipped = SHIPPED / path.with_suffix(".py")
    return shipped if shipped.is_file() else path


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
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.py")))
        raise ValueError(
            f"config file: expected a Python file or one of {names}, got {str(path)!r} (not found)"
        )
    config = run_python_file(path, "config file").get("config")
    if not isinstance(config, Config):
        raise ValueError(
            f"config file {str(path)!r}: expected it to define `config`, a "
            f"moda_jax.config.Config, got {type(config).__name__}"
        )
    return config


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
