"""The command `moda-jax eval RUN`: perplexity of texts, and tasks of lm-evaluation-harness."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moda_jax.cli import exit_status, parse_options
from moda_jax.evaluate import BATCH_TOKENS
from moda_jax.evaluate.data import DEFAULT_FOLDER
from moda_jax.evaluate.paper_tasks import METRICS, TABLE_4
from moda_jax.options import naming, refuse_unused, require_positive, result_folder
from moda_jax.train.errors import EXIT_FINISHED

if TYPE_CHECKING:  # these take seconds to import: not for a mistyped option
    from lm_eval.tasks import TaskManager

    from moda_jax.evaluate.opened import OpenRun
    from moda_jax.evaluate.perplexity import Text, TextLoss

_DESCRIPTION = """Evaluates the model of a run: perplexity of texts, and tasks of
lm-evaluation-harness (the extra `eval`). Results are printed and written as JSON.

RUN is the folder of a run. With --sources NAME=PATH ... the perplexity of each source, and bits per
byte; PATH is what `moda-jax prepare` takes. With --tasks ... scores of tasks: "paper" is the ten of
the paper's Table 4, whose data `make eval-data` fetches. Nothing is downloaded here."""


_OF_SOURCES = "window", "stride", "max_bytes", "text_field"
_OF_TASKS = "data", "include_path", "limit", "max_length", "add_bos_token"
_DATA_NAMES = {"DataConfig.source": "--sources", "DataConfig.text_field": "--text-field"}


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """What the command line sets."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    step: str = "newest"
    """Which checkpoint: "newest", "best" (lowest validation loss), or a step's number."""
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
    _check(options, sources, tasks)
    folder = result_folder("--output-dir", options.output_dir, options.run, "evaluation")
    # All that is asked for is looked up before the first part of it takes its time.
    texts = _open_sources(sources, options)
    manager = _find_tasks(tasks, options) if tasks else None

    from moda_jax.evaluate.opened import open_run
    from moda_jax.train.compilation_cache import CompilationCache

    with CompilationCache(options.compilation_cache):
        opened = open_run(options.run, step=options.step, batch_tokens=options.batch_tokens)
        count = opened.scorer.num_row_shards
        _say(
            f"{options.run}, step {opened.step}: {opened.scorer.num_parameters / 1e6:,.1f} M "
            f"parameters, {count} device{'' if count == 1 else 's'} ({opened.scorer.device_kind})"
        )
        if texts:
            _evaluate_sources(opened, sources, texts, options, folder)
        if manager is not None:
            _evaluate_tasks(opened, tasks, manager, options, folder)


def _check(options: EvalOptions, sources: Mapping[str, str], tasks: Sequence[str]) -> None:
    if not sources and not tasks:
        raise ValueError("moda-jax eval: expected --sources NAME=PATH ... or --tasks ..., got none")
    if not sources:
        refuse_unused(options, _OF_SOURCES, "without --sources")
    if not tasks:
        refuse_unused(options, _OF_TASKS, "without --tasks")
    require_positive(
        options, "window", "stride", "max_bytes", "limit", "max_length", "batch_tokens"
    )
    if options.window is not None:
        _check_stride(options, options.window)
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "--tasks: expected lm-evaluation-harness, which is not installed: "
            "python -m pip install lm-eval (the extra `eval`)"
        )


def _check_stride(options: EvalOptions, window: int) -> None:
    if options.stride is not None and options.stride > window:
        raise ValueError(f"--stride: expected at most the window, {window}, got {options.stride}")


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


def _open_sources(sources: Mapping[str, str], options: EvalOptions) -> "dict[str, Iterable[Text]]":
    if not sources:
        return {}
    from moda_jax.evaluate.perplexity import read_texts

    with naming(_DATA_NAMES):
        return {
            name: read_texts(path, text_field=options.text_field, max_bytes=options.max_bytes)
            for name, path in sources.items()
        }


