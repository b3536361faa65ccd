"""The command `moda-jax generate RUN --prompt TEXT`: continues texts, token by token."""

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from moda_jax.cli import exit_status, parse_options
from moda_jax.options import naming, refuse_unused, require_positive
from moda_jax.terminal import escape_controls
from moda_jax.train.errors import EXIT_FINISHED, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from moda_jax.data.tokenizer import TextStream

_DESCRIPTION = f"""Continues texts with the model of a run, and prints them as they come.

RUN is the folder of a run, in progress or finished. A text goes on until the model ends the
document or --max-tokens are drawn. The prompt is the beginning of a document, as it stands: no chat
template is applied; where one is needed, write it into the prompt, special tokens included.
Without a terminal stdout gets UTF-8. Ctrl-C ends it (status {EXIT_INTERRUPTED})."""

_NAMES = {"max_new_tokens": "--max-tokens"} | {
    name: f"--{name.replace('_', '-')}" for name in ("temperature", "top_k", "top_p", "seed")
}
_CHAT_OPTIONS = ("--chat", "--chat-template", "--messages", "--system", "--system-prompt")


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """What the command line sets."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder."""
    prompt: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")
    ] = ()
    """Text to continue. Several are continued one after the other, each as if it were alone."""
    prompt_file: str | None = None
    """A UTF-8 file that is the prompt, its last line end included; "-": standard input."""
    max_tokens: int = 200
    """Most new tokens for each prompt."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw among so many of the likeliest tokens only."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability only."""
    seed: int = 0
    """Of the drawing; the same seed draws the same text. At temperature 0 nothing is drawn."""
    step: str = "newest"
    """Which checkpoint: "newest", "best" (lowest validation loss), or a step's number."""
    echo: bool = True
    """Print the prompt before its continuation."""
    document_start: bool = True
    """Put the end-of-document token before the prompt, where training has it."""


def main(argv: Sequence[str] | None = None, *, program: str = "moda-jax generate") -> int:
    """Parses `argv` (default: `sys.argv[1:]`) and generates.

    Returns the exit status (`moda_jax.train.errors`); after an error one line on stderr says what
    was expected. Raises SystemExit after `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        _refuse_chat(arguments)
        options = parse_options(GenerateOptions, arguments, prog=program, description=_DESCRIPTION)
        _generate(options, _prompts(options))
        return EXIT_FINISHED

    return exit_status(run)


def _refuse_chat(arguments: Sequence[str]) -> None:
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if option in _CHAT_OPTIONS:
            raise ValueError(
                f"{option}: chat templates are not applied here, sorry; RUN continues a text, so "
                f"write the template into --prompt (special tokens spelled out are read as such)"
            )


def _prompts(options: GenerateOptions) -> list[str]:
    """The texts to continue. Raises ValueError for none, for a file that is no UTF-8 text."""
    require_positive(options, "max_tokens")
    if options.temperature == 0:
        refuse_unused(options, ("top_k", "top_p"), "beside --temperature 0, which draws nothing")
    if options.prompt_file is not None:
        if options.prompt:
            raise ValueError("--prompt-file: expected no --prompt beside it, got both")
        return [read_text(options.prompt_file, "--prompt-file")]
    if not options.prompt:
        raise ValueError(
            "--prompt: expected a text to continue, or --prompt-file FILE (- is standard input); "
            "an empty text begins a new document"
        )
    for text in options.prompt:
        # What the command line cannot decode arrives as lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"--prompt: expected a text that UTF-8 can encode, got {text!r}")
    return list(options.prompt)


def read_text(name: str, option: str) -> str:
    """The text in the UTF-8 file `name`, or on standard input if that is "-".

    Raises ValueError, naming the command line's `option`.
    """
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise ValueError(
            f"{option}: expected a text file, got {name!r}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: expected UTF-8 text, got {name!r}: {error}") from error


def _generate(options: GenerateOptions, prompts: Sequence[str]) -> None:
    # What only generation needs takes seconds to import: not for a mistyped option.
    from jax.errors import JaxRuntimeError

    from moda_jax.data.tokenizer import TextStream
    from moda_jax.model.generation import stream
    from moda_jax.train.compilation_cache import CompilationCache
    from moda_jax.train.memory import is_out_of_memory
    from moda_jax.train.trained import load_named

    with CompilationCache("auto"):
        model, tokenizer, _ = load_named(options.run, options.step)
        if (template := _chat_template(Path(options.run))) is not None:
            line = f"note: {template} is a chat template, which is not applied; see --help"
            print(escape_controls(line), file=sys.stderr)
        for number, prompt in enumerate(prompts, start=1):
            start = [tokenizer.eos_id] if options.document_start else []
            tokens = [*start, *tokenizer.encode(prompt)]
            if not tokens:
                raise ValueError(
                    "--prompt: expected a text of at least one token with --no-document-start, "
                    "got none"
                )
            with naming(_NAMES):
                new_tokens = stream(
                    model,
                    tokens,
                    max_new_tokens=options.max_tokens,
                    temperature=options.temperature,
                    top_k=options.top_k,
                    top_p=options.top_p,
                    stop_tokens=(tokenizer.eos_id,),
                    seed=options.seed,
                )
            try:
                # Drawn before anything is printed: this makes the cache, for which memory may lack.
                first = list(itertools.islice(new_tokens, 1))
                if len(prompts) > 1:
                    _show(f"[{number}/{len(prompts)}]\n")
                if options.echo:
                    _show(prompt)
                _show_tokens(itertools.chain(first, new_tokens), TextStream(tokenizer, tokens))
            except JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise ValueError(
                    f"--max-tokens: expected a cache that fits in memory, got {options.max_tokens} "
                    f"after {len(tokens)} tokens of the prompt"
                ) from error


def _show_tokens(tokens: Iterable[int], text: "TextStream") -> None:
    try:
        for token in tokens:
            _show(text.push(token))
    except KeyboardInterrupt:
        _show("\n")  # so that the message has a line of its own
        raise
    _show(text.finish() + "\n")


def _chat_template(run: Path) -> Path | None:
    """The file of the chat template that came with an imported model."""
    for folder in (run, run / "huggingface"):
        for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
            path = folder / name
            if path.is_file() and (
                name != "tokenizer_config.json" or b'"chat_template"' in path.read_bytes()
            ):
                return path
    return None


def _show(text: str) -> None:
    """Writes at once; a terminal obeys no control characters of a model."""
    if not text:
        return
    out = sys.stdout
    if out.isatty():
        content = escape_controls(text).encode(out.encoding, "backslashreplace")
    else:
        content = text.encode("utf-8")
    out.buffer.write(content)
    out.buffer.flush()
