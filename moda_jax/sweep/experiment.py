"""What a sweep runs: an `Experiment`, its runs, and their division into shares."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moda_jax.config import Config
from moda_jax.model.flops import count_flops
from moda_jax.python_file import run_python_file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_EXPECTED_NAME = "letters, digits and . _ + - only, as it names files"


class Run(NamedTuple):
    """One training run of an experiment."""

    label: str
    """Of its config."""
    seed: int
    config: Config
    """With the run's seed, name and output folder."""

    @property
    def name(self) -> str:
        """Of its folder and of its result."""
        return f"{self.label}_seed{self.seed}"

    @property
    def tokens(self) -> int:
        """Tokens that it trains on, padding included."""
        return self.config.steps * self.config.batch_size * self.config.data.seq_len

    @property
    def flops(self) -> float:
        """Model FLOPs of its training steps (`moda_jax.model.flops`)."""
        config = self.config
        return self.tokens * count_flops(config.model, config.data.seq_len).train_per_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Configs that are compared, each trained with every one of its seeds.

    A Python file that defines `experiment`, one of these, is what `moda-jax sweep FILE` runs.

    Raises ValueError, naming the field, for labels that are no file names or that `configs` lacks,
    and for a config without seeds.
    """

    name: str
    """Runs go to <output folder>/<name>, results to results/<name> beside the experiment's file."""
    title: str
    """Heads the table."""
    configs: Mapping[str, Config]
    """By label. Name, seed and output folder of a config do not count."""
    seeds: tuple[int, ...] | Mapping[str, tuple[int, ...]] = (0,)
    """Of every config, or by label. A seed fixes the initial weights and the order of the data."""
    baseline: str | Mapping[str, str | tuple[str, ...]] | None = None
    """The label with which all others are compared; or, by label, the one or several with which it
    is; None: nothing is compared."""
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The paper's validation loss by label, where it has one."""
    speed: Callable[[Config], float] | None = None
    """Expected tokens per second of a config, for what the runs will cost."""

    def __post_init__(self) -> None:
        self._require("name", bool(_NAME.fullmatch(self.name)), _EXPECTED_NAME, self.name)
        self._require("configs", bool(self.configs), "at least one config", self.configs)
        for label, config in self.configs.items():
            self._require("configs", bool(_NAME.fullmatch(label)), _EXPECTED_NAME, label)
            self._require("configs", isinstance(config, Config), "values of type Config", config)
        for field in ("seeds", "baseline", "paper"):
            value = getattr(self, field)
            for label in value if isinstance(value, Mapping) else ():
                self._require_label(field, label)
        for label in self.configs:
            for baseline in self.baselines_of(label):
                self._require_label("baseline", baseline)
            seeds = self.seeds_of(label)
            ok = bool(seeds) and len(set(seeds)) == len(seeds)
            self._require("seeds", ok, f"different seeds, at least one, for {label!r}", seeds)

    def _require(self, field: str, ok: bool, expected: str, value: object) -> None:
        if not ok:
            raise ValueError(f"Experiment.{field}: expected {expected}, got {value!r}")

    def _require_label(self, field: str, label: str) -> None:
        expected = f"labels among {', '.join(self.configs)}"
        self._require(field, label in self.configs, expected, label)

    def seeds_of(self, label: str) -> tuple[int, ...]:
        """The seeds with which the config of that label is trained."""
        return self.seeds.get(label, ()) if isinstance(self.seeds, Mapping) else self.seeds

    def baselines_of(self, label: str) -> tuple[str, ...]:
        """The labels with which `label` is compared."""
        if isinstance(self.baseline, Mapping):
            baselines = self.baseline.get(label, ())
            return (baselines,) if isinstance(baselines, str) else baselines
        return () if self.baseline is None or self.baseline == label else (self.baseline,)

    def runs(self, output_dir: str) -> list[Run]:
        """All runs: every config's first seed, then every second one, and so on.

        So a sweep that ends early has compared all configs at some seeds, not some configs at all.
        """
        most = max(len(self.seeds_of(label)) for label in self.configs)
        return [
            self._run(label, self.seeds_of(label)[number], output_dir)
            for number in range(most)
            for label in self.configs
            if number < len(self.seeds_of(label))
        ]

    def _run(self, label: str, seed: int, output_dir: str) -> Run:
        run = Run(label, seed, self.configs[label])
        folder = str(Path(output_dir) / self.name)
        config = dataclasses.replace(run.config, name=run.name, seed=seed, output_dir=folder)
        return run._replace(config=config)


def share_of(runs: Sequence[Run], number: int, count: int) -> list[Run]:
    """Share `number` (1 … count) of `runs`, in their order: shares are disjoint and about equal.

    The costliest run that is left, by its FLOPs, goes to the share with the least so far. Which
    runs are in a share depends on the list alone, so the shares need not know of each other.

    Raises ValueError for a share that is none.
    """
    if not 1 <= number <= count:
        raise ValueError(f"--share: expected K/N with 1 <= K <= N, got {number}/{count}")
    costs = [0.0] * count
    chosen = []
    for index in sorted(range(len(runs)), key=lambda index: -runs[index].flops):
        cheapest = min(range(count), key=lambda share: costs[share])
        costs[cheapest] += runs[index].flops
        if cheapest == number - 1:
            chosen.append(index)
    return [runs[index] for index in sorted(chosen)]


def load_experiment(path: Path) -> Experiment:
    """The `experiment` of the local Python file `path`, which is run.

    Raises ValueError, naming the file, if it is missing, fails, or defines no such Experiment.
    """
    if not path.is_file():
        raise ValueError(f"experiment file: expected a Python file, got {str(path)!r} (not found)")
    experiment = run_python_file(path, "experiment file").get("experiment")
    if not isinstance(experiment, Experiment):
        raise ValueError(
            f"experiment file {str(path)!r}: expected it to define `experiment`, a "
            f"moda_jax.sweep.Experiment, got {type(experiment).__name__}"
        )
    return experiment
