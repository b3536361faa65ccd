"""The command `moda-jax eval RUN`: perplexity of texts, and tasks of lm-evaluation-harness."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from moda_jax.cli import exit_status, parse_options
from moda_jax.evaluate.data import DEFAULT_FOLDER
from moda_jax.evaluate.opened import OpenRun, Step, open_run
from moda_jax.evaluate.paper_tasks import METRICS, TABLE_4
from moda_jax.evaluate.perplexity import TextLoss, measure, read_texts, summarize, table
from moda_jax.evaluate.progress import ProgressBar
from moda_jax.evaluate.scoring import BATCH_TOKENS
from moda_jax.train.compilation_cache import CompilationCache
from moda_jax.train.errors import EXIT_FINISHED

_DESCRIPTION = """Evaluates the model of a run: perplexity of texts, and tasks of
lm-evaluation-harness (the extra `eval`). Results are printed and written as JSON.

RUN is the folder of a run. With --sources NAME=PATH ... the perplexity of each source, and bits per
byte; PATH is what `moda-jax prepare` takes. With --tasks ... scores of tasks: "paper" is the ten of
the paper's Table 4, whose data `make eval-data` fetches. Nothing is downloaded here."""


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """What the command line sets."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    step: Step = "newest"
    """Of the checkpoint; "best" has the lowest validation loss."""
    sources: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=PATH ...]")] = ()
    """Texts, each as NAME=PATH."""
    window: int | None = None
    """Most tokens that the model reads of a text at a time; None: those of a training sequence."""
    stride: int | None = None
    """By how many tokens a window goes on; None: by the whole window, which makes chunks."""
    max_bytes: int | None = None
    """Only the first bytes of each source; None: all."""
    text_field: str = "text"
    """The field of a .jsonl record, or the column, that holds the document."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[paper|TASK ...]")] = ()
    """"paper", or names of tasks."""
    data: str = DEFAULT_FOLDER
    """The folder that `make eval-data` filled."""
    include_path: str | None = None
    """A folder of task definitions, YAML files as lm-evaluation-harness reads them."""
    limit: int | None = None
    """Only the first documents of each task; None: all."""
    max_length: int | None = None
    """Most tokens that the model reads for a task; None: those of a training sequence."""
    add_bos_token: bool = False
    """Contexts of tasks begin with the end-of-document token, as documents did in training."""
    batch_tokens: int = BATCH_TOKENS
    """Tokens of a batch on each device, padding included."""
    compilation_cache: str = "auto"
    """Where compiled programs are kept: "auto", "off" or a folder."""
    output_dir: str | None = None
    """Of the JSON files; None: "evaluation" in the run's folder."""


