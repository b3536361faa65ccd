"""What a run leaves to compare: one small JSON file each."""

import dataclasses
import json
import os
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moda_jax.config import Config, dataclass_from_json, to_json
from moda_jax.config.files import flatten
from moda_jax.model.flops import count_flops, count_parameters
from moda_jax.sweep.experiment import Run
from moda_jax.train.metrics import FINAL, METRICS_FILE, read_metrics
from moda_jax.train.run_folder import CORPUS_FILE

CURVE_POINTS = 100
_LOSS = "validation_loss"
_BY_SOURCE = f"{_LOSS}/"
# They change neither what is learnt nor how fast; settings that a version lacks are no harm.
_IRRELEVANT = {
    "name",
    "output_dir",
    "prepared_dir",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "sample_prompt",
    "sample_tokens",
    "profile",
    "wandb",
    "compilation_cache",
}

Curve = list[tuple[float, float]]
"""(step, nats per target token), by step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended. Losses are nats per target token; None: not measured."""

    label: str
    seed: int
    status: Literal["finished", "diverged", "failed"]
    message: str | None = None
    """Why it diverged or failed, one line."""
    steps: int = 0
    """Optimizer steps done."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the config by dotted name, without what changes neither learning nor speed."""
    validation_loss: float | None = None
    """Of the last validation, over four times as many batches as the others."""
    best_validation_loss: float | None = None
    """The lowest of the validations during training."""
    source_losses: dict[str, float] = dataclasses.field(default_factory=dict)
    """The last validation's by source."""
    tokens: float = 0.0
    """Target tokens trained on: steps times the mean over the logged steps."""
    seconds: float | None = None
    """Of training steps: tokens / tokens_per_second. Compilation, validation and saving are not
    in it, nor depends it on how often the run was interrupted."""
    tokens_per_second: float | None = None
    """Median of what was logged."""
    process_seconds: float | None = None
    """Wall-clock of the process that ended the run, everything included."""
    parameters: int = 0
    flops_per_token: float = 0.0
    """Model FLOPs of a training step (`moda_jax.model.flops`)."""
    peak_memory_bytes: int | None = None
    """Highest of any device, as its allocator says; None where it does not (CPUs)."""
    device: str | None = None
    """Number and kind."""
    jax_version: str | None = None
    code: str | None = None
    """Git commit of this library's checkout, "+" after it if files differ; None: no checkout."""
    corpus: str | None = None
    """Fingerprint of the training text, or of each source, with a space between."""
    loss_curve: Curve = dataclasses.field(default_factory=list)
    """Training loss, means over up to 100 parts of the run."""
    validation_curve: Curve = dataclasses.field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether the run need not be started again: it has finished or diverged."""
        return self.status != "failed"


def result_path(results_dir: Path, run: Run) -> Path:
    """Where the result of `run` is kept."""
    return results_dir / f"{run.name}.json"


def write_result(path: Path, result: Result) -> None:
    """Writes `result`, a line for each field; a kill leaves the old file or the new one.

    A failed run does not overwrite one that is over: two sweeps may have met in one run's folder.
    """
    if not result.is_over and (old := read_result(path)) is not None and old.is_over:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = dataclasses.asdict(result)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    os.replace(temporary, path)


def read_result(path: Path) -> Result | None:
    """The result in `path`; None if there is no such file.

    Raises ValueError, naming the file, for a damaged one.
    """
    try:
        fields = json.loads(path.read_bytes())
        known = {field.name for field in dataclasses.fields(Result)}
        for curve in ("loss_curve", "validation_curve"):
            fields[curve] = [tuple(point) for point in fields.get(curve, [])]
        return Result(**{name: value for name, value in fields.items() if name in known})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected the result of a run, got a damaged file ({error}); remove it, and "
            f"the sweep makes it again"
        ) from error


def settings_of(config: Config) -> dict[str, Any]:
    """What makes a run's result, by dotted name."""
    settings = flatten(to_json(config))
    return {name: value for name, value in settings.items() if name not in _IRRELEVANT}


def changed_settings(result: Result, config: Config) -> list[str]:
    """The settings of `config` with which `result` was not made, as "name old -> new"."""
    here = settings_of(config)
    try:
        then = dataclass_from_json(_nested(result.settings) | {"name": "then"}, Config)
        there = settings_of(then)  # a setting that is younger than the result had its default
    except ValueError:  # one that does not exist any more
        there = result.settings
    return [
        f"{name} {there.get(name)} -> {here.get(name)}"
        for name in sorted(here | there)
        if there.get(name) != here.get(name)
    ]


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, field = name.split(".")
        owner = nested
        for group in groups:
            owner = owner.setdefault(group, {})
        owner[field] = value
    return nested


def summarize(run: Run, records: Iterable[Mapping[str, float]]) -> dict[str, Any]:
    """The fields of a `Result` that follow from the config and the records of metrics.jsonl."""
    records = list(records)
    steps = int(max((record["step"] for record in records), default=0))
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    validations = [(record["step"], record[_LOSS]) for record in records if _LOSS in record]
    final = next((record for record in reversed(records) if FINAL + _LOSS in record), {})
    targets = [record["targets"] for record in records if "targets" in record]
    rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    tokens = steps * statistics.fmean(targets) if targets else 0.0
    rate = statistics.median(rates) if rates else None
    model = run.config.model
    return {
        "steps": steps,
        "settings": settings_of(run.config),
        "validation_loss": final.get(FINAL + _LOSS),
        "best_validation_loss": min((loss for _, loss in validations), default=None),
        "source_losses": {
            name.removeprefix(FINAL + _BY_SOURCE): value
            for name, value in final.items()
            if name.startswith(FINAL + _BY_SOURCE)
        },
        "tokens": tokens,
        "seconds": tokens / rate if rate else None,
        "tokens_per_second": rate,
        "parameters": count_parameters(model).total,
        "flops_per_token": count_flops(model, run.config.data.seq_len).train_per_token,
        "loss_curve": thin(losses, CURVE_POINTS),
        "validation_curve": [(step, round(loss, 6)) for step, loss in validations],
    }


def summarize_folder(run: Run) -> dict[str, Any]:
    """`summarize` of what the run's folder holds, with the corpus's fingerprint."""
    folder = Path(run.config.output_dir, run.config.name)
    fields = summarize(run, read_metrics(folder / METRICS_FILE))
    try:
        corpus = json.loads((folder / CORPUS_FILE).read_bytes())
    except (OSError, ValueError):
        corpus = {}
    # One text, or a list of sources.
    texts = [corpus, *corpus.get("sources", [])]
    fingerprints = [text["fingerprint"] for text in texts if "fingerprint" in text]
    return fields | {"corpus": " ".join(fingerprints) or None}


def thin(points: Sequence[tuple[float, float]], most: int) -> Curve:
    """At most `most` points: means of as many equally long parts of `points`.

    A mean, as a single step's loss is noise of its batch.
    """
    size = -(-len(points) // most)
    parts = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [
        (statistics.fmean(x for x, _ in part), round(statistics.fmean(y for _, y in part), 6))
        for part in parts
    ]


def code_version() -> str | None:
    """Git commit of the checkout that this library runs from, with "+" if its files differ."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD").strip()
        return commit + "+" * bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30
    ).stdout
