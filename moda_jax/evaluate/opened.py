"""A run, opened for evaluation."""

from pathlib import Path
from typing import NamedTuple

from moda_jax.data.tokenizer import Tokenizer
from moda_jax.evaluate import BATCH_TOKENS
from moda_jax.evaluate.scoring import Scorer, data_mesh
from moda_jax.train.trained import load_named, read_run


class OpenRun(NamedTuple):
    """What an evaluation needs of a run."""

    scorer: Scorer
    tokenizer: Tokenizer
    step: int
    """Of the checkpoint."""
    seq_len: int
    """Tokens of a sequence in training."""


def open_run(run: str, *, step: int | str = "newest", batch_tokens: int = BATCH_TOKENS) -> OpenRun:
    """The model of the run in folder `run`, whole on each of all devices.

    Warnings and errors are `load_named`'s.
    """
    mesh = data_mesh()
    trained = load_named(run, str(step), mesh)
    scorer = Scorer(trained.model, mesh=mesh, batch_tokens=batch_tokens)
    # The folder's config is that of a run which goes on, perhaps with longer sequences.
    saved = read_run(Path(run).absolute() / "checkpoints" / str(trained.step))
    return OpenRun(scorer, trained.tokenizer, trained.step, saved["config"]["data"]["seq_len"])
