"""The ten tasks of the paper's Table 4, from local files, and its numbers.

Questions, answers and scores are defined by lm-evaluation-harness (the extra `eval`); here is which
split and which score, and where the data lies. No test split comes along for some, so all but mmlu
are measured on their validation split, as OLMo's in-loop evaluation does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moda_jax.evaluate.data import FOLDERS

METRICS = {
    "piqa": "acc_norm",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "openbookqa": "acc_norm",
    "boolq": "acc",
    "sciq": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "copa": "acc",
    "mmlu": "acc",
}
"""Each task's score, in the order of Table 4; acc_norm divides by the answers' bytes."""

TABLE_4: dict[str, tuple[float, ...]] = {
    "700M OLMo2": (73.72, 58.77, 55.33, 35.60, 56.24, 89.50, 66.84, 33.44, 77.00, 24.69),
    "700M MoDA": (73.39, 59.19, 60.22, 37.20, 59.33, 89.60, 67.37, 34.78, 82.00, 25.61),
    "1.5B OLMo2": (76.55, 65.86, 63.22, 38.80, 63.61, 90.60, 72.98, 42.47, 81.00, 27.73),
    "1.5B MoDA": (76.82, 66.24, 65.59, 41.60, 67.34, 92.10, 72.81, 46.82, 85.00, 29.59),
}
"""Percent, of the tasks in the order of `METRICS`; arXiv 2603.15619, Table 4."""

_DEFINITIONS = {
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
    "boolq": "super_glue/boolq",
    "sciq": "sciq",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "copa": "super_glue/copa",
    "mmlu": "mmlu/default",
}
"""Of each task's definition: the harness takes seconds to read all that it has."""


def check_data(names: Sequence[str], folder: str | Path) -> None:
    """Raises ValueError if the data of a task is not in `folder`."""
    for name in names:
        if not Path(folder, FOLDERS[name]).is_dir():
            raise ValueError(
                f"--data: expected the folder that `make eval-data` fills, got {str(folder)!r} "
                f"without {FOLDERS[name]}"
            )


def load_tasks(names: Sequence[str], folder: str | Path) -> list[Any]:
    """The harness's tasks, and for mmlu the group of its subjects, with the data of `folder`."""
    import lm_eval
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig
    from lm_eval.tasks import TaskManager

    definitions = Path(lm_eval.__path__[0], "tasks")
    manager = TaskManager(
        include_defaults=False,
        include_path=sorted({str(definitions / _DEFINITIONS[name]) for name in names}),
    )
    members = [_with_data(name, Path(folder)) for name in names if name != "mmlu"]
    subjects = _subjects(Path(folder)) if "mmlu" in names else []
    # A group's members are the harness's definitions, with the settings that are given here.
    found = manager.load([{"group": "paper", "task": [*members, *subjects]}])["tasks"]
    if subjects:
        mmlu = Group("mmlu", aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=True)])
        for subject in subjects:
            mmlu.add(found[subject["task"]])
        found["mmlu"] = mmlu
    return [found[name] for name in names]


def _with_data(name: str, folder: Path) -> dict[str, Any]:
    def load(**_: Any) -> dict[str, Any]:
        data = _read(folder / FOLDERS[name])
        if name == "boolq":  # SuperGLUE's, which the harness knows, has the answer as a number
            data = data.add_column("label", [int(answer) for answer in data["answer"]])
        return {"validation": data}

    return {
        "task": name,
        "custom_dataset": load,
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }


def _subjects(folder: Path) -> list[dict[str, Any]]:
    """Of mmlu."""

    def with_data(place: Path) -> dict[str, Any]:
        def load(**_: Any) -> dict[str, Any]:
            return {split: _read(place / split) for split in ("test", "dev")}

        return {"task": f"mmlu_{place.name}", "custom_dataset": load}

    places = sorted(place for place in (folder / FOLDERS["mmlu"]).iterdir() if place.is_dir())
    return [with_data(place) for place in places]


def _read(folder: Path) -> Any:
    """A data set in memory: what the harness maps over one on disk it would write beside it."""
    import datasets

    return datasets.load_from_disk(str(folder), keep_in_memory=True)
