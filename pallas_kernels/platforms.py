"""For which platform a call is traced: the default device's, or the one that is being compiled for.

A kernel asks here whether to run compiled or in Pallas's interpreter, and the registry which
backends can take a call.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def current() -> str:
    """One of "cpu", "gpu" and "tpu"."""
    name = _target.get() or jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Traces for another platform than the default device's: ahead-of-time compilation.

    Holds for what is traced inside; a function that JAX has traced before keeps its trace.
    """
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def interpreted() -> bool:
    """Whether Pallas kernels run in their interpreter: on the CPU, for which none compile."""
    return current() == "cpu"
