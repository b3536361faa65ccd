"""A trace of some training steps, for TensorBoard and Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

WARM_UP = 10
"""Steps before the traced ones: the first ones compile, and fill what is prefetched."""


class ProfiledStep:
    """A training step that writes a trace of `num_steps` of its calls and is the same otherwise.

    TensorBoard (its profile plug-in) opens the folder, Perfetto the file perfetto_trace.json.gz in
    it. Operations carry the scopes "attention" and "ffn" of a layer. The layers are rounds of one
    loop: layer i's operations are those of its round i.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        folder: Path,
        *,
        num_steps: int,
        steps_left: int,
        say: Callable[[str], None],
    ) -> None:
        """Args:
        train_step: what is called.
        folder: gets the trace.
        num_steps: calls to trace; 0 traces nothing.
        steps_left: calls that will come; if they are few, the last ones are traced.
        say: gets one line when the trace is there.
        """
        self._train_step, self._folder, self._say = train_step, folder, say
        self._waiting = max(0, min(WARM_UP, steps_left - num_steps))
        self._left = min(num_steps, steps_left)
        self._calls = 0
        self._is_tracing = False

    def __call__(self, *arguments: Any) -> Any:
        self._calls += 1
        if not self._left:
            return self._train_step(*arguments)
        if self._waiting:
            self._waiting -= 1
            return self._train_step(*arguments)
        if not self._is_tracing:
            jax.block_until_ready(arguments)  # of the step before
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's own calls would fill the trace
            jax.profiler.start_trace(
                self._folder, create_perfetto_trace=True, profiler_options=options
            )
            self._is_tracing = True
        with jax.profiler.StepTraceAnnotation("train_step", step_num=self._calls):
            result = self._train_step(*arguments)
        self._left -= 1
        if not self._left:
            jax.block_until_ready(result)
            self.close()
        return result

    def close(self) -> None:
        """Writes a trace that is still open, as after a signal."""
        if self._is_tracing:
            self._is_tracing, self._left = False, 0
            jax.profiler.stop_trace()
            newest = max(
                self._folder.rglob("perfetto_trace.json.gz"), key=lambda p: p.stat().st_mtime
            )
            self._say(f"profile: tensorboard --logdir {self._folder}, or open {newest} in Perfetto")