def _evaluate_sources(
    opened: "OpenRun",
    sources: Mapping[str, str],
    texts: "Mapping[str, Iterable[Text]]",
    options: EvalOptions,
    folder: Path,
) -> None:
    from moda_jax.data.units import NAMED
    from moda_jax.evaluate.perplexity import measure, summarize, table
    from moda_jax.evaluate.progress import ProgressBar

    window = opened.seq_len if options.window is None else options.window
    _check_stride(options, window)
    stride = window if options.stride is None else options.stride
    losses: dict[str, TextLoss] = {}
    started = time.perf_counter()
    with ProgressBar() as bar, naming(_DATA_NAMES):
        for name, documents in texts.items():
            with naming({"texts": f"--sources {name}"}):
                losses[name] = measure(
                    opened.scorer,
                    opened.tokenizer,
                    documents,
                    window=window,
                    stride=stride,
                    report=bar.track(name),
                )
    seconds = time.perf_counter() - started
    tokens = sum(loss.tokens for loss in losses.values())
    kind = "chunks" if stride == window else f"windows that go on by {stride}"
    _say(f"{kind} of {window} tokens; {tokens:,} tokens in {seconds:.1f} s\n")
    _print_table(table(losses))
    settings = {
        "sources": {
            name: path if path in NAMED else _absolute(path) for name, path in sources.items()
        },
        "window": window,
        "stride": stride,
        "max_bytes": options.max_bytes,
        "text_field": options.text_field,
    }
    _write("perplexity", opened, options.run, settings, summarize(losses), folder)


def _find_tasks(names: Sequence[str], options: EvalOptions) -> "TaskManager":
    # Data that is not on this machine is an error, not a download.
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # the harness shows a bar for each task and step
    from moda_jax.evaluate.harness import find_tasks

    return find_tasks(names, data=options.data, include_path=options.include_path)


def _evaluate_tasks(
    opened: "OpenRun",
    names: Sequence[str],
    manager: "TaskManager",
    options: EvalOptions,
    folder: Path,
) -> None:
    from moda_jax.evaluate.harness import ModaJaxLM, run_tasks

    lm = ModaJaxLM(opened, max_length=options.max_length, add_bos_token=options.add_bos_token)
    started = time.perf_counter()
    scores = run_tasks(lm, names, manager, data=options.data, limit=options.limit)
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
        "tasks": list(names),
        "max_length": lm.requester.max_length,
        "add_bos_token": options.add_bos_token,
        "limit": options.limit,
        "data": _absolute(options.data),
        "include_path": options.include_path and _absolute(options.include_path),
    }
    beside = {
        "paper_table_4": _paper_scores(scores),
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    results = {"tasks": scores} | speed | beside
    _write("tasks", opened, options.run, settings, results, folder)


def task_table(scores: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table: a row a task, the paper's scores beside its ten, and the mean of those."""
    paper = _paper_scores(scores)
    rows = [("task", "score", "this model", "±", "samples", *TABLE_4)]
    ours = []
    for name, found in scores.items():
        metric = METRICS.get(name) or next((key for key in found if key != "samples"), "")
        value, error = found[metric], found.get(f"{metric}_stderr")
        if name in METRICS and value is not None:
            ours.append(100 * value)
        beside = [f"{paper[model][name]:.2f}" if name in METRICS else "" for model in TABLE_4]
        # Other tasks' scores may be no shares: they are shown as the harness gives them.
        show = "{:.2%}" if name in METRICS else "{:.4f}"
        shown = [None if x is None else show.format(x).rstrip("%") for x in (value, error)]
        cells = shown[0] or "not finite", shown[1] or "", f"{found['samples']:,}"
        rows.append((name, metric, *cells, *beside))
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


def _write(
    kind: str,
    opened: "OpenRun",
    run: str,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    folder: Path,
) -> None:
    """Writes KIND-STEP-HASH.json: other settings, or another run's, have another name."""
    settings = {"run": _absolute(run), "step": opened.step, **settings}
    spelled = json.dumps(settings, sort_keys=True).encode()
    path = folder / f"{kind}-{opened.step}-{hashlib.sha256(spelled).hexdigest()[:8]}.json"
    devices = f"{opened.scorer.num_row_shards} x {opened.scorer.device_kind}"
    content = {"settings": settings, "devices": devices, **results}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)
    _say(f"\n{path} has it too")


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _say(line: str) -> None:
    print(line, flush=True)
