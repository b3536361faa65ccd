"""The tables of an experiment's results, in Markdown: every config, and every comparison."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moda_jax.model.flops import count_flops, count_parameters
from moda_jax.sweep.experiment import Experiment
from moda_jax.sweep.results import (
    Result,
    changed_settings,
    read_result,
    result_path,
)
from moda_jax.sweep.statistics import Difference, deviation, difference, loss_at

_NOTHING = "–"
_HOW_TO_READ = (
    "Losses are the last validation's, in nats per target token: mean over n seeds, and spread, "
    "their standard deviation."
)
_HOW_TO_COMPARE = (
    "A difference is the mean over the seeds that both have, pair by pair, and its standard error. "
    "*At its time*: the loss after as many seconds of training steps as what it is compared with "
    "took in all, beside that one's loss. Of a slower run it is read off the curve before the "
    "learning rate has decayed, so it is an upper bound of what a schedule of that length gives."
)


class Results(NamedTuple):
    """What is there of an experiment."""

    by_run: dict[str, Result]
    """By a run's name; only those that were made with the experiment's settings."""
    notes: list[str]
    """A line about each result that cannot be used."""


class Row(NamedTuple):
    """A config's results over its seeds; losses are nats per target token."""

    label: str
    parameters: int
    flops_per_token: float
    losses: dict[int, float]
    """Last validation loss by seed, of the runs that finished."""
    diverged: dict[int, int]
    """Step at which training diverged, by seed."""
    source_losses: dict[str, float]
    """Mean over the seeds, by source."""
    tokens_per_second: float | None
    """Median of the seeds."""
    peak_memory_bytes: int | None
    paper: float | None


class Comparison(NamedTuple):
    """A config and what it is compared with."""

    label: str
    baseline: str
    parameters: float
    """Relative difference of the numbers of parameters."""
    difference: Difference | None
    at_its_time: float | None
    """Mean loss after as many seconds of training steps as the baseline took in all."""
    baseline_loss: float | None
    """Mean over the same seeds."""
    paper: float | None
    """Difference of the paper's losses."""


def read_results(experiment: Experiment, results_dir: Path) -> Results:
    """The results of the experiment's runs that are there and fit its settings."""
    found: dict[str, Result] = {}
    notes = []
    for run in experiment.runs(""):
        path = result_path(results_dir, run)
        try:
            result = read_result(path)
        except ValueError as error:
            notes.append(str(error))
            continue
        if result is None:
            continue
        changes = changed_settings(result, run.config) if result.is_over else []
        if changes:
            notes.append(describe_stale(path, changes))
        else:
            found[run.name] = result
    return Results(found, notes)


def describe_stale(path: Path, changes: Sequence[str]) -> str:
    """One line that says why a result is not one of this experiment's."""
    return (
        f"{path}: expected a result of the experiment's settings, got one of others "
        f"({', '.join(changes)}); remove it, or name the experiment otherwise"
    )


def make_rows(experiment: Experiment, results: Mapping[str, Result]) -> list[Row]:
    """One row a config, in the experiment's order. `results`: by a run's name."""
    return [_make_row(experiment, label, results) for label in experiment.configs]


def compare(experiment: Experiment, results: Mapping[str, Result]) -> list[Comparison]:
    """Every config beside each of its baselines. `results`: by a run's name."""
    return [
        _compare(experiment, label, baseline, results)
        for label in experiment.configs
        for baseline in experiment.baselines_of(label)
    ]


def _finished(
    experiment: Experiment, label: str, results: Mapping[str, Result]
) -> dict[int, Result]:
    """By seed."""
    runs = [run for run in experiment.runs("") if run.label == label and run.name in results]
    by_seed = {run.seed: results[run.name] for run in runs}
    return {seed: result for seed, result in by_seed.items() if result.status == "finished"}


def _losses(finished: Mapping[int, Result]) -> dict[int, float]:
    losses = {seed: result.validation_loss for seed, result in finished.items()}
    return {seed: loss for seed, loss in losses.items() if loss is not None}


def _make_row(experiment: Experiment, label: str, results: Mapping[str, Result]) -> Row:
    config, finished = experiment.configs[label], _finished(experiment, label, results)
    sources = sorted({name for result in finished.values() for name in result.source_losses})
    of_label = [r for r in results.values() if r.label == label]
    memory = [r.peak_memory_bytes for r in of_label if r.peak_memory_bytes is not None]
    return Row(
        label=label,
        parameters=count_parameters(config.model).total,
        flops_per_token=count_flops(config.model, config.data.seq_len).train_per_token,
        losses=_losses(finished),
        diverged={r.seed: r.steps for r in of_label if r.status == "diverged"},
        source_losses={
            name: statistics.fmean(
                r.source_losses[name] for r in finished.values() if name in r.source_losses
            )
            for name in sources
        },
        tokens_per_second=_median(r.tokens_per_second for r in finished.values()),
        peak_memory_bytes=max(memory, default=None),
        paper=experiment.paper.get(label),
    )


