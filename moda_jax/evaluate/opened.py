"""A run, opened for evaluation."""

from pathlib import Path
from typing import Literal, NamedTuple

from moda_jax.data.tokenizer import Tokenizer
from moda_jax.evaluate.scoring import BATCH_TOKENS, Scorer, data_mesh
from moda_jax.train.run_folder import read_run_config
from moda_jax.train.trained import load_trained

Step = int | Literal["newest", "best"]


class OpenRun(NamedTuple):
    """What an evaluation needs of a run."""

    scorer: Scorer
    tokenizer: Tokenizer
    step: int
    """Of the checkpoint."""
    seq_len: int
    """Tokens of a sequence in training."""


def open_run(
    run: str | Path, *, step: Step = "newest", batch_tokens: int = BATCH_TOKENS
) -> OpenRun:
    """The model of the run in folder `run`, whole on each of all devices.

    Raises ValueError as `load_trained` does.
    """
    mesh = data_mesh()
    trained = load_trained(run, step=step, mesh=mesh)
    scorer = Scorer(trained.model, mesh=mesh, batch_tokens=batch_tokens)
    return OpenRun(scorer, trained.tokenizer, trained.step, read_run_config(Path(run)).data.seq_len)
