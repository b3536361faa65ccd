"""`moda-jax sweep FILE`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from moda_jax.model.flops import count_parameters
from moda_jax.sweep.experiment import Experiment, Run, load_experiment, share_of
from moda_jax.terminal import discard_output, one_line
from moda_jax.train.errors import (
    EXIT_BAD_INPUT,
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    EXIT_PIPE,
    EXIT_SOME_FAILED,
    EXIT_STOPPED,
)

_DESCRIPTION = f"""Trains the runs of an experiment one after another and compares their results.

FILE is a Python file that defines `experiment`, a moda_jax.sweep.Experiment: configs by label, each
with its seeds. Every run is a run as of `moda-jax train`, in a process of its own. A run that is
over is not repeated and one that was interrupted goes on: start the same command again after
whatever happened. A run's result is written as soon as it is over, and README.md and losses.png,
beside the results, are made anew.

A run that diverges is a result. One that fails (out of memory, a bad config, a crash) is named and
tried again by the next call. SIGTERM, SIGHUP and Ctrl-C save the run in progress and end the sweep.
Exit status: {EXIT_FINISHED} all runs are over; {EXIT_SOME_FAILED} some failed; {EXIT_STOPPED}
stopped by a signal or --stop-after ({EXIT_INTERRUPTED}: by Ctrl-C), the same command goes on;
{EXIT_BAD_INPUT} bad input."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(arguments: Sequence[str], *, program: str = "moda-jax sweep") -> int:
    """Runs, or only lists or tabulates, an experiment; returns the exit status.

    After an error one line on stderr says what was expected. Raises SystemExit after `--help`.
    """
    try:
        return _sweep(_parse(arguments, program))
    except BrokenPipeError:
        discard_output()
        return EXIT_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _parse(arguments: Sequence[str], program: str) -> argparse.Namespace:
    parser = _Parser(
        prog=program,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="defines `experiment`")
    parser.add_argument(
        "--share", metavar="K/N", type=_share, default=(1, 1),
        help="only the K-th of N parts of the runs, about equal in FLOPs",
    )  # fmt: skip
    parser.add_argument(
        "--stop-after", metavar="SECONDS", type=_seconds,
        help="save the run in progress after so long and end with status "
        f"{EXIT_STOPPED}; leave time for the saving",
    )  # fmt: skip
    parser.add_argument("--table", action="store_true", help="only the page, of what is there")
    parser.add_argument("--list", action="store_true", help="only list the runs and their cost")
    parser.add_argument(
        "--output-dir", metavar="DIR", default="runs/sweeps",
        help="of the runs' folders (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--results-dir", metavar="DIR", type=Path,
        help="of the results (results/NAME beside FILE)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def _share(text: str) -> tuple[int, int]:
    number, separator, count = text.partition("/")
    if not (separator and number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected K/N, as 2/4, got {text!r}")
    return int(number), int(count)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return seconds


def _sweep(options: argparse.Namespace) -> int:
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        raise ValueError(
            "JAX_COORDINATOR_ADDRESS: expected none, as a sweep's runs have one process each; "
            "--share K/N divides the runs among machines"
        )
    experiment = load_experiment(options.file)
    results_dir = options.results_dir or options.file.parent / "results" / experiment.name
    runs = share_of(experiment.runs(options.output_dir), *options.share)
    if options.list:
        print("\n".join(_list(experiment, runs)))
        return EXIT_FINISHED
    # What only runs and pictures need takes a second to import: not for a mistyped option.
    from moda_jax.sweep.page import PAGE, write_page
    from moda_jax.sweep.runner import Runner

    status = EXIT_FINISHED
    if not options.table:
        with Runner(
            options.file,
            output_dir=options.output_dir,
            results_dir=results_dir,
            stop_after=options.stop_after,
            say=_say,
        ) as runner:
            status = runner.run_all(runs)
    print(write_page(experiment, options.file, results_dir))
    print(f"{results_dir / PAGE} has it too")
    sys.stdout.flush()
    return status


def _say(line: str) -> None:
    print(line, flush=True)


def _list(experiment: Experiment, runs: Sequence[Run]) -> list[str]:
    """A line a run, and what all cost: computed from tokens and expected speed, not measured."""
    hours = [_hours(experiment, run) for run in runs]
    lines = [
        f"{run.name}: {count_parameters(run.config.model).total / 1e6:.2f} M parameters, "
        f"{run.tokens / 1e6:.1f} M tokens, {run.flops:.2e} FLOP"
        + ("" if cost is None else f", {60 * cost:.1f} minutes computed")
        for run, cost in zip(runs, hours, strict=True)
    ]
    known = [cost for cost in hours if cost is not None]
    total = f"{len(runs)} runs, {sum(run.tokens for run in runs) / 1e6:,.1f} M tokens"
    return [*lines, total + (f", {sum(known):.2f} hours computed" if known else "")]


def _hours(experiment: Experiment, run: Run) -> float | None:
    """Of training steps: compilation, validation and saving come on top."""
    if experiment.speed is None:
        return None
    return run.tokens / experiment.speed(run.config) / 3600