def _compare(
    experiment: Experiment, label: str, baseline: str, results: Mapping[str, Result]
) -> Comparison:
    here, there = (_finished(experiment, name, results) for name in (label, baseline))
    sizes = [count_parameters(experiment.configs[name].model).total for name in (label, baseline)]
    papers = [experiment.paper.get(name) for name in (label, baseline)]
    seconds = _median(result.seconds for result in there.values())
    seeds = sorted(_losses(here).keys() & _losses(there).keys())
    at_time = [] if seconds is None else [loss_at(here[seed], seconds) for seed in seeds]
    known = [loss for loss in at_time if loss is not None]
    return Comparison(
        label=label,
        baseline=baseline,
        parameters=sizes[0] / sizes[1] - 1,
        difference=difference(_losses(here), _losses(there)),
        at_its_time=statistics.fmean(known) if seeds and len(known) == len(seeds) else None,
        baseline_loss=statistics.fmean(_losses(there)[seed] for seed in seeds) if seeds else None,
        paper=None if None in papers else papers[0] - papers[1],  # type: ignore[operator]
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def markdown(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> str:
    """The two tables; a column that would be empty is left out, and so is an empty table."""
    sources = sorted({name for row in rows for name in row.source_losses})
    results = {
        "run": [f"`{row.label}`" for row in rows],
        "parameters": [f"{row.parameters / 1e6:.2f} M" for row in rows],
        "GFLOP/token": [f"{row.flops_per_token / 1e9:.3f}" for row in rows],
        "loss": [
            _number(statistics.fmean(row.losses.values()) if row.losses else None) for row in rows
        ],
        "spread": [_number(deviation(list(row.losses.values()))) for row in rows],
        "n": [_count(row) for row in rows],
    }
    for name in sources:
        results[f"loss: {name}"] = [_number(row.source_losses.get(name)) for row in rows]
    results |= {
        "tokens/s": [_integer(row.tokens_per_second) for row in rows],
        "peak memory": [_gib(row.peak_memory_bytes) for row in rows],
        "paper": [_number(row.paper) for row in rows],
    }
    compared = {
        "run": [f"`{c.label}`" for c in comparisons],
        "compared with": [f"`{c.baseline}`" for c in comparisons],
        "parameters": [f"{_sign(c.parameters)}{abs(100 * c.parameters):.2f}%" for c in comparisons],
        "difference": [_difference(c.difference) for c in comparisons],
        "pairs": [_NOTHING if c.difference is None else str(c.difference.pairs)
                  for c in comparisons],
        "at its time": [_beside(c.at_its_time, c.baseline_loss) for c in comparisons],
        "paper's difference": [
            _NOTHING if c.paper is None else _difference(Difference(c.paper, None, 0))
            for c in comparisons
        ],
    }  # fmt: skip
    parts = [_table(results), _HOW_TO_READ]
    if comparisons:
        parts += [_table(compared), _HOW_TO_COMPARE]
    return "\n\n".join(parts)


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    shown = {name: cells for name, cells in columns.items() if set(cells) != {_NOTHING}}
    lines = [list(shown), ["---"] * len(shown), *map(list, zip(*shown.values(), strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(experiment: Experiment, results: Results) -> list[str]:
    """What was run on what, what failed and what is missing, a paragraph each."""
    over = [result for result in results.by_run.values() if result.is_over]
    lines = []
    if over:
        tokens = sum(result.tokens for result in over)
        hours = sum(result.seconds or 0.0 for result in over) / 3600
        lines.append(
            f"{len(over)} runs, {tokens / 1e6:,.2f} M tokens and {hours:.2f} hours of training "
            f"steps in all; device {_names('device', over)}; JAX {_names('jax_version', over)}; "
            f"code {_names('code', over)}; corpus {_names('corpus', over)}."
        )
    failed = [f"`{name}` ({r.message})" for name, r in results.by_run.items() if not r.is_over]
    if failed:
        lines.append(f"Failed: {'; '.join(failed)}.")
    absent = [run.name for run in experiment.runs("") if run.name not in results.by_run]
    if absent:
        lines.append(f"Not run: {', '.join(f'`{name}`' for name in absent)}.")
    return [*lines, *results.notes]


def _names(field: str, results: Sequence[Result]) -> str:
    return ", ".join(sorted({str(getattr(result, field) or "unknown") for result in results}))


def _count(row: Row) -> str:
    parts = [str(len(row.losses))]
    parts += [f"seed {seed} diverged at step {step}" for seed, step in row.diverged.items()]
    return "; ".join(parts)


def _difference(value: Difference | None) -> str:
    if value is None:
        return _NOTHING
    error = "" if value.error is None else f" ± {value.error:.4f}"
    return f"{_sign(value.mean)}{abs(value.mean):.4f}{error}"


def _beside(loss: float | None, baseline: float | None) -> str:
    return _NOTHING if loss is None else f"{loss:.4f} beside {_number(baseline)}"


def _sign(value: float) -> str:
    return "−" if value < 0 else "+"


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4f}"


def _integer(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.0f}"


def _gib(value: int | None) -> str:
    return _NOTHING if value is None else f"{value / 2**30:.1f} GiB"
