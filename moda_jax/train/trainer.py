"""The training run: `train(config)` from the first screen to the last plot."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moda_jax.config import Config, to_json
from moda_jax.data.loader import Data, load_data
from moda_jax.depth import make_mechanism
from moda_jax.model.execution import describe_execution
from moda_jax.model.generation import generate
from moda_jax.ops.sharding import batch_sharding, make_mesh
from moda_jax.train.changes import describe_changes
from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.console import RunConsole
from moda_jax.train.metrics import FINAL, METRICS_FILE, MetricsWriter, read_metrics
from moda_jax.train.owner import FolderOwner
from moda_jax.train.processes import StopSignals, initialize_processes
from moda_jax.train.report import plot_attention_mass, plot_loss
from moda_jax.train.run_folder import is_written, write_run_folder
from moda_jax.train.throughput import Throughput
from moda_jax.train.train_step import make_train_functions

_FINAL_VALIDATION_FACTOR = 4
_SAMPLE_TEMPERATURE = 0.8
OnStep = Callable[[int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run left behind."""

    directory: Path
    """Holds checkpoints/, metrics.jsonl, tensorboard/, config.json, corpus.json, the tokenizer's
    file if it has one and, once the run is finished, sample.txt, loss.png and, where attention
    reads depth slots, attention_mass.png."""
    step: int
    """Optimizer steps done."""
    finished: bool
    """False: stopped by SIGTERM before `config.steps`; the same call goes on."""
    validation_loss: float | None
    """Nats per token of the last validation over more batches; None unless finished."""
    sample: str | None
    """Generated text, its prompt included; None unless finished and asked for."""

    @property
    def validation_perplexity(self) -> float | None:
        return None if self.validation_loss is None else _perplexity(self.validation_loss)


