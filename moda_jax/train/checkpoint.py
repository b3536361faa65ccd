"""Checkpoints of a run: state, data iterators and config, saved together and restored exactly."""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from moda_jax.config import Config, ExecutionConfig, MeshConfig, from_json, to_json
from moda_jax.data.tokenizer import Tokenizer, load_tokenizer
from moda_jax.model.transformer import Transformer
from moda_jax.ops.sharding import make_mesh, state_shardings
from moda_jax.train.train_step import TrainState

_METRIC = "validation_loss"


class Restored(NamedTuple):
    """What a checkpoint holds."""

    state: TrainState
    data: Any
    """State of this process's data iterator."""
    config: dict[str, Any]
    """The config with which the checkpoint was written, as nested dicts."""
    is_validated: bool
    """Whether a validation loss was saved with it."""


class TrainedModel(NamedTuple):
    """What `load_trained` finds."""

    model: Transformer
    tokenizer: Tokenizer
    step: int
    """Optimizer steps done."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep_last` and the best by validation loss.

    Saving is asynchronous: `save` copies the state from the devices and returns, writing goes on in
    the background. A checkpoint gets its name when it is complete, so one whose writing was killed
    is never seen.
    """

    def __init__(self, directory: Path, *, keep_last: int) -> None:
        newest = checkpoint_managers.LatestN(keep_last)
        best = checkpoint_managers.BestN(
            get_metric_fn=_validation_loss,
            reverse=True,  # orbax keeps the end of the sorted list: the smallest loss
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=_validation_loss,
                best_mode="min",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all kept checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def best_loss(self) -> float:
        """Lowest validation loss among the kept checkpoints; inf if none was validated."""
        step = self._manager.best_step()
        return math.inf if step is None else _loss_of(self._manager, step)

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        data: Any,
        config: Config,
        validation_loss: float | None,
    ) -> None:
        """Starts writing checkpoint `step`; waits only for one that is still being written.

        Args:
            step: optimizer steps done.
            state: may be donated as soon as this returns.
            data: this process's JSON-serialisable iterator state.
            config: kept beside the state, to recognise another model.
            validation_loss: of exactly this state, None if it was not validated.
        """
        # Plain arrays in nested dicts: what is on disk does not depend on flax's classes.
        items = {
            "params": ocp.args.StandardSave(nnx.as_pure(state.params)),
            "optimizer": ocp.args.StandardSave(nnx.as_pure((state.step, state.optimizer))),
            "run": ocp.args.JsonSave({"config": to_json(config), "data": _gather_json(data)}),
        }
        loss = math.inf if validation_loss is None else validation_loss
        self._manager.save(step, args=ocp.args.Composite(**items), metrics={_METRIC: loss})

    def restore(self, abstract_state: TrainState, config: Config) -> Restored | None:
        """The newest checkpoint, placed as `abstract_state` says; None if there is none.

        Raises:
            ValueError: it holds another model than `config`, or comes from another number of
                processes.
        """
        step = self.latest_step
        if step is None:
            return None
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        _check_model(run["config"]["model"], config, self._directory)
        if len(run["data"]) != jax.process_count():
            raise ValueError(
                f"{self._directory}: expected {len(run['data'])} processes, as the run had when "
                f"it was saved, got {jax.process_count()}; the data could not go on exactly"
            )
        items = {
            "params": ocp.args.StandardRestore(nnx.as_pure(abstract_state.params)),
            "optimizer": ocp.args.StandardRestore(
                nnx.as_pure((abstract_state.step, abstract_state.optimizer))
            ),
        }
        saved = self._manager.restore(step, args=ocp.args.Composite(**items))
        leaves = jax.tree.leaves((saved.optimizer[0], saved.params, saved.optimizer[1]))
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        is_validated = math.isfinite(_loss_of(self._manager, step))
        return Restored(state, run["data"][jax.process_index()], run["config"], is_validated)

    def wait(self) -> None:
        """Waits for the writing to end; raises what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and gives up the background threads."""
        self.wait()
        self._manager.close()


def load_trained(
    directory: str | Path, *, step: int | Literal["newest", "best"] = "newest",
    mesh: Mesh | None = None,
) -> TrainedModel:  # fmt: skip
    """The model and tokenizer of a run, to generate or to go on with; the run may be in progress.

    Args:
      directory: the run's folder, for instance runs/tiny.
      step: of the checkpoint; "best" has the lowest validation loss.
      mesh: places the parameters by their logical axes; None: on one device.

    Raises:
      ValueError: no run's folder, no such checkpoint, or its tokenizer.json is gone.
    """
    folder = Path(directory).absolute() / "checkpoints"
    if not folder.is_dir():
        raise ValueError(
            f"directory: expected a run's folder with checkpoints/ in it, got {str(directory)!r}"
        )
    # It must not tidy up what a running training is writing. (`read_only` would do no more than
    # `create` does for a manager that never saves, and warns of itself.)
    options = ocp.CheckpointManagerOptions(create=False, best_fn=_validation_loss, best_mode="min")
    with contextlib.closing(ocp.CheckpointManager(folder, options=options)) as manager:
        step = _find_step(manager, step)
        run = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        config = from_json(run["config"]["model"])
        execution = ExecutionConfig(**run["config"]["execution"])
        data = run["config"]["data"]
        tokenizer = load_tokenizer(data["tokenizer"], data.get("eos_token"))
        graph, shapes = nnx.split(
            nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), execution=execution))
        )
        shardings = state_shardings(shapes, make_mesh(MeshConfig()) if mesh is None else mesh)
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes, jax.tree.broadcast(shardings, shapes),
        )  # fmt: skip
        restore = ocp.args.StandardRestore(nnx.as_pure(target))
        saved = manager.restore(step, args=ocp.args.Composite(params=restore)).params
    params = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(saved))
    return TrainedModel(nnx.merge(graph, params), tokenizer, step)


def _find_step(manager: ocp.CheckpointManager, step: int | str) -> int:
    steps = sorted(manager.all_steps())
    validated = [n for n in steps if math.isfinite(_loss_of(manager, n))]
    found = {
        "newest": max(steps, default=None),
        "best": min(validated, key=lambda n: _loss_of(manager, n), default=None),
    } | {n: n for n in steps}
    if (chosen := found.get(step)) is None:
        raise ValueError(f'step: expected "newest", "best" or one of {steps}, got {step!r}')
    return chosen


def _loss_of(manager: ocp.CheckpointManager, step: int) -> float:
    """Validation loss of a checkpoint; inf if it was not validated."""
    metrics = manager.metrics(step)
    return _validation_loss(metrics) if metrics else math.inf


def _validation_loss(metrics: Mapping[str, float]) -> float:
    loss = float(metrics[_METRIC])
    return loss if math.isfinite(loss) else math.inf  # NaN has no rank


def _check_model(saved: Mapping[str, Any], config: Config, directory: Path) -> None:
    """Raises ValueError, naming the fields, if `saved` is another model than config.model.

    How a model is computed is no part of it: a run may go on with another `execution`.
    """
    there = _flatten(to_json(from_json(saved)))
    here = _flatten(to_json(config.model))
    differing = [
        f"model.{name} {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted(there | here)
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise ValueError(
            f"{directory}: checkpoint of another model ({'; '.join(differing)}); choose another "
            f"--name or --output-dir, or remove the directory"
        )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def _gather_json(local: Any) -> list[Any]:
    """`local` of every process, in the order of the processes."""
    if jax.process_count() == 1:
        return [local]
    text = np.frombuffer(json.dumps(local).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
