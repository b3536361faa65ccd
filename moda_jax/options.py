"""The command line's options, from dataclasses: their forms, checks, and the short help."""

import ast
import contextlib
import dataclasses
import inspect
import shutil
import tempfile
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moda_jax.config import DEPTH_CONFIGS, Config

_ALIASES = {"--lr": "--optimizer.learning-rate"}

_SHORT_HELP = {
    "run": (
        "name", "steps", "batch-size", "accumulation-steps", "seed", "init-from", "output-dir",
        "log-every", "eval-every", "checkpoint-every", "keep-last", "sample-prompt",
        "sample-tokens", "profile", "wandb",
    ),
    "model": (
        "model.vocab-size", "model.num-layers", "model.embed-dim", "model.num-heads",
        "model.num-kv-heads", "model.head-dim", "model.mlp-dim",
    ),
    "data": (
        "data.source", "data.text-field", "data.tokenizer", "data.seq-len",
        "data.validation-fraction",
    ),
    "optimizer": (
        "optimizer.learning-rate", "optimizer.warmup-steps", "optimizer.weight-decay",
    ),
    "how it is computed": (
        "execution.compute-dtype", "execution.remat", "execution.attention", "mesh.data",
        "mesh.fsdp", "mesh.tensor",
    ),
}  # fmt: skip


class Arguments(NamedTuple):
    """A command line, sorted."""

    config: str | None
    """The argument that names a config, wherever it stood."""
    overrides: list[str]
    help: str | None
    """"--help" or "--help-all", if asked for."""


def sort_arguments(arguments: Sequence[str]) -> Arguments:
    """Finds the config among the options and gives aliases and "none" the form that is parsed.

    An option takes the argument after it as its value, unless it is a switch, as --wandb, or that
    argument is an option itself. Raises ValueError for a second config.
    """
    annotations = dict(_walk(Config))
    switches = {name for name, kind in annotations.items() if kind is bool}
    configs: list[str] = []
    overrides: list[str] = []
    shown = None
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument in ("-h", "--help", "--help-all"):
            shown = "--help-all" if "--help-all" in (argument, shown) else "--help"
            continue
        if not argument.startswith("-"):
            configs.append(argument)
            continue
        name, joined, value = argument.partition("=")
        option = name.replace("_", "-")
        option = _ALIASES.get(option, option)
        takes_value = option.replace("--no-", "--").replace(".no-", ".") not in switches
        if not joined and takes_value and waiting and not waiting[0].startswith("--"):
            joined, value = " ", waiting.pop(0)
        if option == "--config":
            configs.append(value)
            continue
        if value.lower() == "none" and _may_be_none(annotations.get(option)):
            value = "None"
        if option not in annotations:
            option = name  # for the message, as it was typed
        overrides += [option, value] if joined == " " else [f"{option}{joined}{value}"]
    if len(configs) > 1:
        raise ValueError(
            f"expected one config, got {' and '.join(map(repr, configs))}; every other setting has "
            f"a name, as --steps 20"
        )
    return Arguments(configs[0] if configs else None, overrides, shown)


def short_help(config: Config) -> str:
    """The settings of most runs, a line each, with the defaults of `config`."""
    width = min(shutil.get_terminal_size().columns, 120)
    docs = _docs(Config)
    lines = []
    for group, names in _SHORT_HELP.items():
        lines += ["", f"{group}:"]
        if group == "model":
            lines.append(_line("--model.depth NAME", config.model.depth.name, "", width))
        for name in names:
            owner: Any = config
            *path, field = name.replace("-", "_").split(".")
            for part in path:
                owner = getattr(owner, part)
            kind = typing.get_type_hints(type(owner))[field]
            form = f"--{name}" if kind is bool else f"--{name} {_form(kind)}"
            lines.append(_line(form, getattr(owner, field), docs[name], width))
    return "\n".join(lines)


def _line(form: str, default: Any, doc: str, width: int) -> str:
    text = f"  {form} [{default}]  {doc}".rstrip()
    return text if len(text) < width else f"{text[: width - 2]}…"


def _form(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    return getattr(kind, "__name__", "VALUE").upper()


def _walk(cls: type, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """The options of a config class with their fields' annotations, every mechanism's included."""
    for name, kind in typing.get_type_hints(cls).items():
        option = prefix + name.replace("_", "-")
        if name == "depth":
            for mechanism in DEPTH_CONFIGS.values():
                yield from _walk(mechanism, f"{option}.")
        if dataclasses.is_dataclass(kind):
            yield from _walk(typing.cast(type, kind), f"{option}.")
        else:
            yield option, kind


def _may_be_none(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind)


def _docs(cls: type, prefix: str = "") -> dict[str, str]:
    """The string after each field of a config class, as one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    hints = typing.get_type_hints(cls)
    for statement, following in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name = statement.target.id
        option = prefix + name.replace("_", "-")
        text = following.value if isinstance(following, ast.Expr) else None
        docs[option] = " ".join(str(text.value).split()) if isinstance(text, ast.Constant) else ""
        if dataclasses.is_dataclass(hints[name]):
            docs |= _docs(typing.cast(type, hints[name]), f"{option}.")
    return docs


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def require_positive(options: Any, *fields: str) -> None:
    """Raises ValueError, naming the option, unless these are None or at least 1."""
    for field in fields:
        value = getattr(options, field)
        if value is not None and value < 1:
            raise ValueError(f"{_option(field)}: expected a number >= 1, got {value}")


def refuse_unused(options: Any, fields: Sequence[str], where: str) -> None:
    """Raises ValueError, naming the option, if one differs from its default where it says nothing.

    `where` goes on after "expected none", as "without --text".
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for field in fields:
        if (value := getattr(options, field)) != defaults[field]:
            raise ValueError(f"{_option(field)}: expected none {where}, got {value!r}")


@contextlib.contextmanager
def naming(options: dict[str, str]) -> Iterator[None]:
    """Errors "NAME: expected ..." of the library name the command's option for that argument."""
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        if not colon or name not in options:
            raise
        raise ValueError(f"{options[name]}:{rest}") from error


def result_folder(option: str, given: str | None, run: str, name: str) -> Path:
    """Makes the folder of results: `given`, or else `name` in the run's folder.

    Raises ValueError if the run has no folder or, naming `option`, nothing can be written there.
    """
    if not Path(run).is_dir():
        raise ValueError(f"RUN: expected a run's folder, got {run!r}")
    if given == "":
        raise ValueError(f"{option}: expected a folder, got an empty name")
    try:
        folder = Path(run, name) if given is None else Path(given).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # the second: no such user, as in ~user
        reason = getattr(error, "strerror", None) or error
        place = str(Path(run, name)) if given is None else given
        raise ValueError(
            f"{option}: expected a folder that can be written, got {place!r}: {reason}"
        ) from error
    return folder