def train(config: Config, *, on_step: OnStep | None = None) -> TrainResult:
    """Trains up to step `config.steps`, going on from the newest checkpoint if there is one.

    A run that is stopped and started again takes the same batches and reaches bitwise the same
    parameters as one that was not. With a larger `config.steps` than before it goes on under the
    new, longer learning-rate curve. SIGTERM ends the run after the current step with a
    checkpoint; so does the first Ctrl-C, and a second one ends the process at once.

    Args:
        config: the run.
        on_step: called with every step's number and metrics, one step late.

    Raises:
        ValueError: mesh, data or checkpoint do not fit the config; another run writes to the
            folder, or the folder was lost; no checkpoint is whole; or a loss or gradient is not
            finite (the newest checkpoint is from before).
        OSError: a checkpoint could not be written.
        KeyboardInterrupt: after Ctrl-C, when the checkpoint is complete.
    """
    initialize_processes()
    mesh = make_mesh(config.mesh)
    data = load_data(
        config.data,
        batch_size=config.batch_size,
        vocab_size=config.model.vocab_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with jax.set_mesh(mesh), contextlib.closing(data.train), contextlib.ExitStack() as cleanup:
        return _Run(config, mesh, data, on_step, cleanup).run()


class _Run:
    """A run in progress: the state and everything that looks at it."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        data: Data,
        on_step: OnStep | None,
        cleanup: contextlib.ExitStack,
    ) -> None:
        self.config, self.data, self.on_step = config, data, on_step
        self.rows = batch_sharding(mesh)
        self.directory = Path(config.output_dir) / config.name
        self.is_main = jax.process_index() == 0
        self.functions = make_train_functions(config, mesh)
        execution = describe_execution(config, self.functions.execution)
        self.mechanism = make_mechanism(config.model)
        self.console = RunConsole(steps=config.steps, quiet=not self.is_main)
        _make_folder(self.directory)
        self.owner = cleanup.enter_context(FolderOwner(self.directory))
        checkpoints = self.directory / "checkpoints"
        self.checkpoints = cleanup.enter_context(
            Checkpoints(checkpoints, keep_last=config.keep_last)
        )
        self.owner.watch(checkpoints)
        for line in (self.owner.taken_from, *self.checkpoints.damaged):
            if line is not None:
                self.console.print(line)
        self.changes: list[str] = []
        self._restore_or_init()
        self.best_loss = self.checkpoints.best_loss()
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.throughput = Throughput(
            config.model,
            compute_dtype=self.functions.execution.execution.compute_dtype,
            seq_len=config.data.seq_len,
            devices=list(mesh.devices.flat),
        )
        self.writer = self._open_writer(cleanup)
        self.console.show_start(
            config,
            mesh,
            data_size=data.describe(),
            execution=execution,
            directory=self.directory,
            restored_step=self.step,
        )
        for line in self.changes:
            self.console.print(line)

    def _restore_or_init(self) -> None:
        restored = self.checkpoints.restore(self.functions.abstract_state, self.config)
        self.step = 0
        self.owes_validation = False
        if restored is None:
            self.state = self.functions.init()
            return
        self.state = restored.state
        self.data.train.set_state(restored.data)
        self.step = int(self.state.step)
        self.changes = describe_changes(restored.config, self.config, self.step)
        # A signal comes before validation: a resumed run shows what an uninterrupted one would.
        self.owes_validation = self._is_validation_due() and not restored.is_validated

    def _open_writer(self, cleanup: contextlib.ExitStack) -> MetricsWriter | None:
        if not self.is_main:
            return None
        # Where nothing is trained the settings of what was trained stay.
        if self.step < self.config.steps or not is_written(self.directory):
            write_run_folder(self.directory, self.config, self.data)
        writer = MetricsWriter(
            self.directory,
            restored_step=self.step,
            config=to_json(self.config),
            wandb=self.config.wandb,
        )
        cleanup.callback(writer.close)
        return writer

    def run(self) -> TrainResult:
        stopped_by = None
        if self.owes_validation:
            self._validate()
        if self.step >= self.config.steps:
            self.console.print(
                f"step {self.step} of {self.config.steps} is already reached; raise --steps to "
                f"train on"
            )
        else:
            stopped_by = self._train()
        if stopped_by == "SIGINT":
            raise KeyboardInterrupt
        if stopped_by is not None:
            return TrainResult(directory=self.directory, step=self.step, finished=False,
                               validation_loss=None, sample=None)  # fmt: skip
        return self._finish()

    def _train(self) -> str | None:
        """Runs the steps that are left; returns the signal that ended them early, if one did."""
        with StopSignals(self.config.log_every) as stop:
            self.console.start_progress(self.step)
            try:
                stopped_by = self._run_steps(stop)
            finally:
                self.console.stop_progress()
            if stopped_by is not None:
                self._report_pending()
                self._save(validation_loss=None)
                self._wait_for_save()
                self.console.print(
                    f"{stopped_by}: saved a checkpoint at step {self.step}; the same command "
                    f"goes on from there"
                )
            return stopped_by

    def _run_steps(self, stop: StopSignals) -> str | None:
        while self.step < self.config.steps:
            batch = self._to_global(next(self.data.train))
            self.state, metrics = self.functions.train_step(self.state, batch)
            self.step += 1
            # The previous step's numbers are there by now: the device computes while we print.
            self._report_pending()
            self.pending = (self.step, metrics)
            self.owner.check()
            if stopped_by := stop.requested(self.step):
                return stopped_by
            self._validate_and_save()
        self._wait_for_save()
        return None

    def _to_global(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Rows of this process -> global arrays [B, T] over all processes."""
        return {
            name: jax.make_array_from_process_local_data(self.rows, rows)
            for name, rows in batch.items()
        }

    def _report_pending(self) -> None:
        """Fetches, checks and shows the metrics of the step that was kept back."""
        if self.pending is None:
            return
        step, device_metrics = self.pending
        self.pending = None
        metrics = {name: float(value) for name, value in device_metrics.items()}
        self._check_finite(step, metrics)
        self.throughput.step_done(metrics["targets"])
        self.console.step_done(step, metrics["loss"])
        if step % self.config.log_every == 0 or step == self.config.steps:
            metrics |= {"perplexity": _perplexity(metrics["loss"]), **self.throughput.read()}
            self._write(step, metrics)
            self.console.log(step, metrics)
        if self.on_step is not None:
            self.on_step(step, metrics)

    def _check_finite(self, step: int, metrics: Mapping[str, float]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                latest = self.checkpoints.latest_step
                kept = "there is no checkpoint yet" if latest is None else (
                    f"the newest checkpoint is of step {latest}")  # fmt: skip
                raise ValueError(
                    f"{name} is {metrics[name]} at step {step}: training diverged and was stopped, "
                    f"{kept}; lower --optimizer.learning-rate or raise --optimizer.warmup-steps"
                )

    def _validate_and_save(self) -> None:
        """Validates and saves where they are due, and saves the best state whenever it comes."""
        config, loss = self.config, None
        if self._is_validation_due():
            loss = self._validate()
        is_best = loss is not None and loss < self.best_loss
        if self.step == config.steps or is_best or self.step % config.checkpoint_every == 0:
            self._report_pending()  # a diverged state must not become the newest checkpoint
            self._save(validation_loss=loss)
            self.throughput.pause()
        if loss is not None:
            self.best_loss = min(self.best_loss, loss)

    def _is_validation_due(self) -> bool:
        return self.step == self.config.steps or self.step % self.config.eval_every == 0

    def _validate(self) -> float:
        self._report_pending()
        loss = self._validation_loss(self.config.eval_batches)
        metrics = {
            "validation_loss": loss,
            "validation_perplexity": _perplexity(loss),
            **self._depth_metrics(self._attention_mass()),
        }
        self._write(self.step, metrics)
        self.console.print(
            f"step {self.step}/{self.config.steps}  validation loss {loss:.4f}  "
            f"perplexity {metrics['validation_perplexity']:.3f}"
        )
        self.throughput.pause()
        return loss

    def _validation_loss(self, num_batches: int) -> float:
        """Mean cross-entropy per target token, nats."""
        sums = [
            self.functions.eval_step(self.state.params, self._to_global(batch))
            for batch in self.data.validation(num_batches)
        ]
        totals = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
        return totals["cross_entropy"] / max(totals["targets"], 1.0)

    def _attention_mass(self) -> np.ndarray:
        """[L, 1 + S] over the first validation batch."""
        batch = self._to_global(next(iter(self.data.validation(1))))
        return np.asarray(self.functions.attention_mass(self.state.params, batch))

    def _depth_metrics(self, mass: np.ndarray) -> dict[str, float]:
        """Share of attention that goes to depth slots, mean over the layers that see any."""
        if mass.shape[1] == 1:
            return {}
        return {"depth_attention_mass": float(mass[1:, 1:].sum(axis=1).mean())}

    def _save(self, *, validation_loss: float | None) -> None:
        with self.owner.guard():
            for step in self.checkpoints.forget_missing():
                self.console.print(f"checkpoint {step} was removed; the run goes on without it")
            self.checkpoints.save(
                self.step,
                self.state,
                data=self.data.train.get_state(),
                config=self.config,
                validation_loss=validation_loss,
            )

    def _wait_for_save(self) -> None:
        with self.owner.guard():
            self.checkpoints.wait()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(step, metrics)

    def _finish(self) -> TrainResult:
        """Final validation, sample and plots, from the state that is there."""
        loss = self._validation_loss(_FINAL_VALIDATION_FACTOR * self.config.eval_batches)
        mass = self._attention_mass()
        final = {"validation_loss": loss, "validation_perplexity": _perplexity(loss),
                 **self._depth_metrics(mass)}  # fmt: skip
        self._write(self.step, {FINAL + name: value for name, value in final.items()})
        sample = self._sample()
        if self.is_main:
            plot_loss(read_metrics(self.directory / METRICS_FILE), self.directory / "loss.png")
            labels = self.mechanism.slot_labels()
            if labels:
                plot_attention_mass(mass, labels, self.directory / "attention_mass.png")
        self.console.print(
            f"finished step {self.step}: validation loss {loss:.4f}, perplexity "
            f"{_perplexity(loss):.3f}; outputs in {self.directory}"
        )
        return TrainResult(directory=self.directory, step=self.step, finished=True,
                           validation_loss=loss, sample=sample)  # fmt: skip

    def _sample(self) -> str | None:
        if self.config.sample_tokens == 0:
            return None
        tokenizer = self.data.tokenizer
        prompt = [tokenizer.eos_id, *tokenizer.encode(self.config.sample_prompt)]
        new_tokens = generate(
            nnx.merge(self.functions.graphdef, self.state.params),
            [prompt],
            max_new_tokens=self.config.sample_tokens,
            temperature=_SAMPLE_TEMPERATURE,
            stop_tokens=(tokenizer.eos_id,),
            seed=self.config.seed,
        )[0]
        text = self.config.sample_prompt + tokenizer.decode(new_tokens)
        if self.is_main:
            (self.directory / "sample.txt").write_text(text + "\n", encoding="utf-8")
        self.console.print(f"sample:\n{text}\n")
        return text


def _make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"Config.output_dir: cannot make the folder {str(directory)!r}: {error.strerror}; "
            f"choose another --output-dir or --name"
        ) from error


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # exp(710) overflows
