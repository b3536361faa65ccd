"""What is made of an experiment's results: the page with its table, and the plot of its losses."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from moda_jax.sweep.experiment import Experiment
from moda_jax.sweep.results import Result
from moda_jax.sweep.table import compare, describe, make_rows, markdown, read_results

PAGE = "README.md"
PLOT = "losses.png"


def write_page(experiment: Experiment, file: Path, results_dir: Path) -> str:
    """Writes README.md and losses.png to `results_dir`, from the results there; returns the table.

    Args:
        experiment: whose results.
        file: that defines it, for the command on the page.
        results_dir: the folder; made if need be.
    """
    results = read_results(experiment, results_dir)
    rows, comparisons = make_rows(experiment, results.by_run), compare(experiment, results.by_run)
    table = markdown(rows, comparisons)
    results_dir.mkdir(parents=True, exist_ok=True)
    parts = [f"# {experiment.title}", f"`moda-jax sweep {file}` made the results and this page."]
    parts += [table]
    if any(result.validation_curve for result in results.by_run.values()):
        plot_losses(experiment, results.by_run, results_dir / PLOT)
        parts.append(f"![Validation loss by tokens and by time]({PLOT})")
    parts += describe(experiment, results)
    (results_dir / PAGE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return table


def plot_losses(experiment: Experiment, results: Mapping[str, Result], path: Path) -> None:
    """Draws validation losses (nats per token), the mean of the seeds, by tokens and by seconds.

    Without the first tenth of the steps, whose losses would leave no room for differences.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    for label in experiment.configs:
        runs = [results[run.name] for run in experiment.runs("")
                if run.label == label and run.name in results]  # fmt: skip
        steps, losses = _mean_curve(runs)
        if not steps:
            continue
        first = runs[0]
        tokens = [step * first.tokens / first.steps / 1e6 for step in steps]
        by_tokens.plot(tokens, losses, label=label, linewidth=1)
        rates = [run.tokens_per_second for run in runs if run.tokens_per_second]
        if rates:
            seconds = [1e6 * token / statistics.median(rates) for token in tokens]
            by_seconds.plot(seconds, losses, label=label, linewidth=1)
    by_tokens.set(xlabel="million target tokens", ylabel="validation loss (nats per token)")
    by_seconds.set(xlabel="seconds of training steps")
    for axes in (by_tokens, by_seconds):
        axes.grid(alpha=0.3)
    by_tokens.legend(fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _mean_curve(runs: Sequence[Result]) -> tuple[list[float], list[float]]:
    """Steps at which every run was validated, and the mean loss there."""
    curves = [dict(run.validation_curve) for run in runs if run.steps]
    if not curves:
        return [], []
    last = max(max(curve, default=0.0) for curve in curves)
    common = set(curves[0]).intersection(*curves[1:])
    steps = sorted(step for step in common if step >= last / 10)
    return steps, [statistics.fmean(curve[step] for curve in curves) for step in steps]
