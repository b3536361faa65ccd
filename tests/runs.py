"""Small whole runs for tests: a corpus, a config, and what they leave behind."""

import dataclasses
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from moda_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, ResidualConfig
from moda_jax.model.transformer import Transformer
from moda_jax.ops.sharding import make_mesh
from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.metrics import METRICS_FILE, read_metrics
from moda_jax.train.train_step import TrainState, make_train_functions
from tests.models import FLOAT32

STEPS = 6


@pytest.fixture(scope="module", name="corpus")
def corpus_fixture(tmp_path_factory):
    """A folder of a few texts of very different lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(24):
        words = rng.choice(["one", "two", "three", "four"], size=int(rng.integers(1, 120)))
        (folder / f"{i}.txt").write_text(f"{i} " + " ".join(words))
    return folder


def make_config(corpus: Path, folder: Path) -> Config:
    return Config(
        name="run",
        model=ModelConfig(
            vocab_size=264,
            num_layers=3,
            embed_dim=16,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            mlp_dim=24,
        ),
        execution=FLOAT32,
        data=DataConfig(source=str(corpus), seq_len=24, validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        output_dir=str(folder / "runs"),
        steps=STEPS,
        batch_size=8,
        log_every=1,
        eval_every=4,
        eval_batches=2,
        checkpoint_every=4,
        sample_tokens=3,
    )


@pytest.fixture(name="config")
def config_fixture(corpus, tmp_path):
    return make_config(corpus, tmp_path)


def make_small(config: Config) -> Config:
    """The quickest run that has every part but a sample."""
    model = dataclasses.replace(config.model, num_layers=1, depth=ResidualConfig())
    return dataclasses.replace(config, model=model, sample_tokens=0, eval_batches=1)


class History:
    """Every step's loss and gradient norm; sends a signal when step `stop_at` is reported."""

    def __init__(self, *, stop_at: int | None = None, number: int = signal.SIGTERM) -> None:
        self.steps: dict[int, tuple[float, float]] = {}
        self._stop_at, self._number = stop_at, number

    def __call__(self, step, metrics):
        self.steps[step] = (metrics["loss"], metrics["grad_norm"])
        if step == self._stop_at:
            signal.raise_signal(self._number)


def save_run(folder: Path, model: Transformer, losses: dict[int, float]) -> Path:
    """A run's folder with `model` in checkpoints of these validation losses by step; no training.

    Of its bytes tokenizer; the checkpoints of later steps have larger weights.
    """
    config = Config(name=folder.name, model=model.config, execution=FLOAT32)
    data = {"identity": {"tokenizer": "bytes"}, "grain": {"position": 7}}
    params = nnx.state(model)
    with Checkpoints(folder / "checkpoints", keep_last=len(losses)) as checkpoints:
        for factor, (step, loss) in enumerate(losses.items(), start=1):
            scaled = jax.tree.map(lambda leaf, factor=factor: leaf * factor, params)
            state = TrainState(np.int32(step), scaled, {})
            state = jax.tree.map(jax.numpy.asarray, state)
            checkpoints.save(step, state, data=data, config=config, validation_loss=loss)
    return folder


def final_state(config):
    abstract = make_train_functions(config, make_mesh(config.mesh)).abstract_state
    checkpoints = Checkpoints(Path(config.output_dir, config.name, "checkpoints"), keep_last=2)
    restored = checkpoints.restore(abstract, config)
    checkpoints.close()
    return restored.state, restored.data


def metrics_of(config, name):
    records = read_metrics(Path(config.output_dir, config.name, METRICS_FILE))
    return {record["step"]: record[name] for record in records if name in record}


def renamed(config, name):
    return dataclasses.replace(config, name=name)
