"""The training run: `train(config)` from the first screen to the last plot."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moda_jax.config import Config, DataConfig, to_json
from moda_jax.data.loader import Data, load_data, prepare_sources
from moda_jax.data.prepare import print_line
from moda_jax.data.tokenizer import decode_continuation
from moda_jax.depth import make_mechanism
from moda_jax.model.execution import describe_execution
from moda_jax.model.generation import generate
from moda_jax.ops.sharding import batch_sharding, make_mesh
from moda_jax.train.changes import describe_changes
from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.compilation_cache import CompilationCache
from moda_jax.train.console import RunConsole
from moda_jax.train.divergence import SkippedSteps, divergence
from moda_jax.train.errors import DivergenceError, SaveError
from moda_jax.train.init_from import load_initial_params
from moda_jax.train.memory import describe_out_of_memory, is_out_of_memory
from moda_jax.train.metrics import DEPTH_MASS, FINAL, METRICS_FILE, MetricsWriter, read_metrics
from moda_jax.train.owner import FolderOwner
from moda_jax.train.processes import (
    SAVE,
    RunSignals,
    gather_json,
    initialize_processes,
    on_main,
)
from moda_jax.train.profile import ProfiledStep
from moda_jax.train.report import plot_attention_mass, plot_loss
from moda_jax.train.run_folder import is_written, write_run_folder
from moda_jax.train.saving import Saver
from moda_jax.train.start_clock import StartClock
from moda_jax.train.throughput import Throughput
from moda_jax.train.train_step import make_train_functions, resolve
from moda_jax.train.validation import Validation, perplexity

_FINAL_VALIDATION_FACTOR = 4
_SAMPLE_TEMPERATURE = 0.8
OnStep = Callable[[int, Mapping[str, float]], None]
_T = TypeVar("_T")


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
    """False: stopped by SIGTERM or SIGHUP before `config.steps`; the same call goes on."""
    validation_loss: float | None
    """Nats per token of the last validation over more batches; None unless finished."""
    sample: str | None
    """Generated text, its prompt included; None unless finished, asked for and not failed."""

    @property
    def validation_perplexity(self) -> float | None:
        return None if self.validation_loss is None else perplexity(self.validation_loss)


def train(
    config: Config, *, on_step: OnStep | None = None, clock: StartClock | None = None
) -> TrainResult:
    """Trains up to step `config.steps`, going on from the newest checkpoint if there is one.

    A run without a checkpoint begins with fresh parameters, or with those of `config.init_from`.

    A run that is stopped and started again takes the same batches and reaches bitwise the same
    parameters as one that was not. With a larger `config.steps` than before it goes on under the
    new, longer learning-rate curve. SIGTERM, SIGHUP and the first Ctrl-C end the run after the
    current step with a checkpoint, SIGUSR1 makes one and the run goes on; a second signal ends the
    process at once. SIGTERM and SIGHUP end the process at once (status 75) while there is nothing
    to save: before the first step is done, and in what follows the last checkpoint.

    A step whose loss or gradient is not finite is skipped and counted, its batch is kept in
    skipped/; after `config.max_skipped_steps` in a row the next one ends the run. Only a state with
    finite parameters and a finite validation loss is saved.

    Args:
        config: the run.
        on_step: called with every step's number and metrics, one step late; of a skipped step they
            are not finite.
        clock: tells where the time went until the first step was done; None: begins now.

    Raises:
        ValueError: mesh, data or checkpoint do not fit the config, nor does what `init_from` names;
            another run writes to the folder; no checkpoint is whole; or data cannot be read (the
            steps until then are saved, unless several processes run).
        DivergenceError: too many skipped steps, or a validation loss or a state to be saved is not
            finite; the newest checkpoint is from before.
        SaveError: a checkpoint could not be written, or the folder was lost; the newest complete
            checkpoint stays.
        MemoryError: the devices' memory is too small; the message says by how much what would help.
        KeyboardInterrupt: after Ctrl-C, when the checkpoint is complete.
    """
    clock = StartClock() if clock is None else clock
    clock.lap("imports")
    with RunSignals(config.log_every) as signals:
        initialize_processes()
        mesh = make_mesh(config.mesh)
        clock.lap("devices")
        _make_folder("output_dir", Path(config.output_dir))
        cache_dir = config.prepared_folder
        if config.prepared_dir is not None:
            _make_folder("prepared_dir", cache_dir)
        if jax.process_count() > 1:  # the first prepares for those that share its disk
            on_main(lambda: _prepare(config.data, cache_dir))
        data = load_data(
            config.data,
            batch_size=config.batch_size,
            vocab_size=config.model.vocab_size,
            seed=config.seed,
            cache_dir=cache_dir,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            say=print_line if jax.process_index() == 0 else _say_nothing,
        )
        clock.lap("data")
        with jax.set_mesh(mesh), contextlib.closing(data.train), contextlib.ExitStack() as cleanup:
            cache = cleanup.enter_context(CompilationCache(config.compilation_cache))
            try:
                return _Run(config, mesh, data, on_step, signals, cleanup, cache, clock).run()
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                execution = resolve(config, mesh)
                raise MemoryError(describe_out_of_memory(error, config, mesh, execution)) from error


class _Run:
    """A run in progress: the state and everything that looks at it."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        data: Data,
        on_step: OnStep | None,
        signals: RunSignals,
        cleanup: contextlib.ExitStack,
        cache: CompilationCache,
        clock: StartClock,
    ) -> None:
        self.config, self.data, self.on_step, self.signals = config, data, on_step, signals
        self.cache, self.clock = cache, clock
        self.prompt = [data.tokenizer.eos_id, *data.tokenizer.encode(config.sample_prompt)]
        self.rows = batch_sharding(mesh)
        self.directory = Path(config.output_dir) / config.name
        self.is_main = jax.process_index() == 0
        self.functions = make_train_functions(config, mesh)
        execution = describe_execution(config, self.functions.execution)
        self.mechanism = make_mechanism(config.model)
        self.console = RunConsole(steps=config.steps, quiet=not self.is_main)
        _make_folder("output_dir", self.directory)
        self.owner = cleanup.enter_context(FolderOwner(self.directory))
        folder = self.directory / "checkpoints"
        self.checkpoints = Checkpoints(folder, keep_last=config.keep_last)
        self.saver = cleanup.enter_context(Saver(self.owner, self.checkpoints, self.console.print))
        self.owner.watch(folder)
        for line in (self.owner.taken_from, *self.checkpoints.damaged):
            if line is not None:
                self.console.print(line)
        self.changes: list[str] = []
        self.clock.lap("model")
        self.began = self._restore_or_init()
        self.saved_step = self.step
        self.best_loss = self.checkpoints.best_loss()
        self.skipped = SkippedSteps(self.directory, max_in_a_row=config.max_skipped_steps)
        self.pending: tuple[int, dict[str, jax.Array], Mapping[str, np.ndarray]] | None = None
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
            start=self.began,
            compilation_cache=cache.description,
        )
        for line in self.changes:
            self.console.print(line)

        self.train_step = ProfiledStep(
            self.functions.train_step,
            self.directory / "profile",
            num_steps=config.profile if self.is_main else 0,
            steps_left=config.steps - self.step,
            say=self.console.print,
        )
        cleanup.callback(self.train_step.close)

    def _restore_or_init(self) -> str:
        """Makes the state; returns where it came from."""
        self.step = 0
        self.owes_validation = False
        if self.checkpoints.is_imported:
            target, tokenizer = self.functions.abstract_state.params, self.data.tokenizer
            params = self.checkpoints.restore_imported(target, self.config, tokenizer.fingerprint)
            self.state = self.functions.begin_with(params)
            self.owes_validation = True  # the loss that training begins with
            self.clock.lap("restore")
            return "imported parameters"
        restored = self.checkpoints.restore(self.functions.abstract_state, self.config)
        if restored is None and self.config.init_from is not None:
            initial = load_initial_params(
                self.config.init_from,
                self.config.model,
                self.functions.abstract_state.params,
                tokenizer=self.data.tokenizer.fingerprint,
                seed=self.config.seed,
            )
            self.state = self.functions.begin_with(initial.params)
            self.changes = initial.notes
            self.owes_validation = initial.is_changed
            self.clock.lap("restore")
            return initial.source
        if restored is None:
            self.state = self.functions.init()
            self.clock.lap("init")
            return "from scratch"
        self.state = restored.state
        self.data.train.set_states(restored.data)
        self.step = int(self.state.step)
        self.changes = describe_changes(restored.config, self.config, self.step)
        # A signal comes before validation: a resumed run shows what an uninterrupted one would.
        self.owes_validation = self._is_validation_due() and not restored.is_validated
        self.clock.lap("restore")
        return f"resumed at step {self.step}"

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
            say=self.console.print,
        )
        cleanup.callback(writer.close)
        return writer

    def run(self) -> TrainResult:
        stopped_by = None
        if self.owes_validation:
            self._validate()
            self.clock.lap("validation")
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
        self.console.start_progress(self.step)
        try:
            stopped_by = self._run_steps()
        finally:
            self.console.stop_progress()
        if stopped_by is not None and self.step != self.saved_step:
            self._save(validation_loss=None)
        self.saver.wait()
        self.signals.all_is_saved = True  # from here on a signal ends the process
        stopped_by = stopped_by or self.signals.stop
        if stopped_by is not None:
            self.console.print(
                f"{stopped_by}: saved a checkpoint at step {self.step}; the same command "
                f"goes on from there"
            )
        return stopped_by

    def _run_steps(self) -> str | None:
        while self.step < self.config.steps:
            with self._saving_if_data_fails():
                rows = next(self.data.train)
            self.clock.lap("first batch")
            self.state, metrics = self.train_step(self.state, self._to_global(rows))
            self.signals.all_is_saved = False
            self.step += 1
            if self.clock.is_running:
                self._report_start(metrics)
            # The previous step's numbers are there by now: the device computes while we print.
            self._report_pending()
            self.pending = (self.step, metrics, rows)
            self.owner.check()
            request = self.signals.requested(self.step)
            if request not in (None, SAVE):
                return request
            self._validate_and_save(requested=request == SAVE)
            if self.signals.stop:
                return self.signals.stop
        return None

    def _report_start(self, metrics: Mapping[str, jax.Array]) -> None:
        self.clock.lap("compile")
        jax.block_until_ready(metrics)
        self.clock.lap("step")
        hits = f"; programs that were found compiled: {self.cache.hits}" if self.cache.hits else ""
        self.console.print(self.clock.end() + hits)

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
        step, device_metrics, rows = self.pending
        self.pending = None
        metrics = {name: float(value) for name, value in device_metrics.items()}
        if line := self.skipped.observe(step, metrics, rows):
            if self.skipped.too_many:
                raise self._divergence(self.skipped.too_many)
            self.console.print(line)
        self.throughput.step_done(metrics["targets"])
        self.console.step_done(step, metrics["loss"])
        if step % self.config.log_every == 0 or step == self.config.steps:
            metrics |= {"perplexity": perplexity(metrics["loss"]), **self.throughput.read()}
            if skipped := sum(gather_json(self.data.train.num_skipped)):
                metrics["skipped_pieces"] = skipped
            self._write(step, metrics)
            self.console.log(step, metrics)
        if self.on_step is not None:
            self.on_step(step, metrics)

    def _divergence(self, what: str) -> DivergenceError:
        self.saver.wait()  # which is then the newest one
        return divergence(what, self.checkpoints.latest_step)

    def _validate_and_save(self, *, requested: bool) -> None:
        """Validates and saves where they are due, and saves the best state whenever it comes."""
        config, loss = self.config, None
        if self._is_validation_due():
            loss = self._validate()
            if loss is None:
                return  # stopped, and saved by the caller
        is_best = loss is not None and loss < self.best_loss
        is_due = self.step == config.steps or self.step % config.checkpoint_every == 0
        if is_due or is_best or requested:
            # Huge parameters are finite, but not their loss: one batch raises DivergenceError.
            if loss is None and self._validation(1) is None:
                return  # stopped, and saved by the caller
            self._save(validation_loss=loss)
            self.throughput.pause()
            if requested:
                self.console.print(f"{SAVE}: saved a checkpoint at step {self.step}")
        if loss is not None:
            self.best_loss = min(self.best_loss, loss)

    def _is_validation_due(self) -> bool:
        return self.step == self.config.steps or self.step % self.config.eval_every == 0

    def _validate(self) -> float | None:
        """Validates and says so; None if a signal cut it short, which a resumed run makes up for.

        Raises DivergenceError.
        """
        self._report_pending()
        validation = self._validation(self.config.eval_batches)
        if validation is None:
            return None
        self._write(self.step, self._validation_metrics(validation, self._attention_mass()))
        self.console.print(f"step {self.step}/{self.config.steps}  {validation}")
        self.throughput.pause()
        return validation.loss

    def _validation(self, num_batches: int) -> Validation | None:
        """Losses over `num_batches` of each source; None if a signal asks to stop.

        Raises DivergenceError.
        """
        losses = []
        for number in range(len(self.data.sources)):
            loss = self._source_loss(num_batches, number)
            if loss is None:
                return None
            losses.append(loss)
        return Validation.of(self.data.sources, losses)

    def _source_loss(self, num_batches: int, source: int) -> float | None:
        """Mean cross-entropy per target token of a source, nats."""
        sums: list[dict[str, jax.Array]] = []
        batches = self.data.validation(num_batches, source)
        while True:
            with self._saving_if_data_fails():
                batch = next(batches, None)
            if self.signals.stop:
                return None
            if batch is None:
                break
            sums.append(self.functions.eval_step(self.state.params, self._to_global(batch)))
            if len(sums) > 1:
                jax.block_until_ready(sums[-2])  # a signal finds one batch in the queue, not all
        totals = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
        if not totals["targets"]:
            raise ValueError(
                f"data: expected held-out tokens of {self.data.sources[source].name}, got none "
                f"that can be read; prepare that text again"
            )
        loss = totals["cross_entropy"] / totals["targets"]
        if not math.isfinite(loss):
            name = self.data.sources[source].name
            where = f" of {name}" if len(self.data.sources) > 1 else ""
            raise self._divergence(f"validation loss{where} is {loss} at step {self.step}")
        return loss

    def _attention_mass(self) -> np.ndarray:
        """[L, 1 + S] over the first validation batch."""
        batch = self._to_global(next(iter(self.data.validation(1))))
        return np.asarray(self.functions.attention_mass(self.state.params, batch))

    def _validation_metrics(self, validation: Validation, mass: np.ndarray) -> dict[str, float]:
        metrics = validation.metrics() | self._depth_metrics(mass)
        if skipped := sum(gather_json(self.data.num_skipped_held_out)):
            metrics["validation_skipped_pieces"] = skipped
        return metrics

    def _depth_metrics(self, mass: np.ndarray) -> dict[str, float]:
        """Share of attention that goes to depth slots: of each layer that sees any, their mean."""
        if mass.shape[1] == 1:
            return {}
        by_layer = mass[1:, 1:].sum(axis=1)
        layers = {f"{DEPTH_MASS}/{n}": round(float(x), 5) for n, x in enumerate(by_layer, start=1)}
        return {DEPTH_MASS: float(by_layer.mean())} | layers

    def _save(self, *, validation_loss: float | None) -> None:
        """Starts to save the state, unless it must not become the newest checkpoint.

        Raises DivergenceError, or SaveError for the checkpoint before.
        """
        self._report_pending()
        if not self.functions.is_finite(self.state):
            raise self._divergence(f"a parameter or moment is not finite at step {self.step}")
        self.saver.save(
            self.step,
            self.state,
            data=self.data.train.get_state(),
            config=self.config,
            validation_loss=validation_loss,
        )
        self.saved_step = self.step

    @contextlib.contextmanager
    def _saving_if_data_fails(self) -> Iterator[None]:
        """Saves the steps that are done before an error of reading data ends the run.

        A process of several cannot: saving takes all of them.
        """
        try:
            yield
        except Exception:
            if self.step != self.saved_step and jax.process_count() == 1:
                self._save(validation_loss=None)
                self.saver.wait()
                self.console.print(f"data cannot be read: saved a checkpoint at step {self.step}")
            raise

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.writer is None:
            return
        try:
            self.writer.write(step, metrics)
        except OSError as error:
            raise SaveError(
                f"{self.directory / METRICS_FILE}: the metrics of step {step} could not be written "
                f"({error.strerror}); make room, then start the same command again"
            ) from error

    def _finish(self) -> TrainResult:
        """Final validation, sample and plots, from the state that is there."""
        validation = self._validation(_FINAL_VALIDATION_FACTOR * self.config.eval_batches)
        assert validation is not None  # a stop signal ends the process now
        mass = self._attention_mass()
        final = self._validation_metrics(validation, mass)
        self._write(self.step, {FINAL + name: value for name, value in final.items()})
        sample = self._attempt("sample", self._sample)
        if self.is_main:
            self._attempt("plots", lambda: self._plot(mass))
        self.console.print(f"finished step {self.step}: {validation}; outputs in {self.directory}")
        return TrainResult(directory=self.directory, step=self.step, finished=True,
                           validation_loss=validation.loss, sample=sample)  # fmt: skip

    def _attempt(self, what: str, function: Callable[[], _T]) -> _T | None:
        """What `function` returns; one line and None if it fails: the run is finished all the same.

        Results come first: the model and its metrics are on disk.
        """
        try:
            return function()
        except Exception as error:
            reason = " ".join(str(error).split())
            self.console.print(f"{what}: failed with {type(error).__name__}: {reason}")
            return None

    def _plot(self, mass: np.ndarray) -> None:
        plot_loss(read_metrics(self.directory / METRICS_FILE), self.directory / "loss.png")
        labels = self.mechanism.slot_labels()
        if labels:
            plot_attention_mass(mass, labels, self.directory / "attention_mass.png")

    def _sample(self) -> str | None:
        if self.config.sample_tokens == 0:
            return None
        tokenizer = self.data.tokenizer
        new_tokens = generate(
            nnx.merge(self.functions.graphdef, self.state.params),
            [self.prompt],
            max_new_tokens=self.config.sample_tokens,
            temperature=_SAMPLE_TEMPERATURE,
            stop_tokens=(tokenizer.eos_id,),
            seed=self.config.seed,
        )[0]
        text = self.config.sample_prompt + decode_continuation(tokenizer, self.prompt, new_tokens)
        if self.is_main:
            (self.directory / "sample.txt").write_text(text + "\n", encoding="utf-8")
        self.console.print(f"sample:\n{text}\n")
        return text


def _make_folder(field: str, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"Config.{field}: cannot make the folder {str(directory)!r}: {error.strerror}; "
            f"choose another --{field.replace('_', '-')}"
        ) from error


def _prepare(config: DataConfig, cache_dir: Path) -> None:
    """What `load_data` would do first."""
    prepare_sources(config, cache_dir, say=print_line)


def _say_nothing(line: str) -> None:
    """The first process speaks for all."""
