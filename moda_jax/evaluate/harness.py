"""lm-evaluation-harness (the extra `eval`): the adapter, and tasks that are run through it.

The harness finds `ModaJaxLM` by an entry point of the group "lm_eval.models" that this package
declares. A harness that reads no entry points, as 0.4.13, is told of it by `register`, as
`python -m moda_jax.evaluate` does: the command `lm_eval` with this model.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  (it fills the registry, unless that has an entry already)
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager

from moda_jax.evaluate import BATCH_TOKENS
from moda_jax.evaluate.opened import OpenRun, open_run
from moda_jax.evaluate.paper_tasks import METRICS, check_data, load_tasks
from moda_jax.evaluate.progress import ProgressBar
from moda_jax.evaluate.requests import Requester

MODEL_NAME = "moda_jax"
"""Of the adapter, for `lm_eval run --model`."""

# What lm_eval's command passes, whatever the machine, where it is told nothing.
_NO_BATCH_SIZE, _NO_DEVICE = ("None", "1", "auto"), (None, "cuda:0")


class ModaJaxLM(LM):
    """A run's model for lm-evaluation-harness.

    Args:
      run: the run's folder, or the run, opened; what `--model_args` gives are strings and numbers.
      step: of the checkpoint; "newest", "best" or a number.
      max_length: most tokens that the model reads at a time; None: those of a training sequence.
      batch_tokens: tokens of a batch on each device, padding included.
      add_bos_token: contexts begin with the end-of-document token, as documents did in training.
      batch_size, max_batch_size, device: what the harness passes where nothing is said.

    Raises ValueError for another batch size, which `batch_tokens` sets, and another device, which
    JAX_PLATFORMS chooses.
    """

    def __init__(
        self,
        run: str | OpenRun,
        *,
        step: int | str = "newest",
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        add_bos_token: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) not in _NO_BATCH_SIZE or max_batch_size is not None:
            raise ValueError(
                f"batch_size: expected none, as batch_tokens=N in --model_args sets how much is "
                f"computed at a time, got {batch_size!r}, at most {max_batch_size!r}"
            )
        if device not in _NO_DEVICE:
            raise ValueError(f"device: expected none, as JAX_PLATFORMS chooses it, got {device!r}")
        opened = (
            run if isinstance(run, OpenRun) else open_run(run, step=step, batch_tokens=batch_tokens)
        )
        self._bar = ProgressBar()
        self.requester = Requester(
            opened.scorer,
            opened.tokenizer,
            max_length=opened.seq_len if max_length is None else max_length,
            add_bos_token=add_bos_token,
            say=lambda line: print(line, flush=True),
            track=self._bar.track,
        )
        self.num_requests = 0
        """Answered so far, of all kinds."""
        self.seconds = 0.0
        """That answering them took, tokenizing and compiling included."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the likeliest) of each request."""
        return self._answer(
            "loglikelihood",
            requests,
            lambda pairs: [tuple(found) for found in self.requester.loglikelihood(pairs)],
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of each request's whole text."""
        return self._answer(
            "loglikelihood_rolling",
            requests,
            lambda texts: self.requester.loglikelihood_rolling([text for (text,) in texts]),
        )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Each request's continuation."""
        return self._answer("generate_until", requests, self.requester.generate_until)

    def _answer(self, name: str, requests: list[Instance], answer: Any) -> list[Any]:
        started = time.perf_counter()
        with self._bar:
            answers = answer([request.args for request in requests])
        self.seconds += time.perf_counter() - started
        self.num_requests += len(requests)
        for request, found in zip(requests, answers, strict=True):  # for --use_cache
            self.cache_hook.add_partial(name, request.args, found)
        return answers


def register() -> None:
    """Makes `--model moda_jax` known to a harness that reads no entry points."""
    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=f"{ModaJaxLM.__module__}:ModaJaxLM")


def find_tasks(
    names: Sequence[str], *, data: str | Path, include_path: str | None = None
) -> TaskManager:
    """The harness's definitions, in which all of `names` but the paper's are.

    Raises ValueError for a task that the harness does not know, or a paper's task whose data is not
    in the folder `data`.
    """
    logging.getLogger("lm_eval.api.task").addFilter(_is_news)
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path: expected a folder, got {include_path!r}")
    check_data([name for name in names if name in METRICS], data)
    others = [name for name in names if name not in METRICS]
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not manager.task_index.keys() >= set(others):
        # Only where they are needed: the harness reads its thousands of definitions for seconds.
        manager = TaskManager(include_path=include_path)
    if unknown := [name for name in others if name not in manager.task_index]:
        raise ValueError(
            f"--tasks: expected paper, {', '.join(METRICS)}, or a task of lm-evaluation-harness or "
            f"of --include-path, got {', '.join(unknown)}"
        )
    return manager


def run_tasks(
    lm: ModaJaxLM,
    names: Sequence[str],
    manager: TaskManager,
    *,
    data: str | Path,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores by task or group, as the harness names them, with the number of `samples`.

    A tag stands for its tasks.

    Args:
      lm: answers the requests.
      names: the paper's tasks are read from the folder `data`; others are the harness's own or
        those of the folder of YAML files that `find_tasks` was given.
      manager: what `find_tasks` has found.
      limit: documents of each task, the first; None: all.

    Raises ValueError for a task whose data is not there.
    """
    local = [name for name in names if name in METRICS]
    others = [name for name in names if name not in METRICS]
    try:
        results = simple_evaluate(
            model=lm,
            tasks=[*(load_tasks(local, data) if local else ()), *others],
            task_manager=manager,
            limit=limit,
            log_samples=False,
        )
    except ConnectionError as error:
        raise ValueError(
            f"--tasks: expected tasks whose data is on this machine, since nothing is downloaded "
            f"here, got {', '.join(others)}: {error}"
        ) from error
    assert results is not None  # as in all processes but the first
    parts = results.get("group_subtasks", {})
    inner = {part for group in parts.values() for part in group}
    found = results["results"]
    shown = [name for name in (*names, *found) if name in found and name not in inner - {*names}]
    return {name: _scores(found[name], _count(results, name)) for name in dict.fromkeys(shown)}


def _count(results: Any, name: str) -> int:
    """Documents of a task, or of all tasks in a group."""
    if parts := results.get("group_subtasks", {}).get(name):
        return sum(_count(results, part) for part in parts)
    return results["n-samples"][name]["effective"]


def _scores(metrics: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Numbers by metric, of the harness's first filter where it has several.

    None stands for one that is not finite, as a perplexity where a probability is 0, or the
    standard error of one sample.
    """
    found: dict[str, Any] = {"samples": samples}
    for key, value in metrics.items():
        metric, comma, _ = key.partition(",")
        if comma and isinstance(value, int | float) and metric not in found:
            found[metric] = float(value) if math.isfinite(value) else None
    return found


def _is_news(record: logging.LogRecord) -> bool:
    """Not what the harness says of every definition with a data set of its own."""
    known = ("Custom kwargs can be passed", "is defined, but")
    return not any(text in record.getMessage() for text in known)
