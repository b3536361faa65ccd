"""`load_trained`: the model and tokenizer that a run left, or is still writing."""

import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from moda_jax.config import ExecutionConfig, MeshConfig, ModelConfig, dataclass_from_json, from_json
from moda_jax.data.tokenizer import Tokenizer
from moda_jax.model.transformer import Transformer
from moda_jax.ops.sharding import make_mesh, state_shardings
from moda_jax.options import naming
from moda_jax.terminal import escape_controls
from moda_jax.train.checkpoint import METRICS_ITEM, checkpoint_steps, saved_loss
from moda_jax.train.imported import is_imported, read_imported
from moda_jax.train.manifest import find_damage
from moda_jax.train.run_folder import load_folder_tokenizer

READ_ITEMS = (METRICS_ITEM, "params", "run")
"""The parts of a checkpoint that a model is made of. The optimizer's state, two thirds of it, is
neither read nor checked."""


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint that would have been loaded is damaged; an older one is loaded instead."""


class TrainedModel(NamedTuple):
    """What `load_trained` finds."""

    model: Transformer
    tokenizer: Tokenizer
    step: int
    """Optimizer steps done."""


def load_trained(
    directory: str | Path, *, step: int | Literal["newest", "best"] = "newest",
    mesh: Mesh | None = None,
) -> TrainedModel:  # fmt: skip
    """The model and tokenizer of a run, to generate or to go on with; the run may be in progress.

    Everything comes from the folder, wherever it was moved. A damaged checkpoint is passed over
    with a `DamagedCheckpointWarning` that says what is wrong.

    Args:
      directory: the run's folder, for instance runs/tiny.
      step: of the checkpoint; "best" has the lowest validation loss.
      mesh: places the parameters by their logical axes; None: on one device.

    Raises:
      ValueError: no run's folder, no such checkpoint, one that was asked for by its number is
        damaged or all are, or the tokenizer is gone or another than the model was trained with.
    """
    folder = Path(directory).absolute() / "checkpoints"
    if not folder.is_dir():
        raise ValueError(
            f"directory: expected a run's folder with checkpoints/ in it, got {str(directory)!r}"
        )
    while True:
        steps = checkpoint_steps(folder)
        try:
            return _load(folder, find_step(folder, step), mesh)
        except (OSError, ValueError):
            # A training that goes on removes its older checkpoints, perhaps while they are read.
            if set(steps) <= set(checkpoint_steps(folder)):
                raise


def _load(folder: Path, step: int, mesh: Mesh | None) -> TrainedModel:
    run = read_run(folder / str(step))
    config = from_json(run["config"]["model"])
    execution = dataclass_from_json(run["config"]["execution"], ExecutionConfig, "execution.")
    tokenizer = load_folder_tokenizer(
        folder.parent, run["config"]["data"], expected=saved_tokenizer(run)
    )
    model = _restore_model(folder / str(step), config, execution, mesh)
    return TrainedModel(model, tokenizer, step)


def load_named(directory: str, step: str, mesh: Mesh | None = None) -> TrainedModel:
    """`load_trained` for a command line: its warnings are lines on stderr.

    Raises ValueError, also for a step that is neither "newest" nor "best" nor a number; it names
    RUN and --step.
    """
    known: dict[str, Literal["newest", "best"]] = {"newest": "newest", "best": "best"}
    if step not in known and not step.isdecimal():
        raise ValueError(f"--step: expected newest, best or a step's number, got {step!r}")
    chosen = known[step] if step in known else int(step)
    names = naming({"step": "--step", "directory": "RUN"})
    with names, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DamagedCheckpointWarning)
        trained = load_trained(directory, step=chosen, mesh=mesh)
    for warning in caught:
        if issubclass(warning.category, DamagedCheckpointWarning):
            print(f"warning: {escape_controls(str(warning.message))}", file=sys.stderr)
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return trained


def _restore_model(
    folder: Path, config: ModelConfig, execution: ExecutionConfig, mesh: Mesh | None
) -> Transformer:
    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), execution=execution))
    )
    shardings = state_shardings(shapes, make_mesh(MeshConfig()) if mesh is None else mesh)
    target = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes, jax.tree.broadcast(shardings, shapes),
    )  # fmt: skip
    return nnx.merge(graph, read_params(folder, target))


def read_run(folder: Path) -> dict[str, Any]:
    """The config and the data's states, as JSON, of the checkpoint in `folder`."""
    return _restore(folder, run=ocp.args.JsonRestore()).run


def saved_tokenizer(run: Mapping[str, Any]) -> str | None:
    """Fingerprint of the tokenizer with which the checkpoint of `read_run` was trained."""
    return run["data"][0]["identity"].get("tokenizer")


def read_params(folder: Path, target: nnx.State) -> nnx.State:
    """Only the parameters of the checkpoint in `folder`, placed as `target` says.

    Args:
        folder: of the checkpoint, checkpoints/STEP.
        target: jax.ShapeDtypeStruct of each parameter, with its sharding.
    """
    if is_imported(folder):
        return read_imported(folder, target)
    saved = _restore(folder, params=ocp.args.StandardRestore(nnx.as_pure(target))).params
    return jax.tree.unflatten(jax.tree.structure(target), jax.tree.leaves(saved))


def _restore(folder: Path, **items: Any) -> Any:
    """Items of one checkpoint. Nothing is tidied up: a training may be writing next to it."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder, args=ocp.args.Composite(**items))


def find_step(folder: Path, step: int | str) -> int:
    """The chosen checkpoint; whole, after warnings about better ones that are not."""
    steps = checkpoint_steps(folder)
    # A damaged one might have been the best: it is looked at first, so that it is named.
    losses = {
        n: -math.inf
        if find_damage(folder / str(n), n, (METRICS_ITEM,))
        else saved_loss(folder / str(n))
        for n in steps
    }
    candidates = {
        "newest": steps,
        "best": sorted((n for n in steps if losses[n] < math.inf), key=lambda n: losses[n]),
    } | {n: [n] for n in steps}
    if not candidates.get(step):
        raise ValueError(f'step: expected "newest", "best" or one of {steps[::-1]}, got {step!r}')
    damage = []
    for candidate in candidates[step]:
        problem = find_damage(folder / str(candidate), candidate, READ_ITEMS)
        if problem is None:
            break
        damage.append(f"checkpoint {candidate} is damaged: {problem}")
    else:
        raise ValueError(f"{folder}: expected a checkpoint that is whole, got {'; '.join(damage)}")
    for line in damage:
        warnings.warn(
            f"{folder}: {line}; checkpoint {candidate} is loaded instead",
            DamagedCheckpointWarning,
            stacklevel=3,
        )
    return candidate