def main(argv: Sequence[str] | None = None, *, program: str = "moda-jax eval") -> int:
    """Parses `argv` (default: `sys.argv[1:]`) and evaluates.

    Returns the exit status (`moda_jax.train.errors`); after an error one line on stderr says what
    was expected. Raises SystemExit after `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        evaluate(parse_options(EvalOptions, arguments, prog=program, description=_DESCRIPTION))
        return EXIT_FINISHED

    return exit_status(run)


def evaluate(options: EvalOptions) -> None:
    """Prints and writes what `options` ask for. Raises ValueError for what cannot be used."""
    sources = _named(options.sources)
    tasks = _task_names(options.tasks)
    if not sources and not tasks:
        raise ValueError("moda-jax eval: expected --sources NAME=PATH ... or --tasks ..., got none")
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "--tasks: expected lm-evaluation-harness, which is not installed: "
            "python -m pip install lm-eval (the extra `eval`)"
        )
    with CompilationCache(options.compilation_cache):
        opened = open_run(options.run, step=options.step, batch_tokens=options.batch_tokens)
        parameters = opened.scorer.num_parameters
        _say(
            f"{options.run}, step {opened.step}: {parameters / 1e6:,.1f} M parameters, "
            f"{opened.scorer.num_row_shards} devices ({opened.scorer.device_kind})"
        )
        if sources:
            _evaluate_sources(opened, sources, options)
        if tasks:
            _evaluate_tasks(opened, tasks, options)


def _named(sources: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in sources:
        name, separator, path = source.partition("=")
        if not (name and separator and path) or name in found:
            raise ValueError(f"--sources: expected NAME=PATH with a new name each, got {source!r}")
        found[name] = path
    return found


def _task_names(tasks: Sequence[str]) -> list[str]:
    """Each once, in order; "paper" stands for ten."""
    expanded = [name for task in tasks for name in (METRICS if task == "paper" else (task,))]
    return list(dict.fromkeys(expanded))


def _evaluate_sources(opened: OpenRun, sources: Mapping[str, str], options: EvalOptions) -> None:
    window = opened.seq_len if options.window is None else options.window
    stride = window if options.stride is None else options.stride
    losses: dict[str, TextLoss] = {}
    started = time.perf_counter()
    with ProgressBar() as bar:
        for name, path in sources.items():
            texts = read_texts(path, text_field=options.text_field, max_bytes=options.max_bytes)
            losses[name] = measure(
                opened.scorer,
                opened.tokenizer,
                texts,
                window=window,
                stride=stride,
                report=bar.track(name),
            )
    seconds = time.perf_counter() - started
    tokens = sum(loss.tokens for loss in losses.values())
    kind = "chunks" if stride == window else f"windows that go on by {stride}"
    _say(f"{kind} of {window} tokens; {tokens:,} tokens in {seconds:.1f} s\n")
    _print_table(table(losses))
    settings = {"window": window, "stride": stride, "max_bytes": options.max_bytes}
    paths = {"paths": dict(sources)}
    _write("perplexity", opened, settings | paths | summarize(losses), options)


def _evaluate_tasks(opened: OpenRun, names: Sequence[str], options: EvalOptions) -> None:
    # Data that is not on this machine is an error, not a download.
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # the harness shows a bar for each task and step
    from moda_jax.evaluate.harness import ModaJaxLM, run_tasks

    lm = ModaJaxLM(opened, max_length=options.max_length, add_bos_token=options.add_bos_token)
    started = time.perf_counter()
    scores = run_tasks(
        lm,
        names,
        data=options.data,
        include_path=options.include_path,
        limit=options.limit,
    )
    seconds = time.perf_counter() - started
    speed = {
        "requests": lm.num_requests,
        "rows": lm.requester.num_rows,
        "request_seconds": lm.seconds,
        "seconds": seconds,
        "requests_per_second": lm.num_requests / lm.seconds,
    }
    _say(
        f"{lm.num_requests:,} requests ({lm.requester.num_rows:,} sequences) in "
        f"{lm.seconds:.1f} s, {lm.num_requests / lm.seconds:,.0f} requests/s; "
        f"{seconds:.1f} s with the harness\n"
    )
    _print_table(task_table(scores))
    settings = {
        "max_length": lm.requester.max_length,
        "add_bos_token": options.add_bos_token,
        "limit": options.limit,
    }
    beside = {
        "paper_table_4": _paper_scores(scores),
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    _write("tasks", opened, settings | {"tasks": scores} | speed | beside, options)


def task_table(scores: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table: a row a task, the paper's scores beside its ten, and the mean of those."""
    paper = _paper_scores(scores)
    rows = [("task", "score", "this model", "±", "samples", *TABLE_4)]
    ours = []
    for name, found in scores.items():
        metric = METRICS.get(name) or next((key for key in found if key != "samples"), "")
        value, error = found[metric], found.get(f"{metric}_stderr")
        if name in METRICS:
            ours.append(100 * value)
        beside = [f"{paper[model][name]:.2f}" if name in METRICS else "" for model in TABLE_4]
        # Other tasks' scores may be no shares: they are shown as the harness gives them.
        scale = 100 if name in METRICS else 1
        rows.append(
            (
                name, metric, f"{scale * value:.2f}" if scale > 1 else f"{value:.4f}",
                "" if error is None else f"{scale * error:.2f}" if scale > 1 else f"{error:.4f}",
                f"{found['samples']:,}", *beside,
            )
        )  # fmt: skip
    if len(ours) == len(METRICS):
        means = [f"{sum(paper[model].values()) / len(METRICS):.2f}" for model in TABLE_4]
        rows.append(("mean of ten", "", f"{sum(ours) / len(ours):.2f}", "", "", *means))
    return rows


def _paper_scores(names: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        model: {name: score for name, score in zip(METRICS, found, strict=True) if name in names}
        for model, found in TABLE_4.items()
    }


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = (
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        _say("  ".join((first, *rest)).rstrip())


def _write(kind: str, opened: OpenRun, results: Mapping[str, Any], options: EvalOptions) -> None:
    folder = (
        Path(options.run, "evaluation") if options.output_dir is None else Path(options.output_dir)
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{opened.step}.json"
    devices = f"{opened.scorer.num_row_shards} x {opened.scorer.device_kind}"
    content = {"run": options.run, "step": opened.step, "devices": devices, **results}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
    _say(f"\n{path} has it too")


def _say(line: str) -> None:
    print(line, flush=True)
