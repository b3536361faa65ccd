"""What a run prints: the start screen, a progress bar or plain lines, and the sample."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import rich.console
import rich.progress
import rich.table
from jax.sharding import Mesh
from rich.segment import Segment
from rich.text import Text

from moda_jax.config import Config, ModelConfig
from moda_jax.depth import make_mechanism
from moda_jax.model.execution import WARNING
from moda_jax.model.flops import count_parameters
from moda_jax.terminal import discard_output, escape_controls


class RunConsole:
    """A terminal gets a progress bar; a file or a pipe gets a line every `log_every` steps."""

    def __init__(self, *, steps: int, quiet: bool) -> None:
        self._console = _Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._steps = steps
        self._started: tuple[int, float] | None = None
        self._rate = ""
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TextColumn("ETA"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("compiling", total=steps)

    def print(self, text: str) -> None:
        """Prints `text`: brackets in it are no markup, control characters are spelled out."""
        self._console.show(Text(escape_controls(text)))

    def show_start(
        self,
        config: Config,
        mesh: Mesh,
        *,
        data_size: str,
        execution: Mapping[str, str],
        directory: Path,
        start: str,
        compilation_cache: str,
    ) -> None:
        """One screen that says what is about to run."""
        rows = {
            "model": _describe_model(config.model),
            "parameters": f"{count_parameters(config.model).total:,}",
            "devices": _describe_devices(mesh),
            **execution,
            "data": data_size,
            "steps": f"{config.steps:,} of {config.batch_size} rows x {config.data.seq_len} tokens",
            "outputs": str(directory),
            "start": start,
            "compiled": compilation_cache,
        }
        title = Text(escape_controls(f"moda_jax: {config.name}"), style="table.title")
        table = rich.table.Table(title=title, title_justify="left", show_header=False, box=None)
        for name, value in rows.items():
            style = "bold red" if name == WARNING else ""
            shown = Text(escape_controls(value), style=style, overflow="fold")
            table.add_row(Text(name, style="bold"), shown)
        self._console.show(table)

    def start_progress(self, step: int) -> None:
        self._progress.update(self._task, completed=step)
        with self._console.never_failing():
            self._progress.start()

    def stop_progress(self) -> None:
        with self._console.never_failing():
            self._progress.stop()

    def step_done(self, step: int, loss: float) -> None:
        """Moves the bar; the first step's time, mostly compilation, is left out of the ETA."""
        if self._started is None:
            self._started = (step, time.perf_counter())
        self._progress.update(
            self._task, completed=step, description=f"loss {loss:.4f}{self._rate}"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The training metrics of `step`: a line, unless the bar shows them."""
        rate = metrics.get("tokens_per_second")
        self._rate = "" if rate is None else f"  {rate:,.0f} tokens/s"
        if not self._console.is_terminal:
            self.print(
                f"step {step}/{self._steps}  loss {metrics['loss']:.4f}  "
                f"lr {metrics['learning_rate']:.2e}  grad norm {metrics['grad_norm']:.3f}"
                f"{self._rate}  ETA {self._time_left(step)}"
            )

    def _time_left(self, step: int) -> str:
        if self._started is None or step <= self._started[0]:
            return "-"
        first, since = self._started
        passed = max(time.perf_counter() - since, 0.0)
        seconds = passed / (step - first) * (self._steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class _Console(rich.console.Console):
    """A console whose failing never ends a run: results matter more than what is said of them.

    Characters that the terminal cannot encode are escaped. Where nobody reads any more it falls
    silent: after a closed pipe without a word, else (a full disk, a terminal that is gone) with one
    line on standard error.
    """

    def show(self, renderable: rich.console.RenderableType) -> None:
        with self.never_failing():
            self.print(renderable)

    @contextlib.contextmanager
    def never_failing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: a closed file
            self._fall_silent(error)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        text = super()._render_buffer(buffer)
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def on_broken_pipe(self) -> None:
        self._fall_silent(BrokenPipeError("nobody reads the output"))

    def _fall_silent(self, error: Exception) -> None:
        if self.quiet:
            return
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            if not isinstance(error, BrokenPipeError):
                print(f"output stops here, the run goes on: {error}", file=sys.stderr)
        if self.file is sys.stdout:
            # Python writes what is left in the buffer when it ends, and would fail again.
            with contextlib.suppress(OSError, ValueError):
                discard_output()


def _describe_model(model: ModelConfig) -> str:
    depth = make_mechanism(model).describe()
    return (
        f"{model.num_layers} layers, width {model.embed_dim}, {model.num_heads} heads on "
        f"{model.num_kv_heads} KV heads of {model.head_dim}, FFN {model.mlp_dim}, vocabulary "
        f"{model.vocab_size:,}, {depth}"
    )


def _describe_devices(mesh: Mesh) -> str:
    device = mesh.devices.flat[0]
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    unused = jax.device_count() - mesh.size
    rest = f"; {unused} more not used, see --mesh" if unused else ""
    return f"{mesh.size} of {device.device_kind} ({device.platform}), mesh {axes}{rest}"
