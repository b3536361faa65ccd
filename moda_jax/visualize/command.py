"""The command `moda-jax visualize RUN`: pictures of a run's attention."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from moda_jax.cli import exit_status, parse_options
from moda_jax.options import refuse_unused, result_folder
from moda_jax.train.errors import EXIT_FINISHED
from moda_jax.train.generate_command import read_text

_DESCRIPTION = """Draws where the attention of a run's model looks.

RUN is the folder of a run, in progress or finished. --text FILE reads a document and writes
attention.html (pick a layer and a head), attention.png (sequence | depth heat maps of layers and
heads), depth_mass.png (by layer and slot) and attention_sink.png (mass on the first token).
--training writes depth_mass_by_step.png: the mass on depth at each validation, by layer."""

_DEFAULT_PANELS, _MOST_PANELS = 4, 8


@dataclasses.dataclass(frozen=True)
class VisualizeOptions:
    """What the command line sets."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder."""
    text: str | None = None
    """A UTF-8 file that is one document; "-": standard input."""
    training: bool = False
    """Draw the mass on depth over training."""
    tokens: int | None = None
    """Only the first so many tokens of the text, the token before the document counted."""
    layers: tuple[int, ...] | None = None
    """Only these, by number from 0; None: all in the page, four in the picture."""
    heads: tuple[int, ...] | None = None
    """Only these query heads; None: as for layers."""
    step: str = "newest"
    """Which checkpoint: "newest", "best" (lowest validation loss), or a step's number."""
    output: str | None = None
    """Folder of the pictures; None: pictures/ in the run's folder."""


def main(argv: Sequence[str] | None = None, *, program: str = "moda-jax visualize") -> int:
    """Parses `argv` (default: `sys.argv[1:]`) and draws.

    Returns the exit status (`moda_jax.train.errors`); after an error one line on stderr says what
    was expected. Raises SystemExit after `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        options = parse_options(VisualizeOptions, arguments, prog=program, description=_DESCRIPTION)
        if options.text is None and not options.training:
            raise ValueError("moda-jax visualize: expected --text FILE or --training, got neither")
        if options.text is None:
            refuse_unused(options, ("tokens", "layers", "heads", "step"), "without --text")
        text = None if options.text is None else read_text(options.text, "--text")
        folder = result_folder("--output", options.output, options.run, "pictures")
        written = _draw_text(options, text, folder) if text is not None else []
        written += [_draw_training(options, folder)] if options.training else []
        for path in written:
            print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)", flush=True)
        return EXIT_FINISHED

    return exit_status(run)


def _draw_text(options: VisualizeOptions, text: str, folder: Path) -> list[Path]:
    # What only this needs takes seconds to import: not for a mistyped option.
    from moda_jax.train.compilation_cache import CompilationCache
    from moda_jax.train.report import plot_attention_mass
    from moda_jax.train.trained import load_named
    from moda_jax.visualize.figures import plot_sink, plot_weights
    from moda_jax.visualize.page import write_page
    from moda_jax.visualize.text_attention import look

    with CompilationCache("auto"):
        model, tokenizer, step = load_named(options.run, options.step)
        attention = look(
            model,
            tokenizer,
            text,
            title=f"{Path(options.run).resolve().name}, step {step}",
            most_tokens=options.tokens,
            layers=options.layers,
            heads=options.heads,
        )
    page, weights, mass, sink = (
        folder / name
        for name in ("attention.html", "attention.png", "depth_mass.png", "attention_sink.png")
    )
    write_page(attention, page)
    plot_weights(
        attention,
        weights,
        most_layers=_DEFAULT_PANELS if options.layers is None else _MOST_PANELS,
        most_heads=_DEFAULT_PANELS if options.heads is None else _MOST_PANELS,
    )
    plot_sink(attention, sink)
    if not attention.slots:
        print(f"no {mass.name}: {attention.mechanism}", flush=True)
        return [page, weights, sink]
    plot_attention_mass(attention.mass, attention.slots, mass)
    return [page, weights, mass, sink]


def _draw_training(options: VisualizeOptions, folder: Path) -> Path:
    from moda_jax.train.metrics import METRICS_FILE, read_metrics
    from moda_jax.visualize.figures import plot_mass_by_step
    from moda_jax.visualize.mass_by_step import mass_by_step

    run = Path(options.run)
    steps, layers, mass = mass_by_step(read_metrics(run / METRICS_FILE), run / METRICS_FILE)
    path = folder / "depth_mass_by_step.png"
    plot_mass_by_step(steps, mass, layers, f"{run.resolve().name}, mass on depth", path)
    return path
