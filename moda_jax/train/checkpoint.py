"""Checkpoints of a run: state, data iterators and config, saved together and restored exactly."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from moda_jax.config import Config, from_json, to_json
from moda_jax.config.files import flatten
from moda_jax.train.imported import NotImportable, is_imported, read_imported
from moda_jax.train.manifest import find_damage, write_manifest
from moda_jax.train.processes import gather_json, on_main
from moda_jax.train.train_step import TrainState

_METRIC = "validation_loss"
METRICS_ITEM = "metrics"
"""The part of a checkpoint, and its file, in which orbax keeps the validation loss."""


class Restored(NamedTuple):
    """What a checkpoint holds."""

    state: TrainState
    data: list[Any]
    """States of the data iterators of all processes that the run had."""
    config: dict[str, Any]
    """The config with which the checkpoint was written, as nested dicts."""
    is_validated: bool
    """Whether a validation loss was saved with it."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep_last` and the best by validation loss.

    Only the owner of the run's folder makes one: what looks half-written is tidied up, and damaged
    checkpoints are moved aside. Saving is asynchronous: `save` copies the state from the devices
    and returns, writing goes on in the background. A checkpoint gets its name when it is complete,
    its manifest included, so one whose writing was killed is never seen.
    """

    def __init__(self, directory: Path, *, keep_last: int) -> None:
        """Raises ValueError if there are checkpoints and all of them are damaged."""
        self._directory = directory.absolute()
        self.damaged: list[str] = on_main(lambda: _set_damaged_aside(self._directory))
        """A line about each checkpoint that was moved aside, newest first."""
        newest = checkpoint_managers.LatestN(keep_last)
        best = checkpoint_managers.BestN(
            get_metric_fn=_validation_loss,
            reverse=True,  # orbax keeps the end of the sorted list: the smallest loss
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._saving: int | None = None
        self._write_more: Callable[[Path], None] | None = None
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=_validation_loss,
                best_mode="min",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
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

        Raises:
            OSError: this or the one before could not be written; kept ones are untouched.
        """
        # Plain arrays in nested dicts: what is on disk does not depend on flax's classes.
        items = {
            "params": ocp.args.StandardSave(nnx.as_pure(state.params)),
            "optimizer": ocp.args.StandardSave(nnx.as_pure((state.step, state.optimizer))),
            "run": ocp.args.JsonSave({"config": to_json(config), "data": gather_json(data)}),
        }
        loss = math.inf if validation_loss is None else validation_loss
        self._save(step, items, loss)

    def save_imported(
        self, run: Mapping[str, Any], write_parameters: Callable[[Path], None]
    ) -> None:
        """Writes checkpoint 0 of parameters that were trained elsewhere, and waits for it.

        Args:
            run: "config" and "data" as `save` has them; of the data only a tokenizer's fingerprint.
            write_parameters: called with the checkpoint's folder before it gets its name.

        Raises NotImportable from `write_parameters`, and OSError if it could not be written,
        whatever the reason is.
        """
        self._write_more = write_parameters
        self._save(0, {"run": ocp.args.JsonSave(run)}, math.inf)
        self.wait()
        self._write_more = None

    def _save(self, step: int, items: Mapping[str, Any], loss: float) -> None:
        with self._named_errors():
            self._manager.wait_until_finished()  # its error would be this step's
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items), metrics={_METRIC: loss})

    @property
    def is_imported(self) -> bool:
        """Whether the newest checkpoint is an imported one: parameters, and nothing to go on."""
        step = self.latest_step
        return step is not None and is_imported(self._directory / str(step))

    def restore_imported(self, target: nnx.State, config: Config, tokenizer: str) -> nnx.State:
        """The parameters of the imported checkpoint, placed as `target` says.

        Raises:
            ValueError: it is another model than that of `config`, or was trained with another
                tokenizer than that of the fingerprint `tokenizer`.
        """
        assert self.latest_step is not None
        run = self._read_run(self.latest_step)
        _check_model(run["config"]["model"], config, self._directory)
        if (trained_with := run["data"][0]["identity"]["tokenizer"]) != tokenizer:
            raise ValueError(
                f"{self._directory}: expected the tokenizer that was imported with the model "
                f"(fingerprint {trained_with}), got another one ({tokenizer})"
            )
        return read_imported(self._directory / str(self.latest_step), target)

    def _read_run(self, step: int) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run

    def restore(self, abstract_state: TrainState, config: Config) -> Restored | None:
        """The newest checkpoint, placed as `abstract_state` says; None if there is none.

        Raises:
            ValueError: it holds another model or optimizer than `config` has.
        """
        step = self.latest_step
        if step is None:
            return None
        run = self._read_run(step)
        _check_model(run["config"]["model"], config, self._directory)
        _check_optimizer(run["config"], config, self._directory)
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
        return Restored(state, run["data"], run["config"], is_validated)

    def wait(self) -> None:
        """Waits for the writing to end; raises OSError if something went wrong in it."""
        with self._named_errors():
            self._manager.wait_until_finished()

    def forget_missing(self) -> list[int]:
        """Waits, and returns the steps of kept checkpoints that somebody else removed."""
        self.wait()
        kept = self._manager.all_steps()
        missing = [step for step in kept if not (self._directory / str(step)).is_dir()]
        if missing:
            self._manager.reload()
        return missing

    def close(self) -> None:
        """Waits and gives up the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_manifest(self) -> None:
        """Called by the main process, in the background, when all files of a save are complete.

        orbax then gives the folder its name, and only then deletes older checkpoints.
        """
        assert self._saving is not None
        (unnamed,) = self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        if self._write_more is not None:
            self._write_more(unnamed)
        write_manifest(unnamed, self._saving)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turns whatever a write fails with into one line that names the checkpoint."""
        try:
            yield
        except NotImportable:
            raise
        except Exception as error:
            # orbax has struck off what it would have deleted after this save, and did not delete.
            self._manager.reload()
            latest = self.latest_step
            kept = "there is no other" if latest is None else f"the newest is of step {latest}"
            # tensorstore appends the places in its source.
            reason = " ".join(str(error).split(" [source")[0].split()) or type(error).__name__
            raise OSError(
                f"{self._directory}: the checkpoint of step {self._saving} could not be written, "
                f"{kept}: {reason}"
            ) from error


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in `directory`, damaged or not, newest first."""
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted((int(n) for n in names if n.isdecimal() and str(int(n)) == n), reverse=True)


def saved_loss(folder: Path) -> float:
    """Validation loss of the undamaged checkpoint in `folder`; inf if it was not validated."""
    return _validation_loss(json.loads((folder / METRICS_ITEM / METRICS_ITEM).read_bytes()))


def _set_damaged_aside(directory: Path) -> list[str]:
    """Renames damaged checkpoints, so that a run neither reads them nor stumbles on them.

    The newest one that is left is checked whole; of older ones, which only count by their
    validation loss until somebody loads them, that loss and the sizes of all files.

    Returns a line about each one, newest first. Raises ValueError if no other is left.
    """
    if not directory.is_dir():
        return []
    damage: dict[int, str] = {}
    found_good = False
    for step in checkpoint_steps(directory):
        items = (METRICS_ITEM,) if found_good else None
        if problem := find_damage(directory / str(step), step, items):
            damage[step] = problem
        else:
            found_good = True
    if damage and not found_good:
        raise ValueError(
            f"{directory}: expected a checkpoint that is whole, got "
            f"{'; '.join(f'{step}: {problem}' for step, problem in damage.items())}; repair one, "
            f"or move them away to start anew"
        )
    return [_set_aside(directory, step, problem) for step, problem in damage.items()]


def _set_aside(directory: Path, step: int, problem: str) -> str:
    aside = directory / f"{step}.damaged"
    number = 1
    while aside.exists():
        number += 1
        aside = directory / f"{step}.damaged-{number}"
    os.rename(directory / str(step), aside)
    return f"checkpoint {step} is damaged: {problem}; it is not used, and kept as {aside}"


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
    there = flatten(to_json(from_json(saved)))
    here = flatten(to_json(config.model))
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


def _check_optimizer(saved: Mapping[str, Any], config: Config, directory: Path) -> None:
    """Raises ValueError if `saved` is another optimizer than config.optimizer.

    Their states are other trees: neither has the other's moments.
    """
    there = saved.get("optimizer", {}).get("name", "adamw")  # the only one of older checkpoints
    if there != config.optimizer.name:
        raise ValueError(
            f"{directory}: expected optimizer.name {there!r}, with which the checkpoint was "
            f"trained, got {config.optimizer.name!r}; choose another --name or --output-dir, or "
            f"remove the directory"
        )
