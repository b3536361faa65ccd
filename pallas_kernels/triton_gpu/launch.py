"""Runs a Triton kernel on JAX arrays: through jax-triton on a GPU, else in Triton's interpreter.

Neither package is imported before a kernel is called, so everything else works without them.
"""

import functools
import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import platforms
from pallas_kernels.triton_gpu import tiles

INSTALL = 'pip install -e ".[triton]"'

WINDOW = {"triton": ((3, 6), (3, 8)), "jax-triton": ((0, 3, 1), (0, 4)), "jax": ((0, 11), (0, 13))}
"""First version that works, and first one that was not tried; the three move together."""


def interpreting() -> bool:
    """Whether the kernels are Python that runs on arrays in memory: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_reason(platform: str) -> str | None:
    """Why no kernel can run on a platform; None if one can."""
    if platform == "tpu":
        return "Triton kernels need a GPU"
    if platform == "cpu" and not interpreting():
        return "Triton kernels need a GPU; on a CPU, TRITON_INTERPRET=1 runs Triton's interpreter"
    if platform == "gpu" and interpreting():
        return "TRITON_INTERPRET is set: the kernels are for the interpreter, on the CPU"
    needed: tuple[str, ...] = ("triton",) if platform == "cpu" else ("triton", "jax-triton", "jax")
    for package in needed:
        if reason := _version_unsupported_reason(package):
            return reason
    if platform == "gpu" and re.fullmatch(r"sm_[1-7]\d", tiles.architecture()):
        return f"needs compute capability 8.0 or later, this GPU is {tiles.architecture()}"
    return None


@functools.cache
def _version_unsupported_reason(package: str) -> str | None:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed: {INSTALL}"
    first, after = WINDOW[package]
    numbers = tuple(int(x) for x in re.findall(r"\d+", version)[:3])
    if not first <= numbers < after:
        return f"works with {requirement(package)}, this is {version}: {INSTALL}"
    return None


def requirement(package: str) -> str:
    """As pip takes it, for instance "triton>=3.6,<3.8"."""
    first, after = (".".join(map(str, version)) for version in WINDOW[package])
    return f"{package}>={first},<{after}"


def call(
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    config: tiles.TileConfig,
    *,
    aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """The outputs of a kernel(*inputs, *outputs, **constants).

    Args:
      kernel: of `triton.jit`.
      inputs, outputs: what its first arguments point at.
      grid: programs, up to three axes.
      config: of which the warps and the stages are used here.
      aliases: input -> output that takes its memory.
      constants: the kernel's `tl.constexpr` arguments.
    """
    if platforms.current() == "cpu":
        host = functools.partial(
            _interpret, kernel, tuple(outputs), grid, dict(aliases or {}), constants
        )
        return list(jax.pure_callback(host, tuple(outputs), *inputs, vmap_method="sequential"))
    import jax_triton

    name = tiles.architecture()
    results = jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        out_shape=list(outputs),
        grid=grid,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        input_output_aliases=dict(aliases or {}),
        compute_capability=int(name[3:]) if name.startswith("sm_") else None,
        **constants,
    )
    # Without the barrier, where a result goes straight into a stacked array (a scan that keeps
    # lse), XLA fuses a second copy of the kernel with the update and runs both.
    return list(jax.lax.optimization_barrier(results))


class _HostArray:
    """What Triton's interpreter asks of a tensor; the memory is a numpy array's."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_HostArray":
        return self

    def cpu(self) -> "_HostArray":
        return self

    def new_empty(self, size: int, device: str) -> "_HostArray":
        return _HostArray(self.array)

    def set_(self, storage: "_HostArray", offset: int, size: Any, strides: Any) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def copy_(self, other: "_HostArray") -> None:
        """Host and device are the same memory."""


def _interpret(kernel: Any, outputs: Any, grid: Any, aliases: Any, constants: Any, *inputs: Any):
    """Runs the kernel's programs one after another; uninitialized results are NaN."""
    arrays = [np.array(x) for x in inputs]
    results = [
        np.frombuffer(b"\xff" * (x.size * x.dtype.itemsize), x.dtype).reshape(x.shape).copy()
        for x in outputs
    ]
    for source, target in aliases.items():
        results[target] = arrays[source]
    with np.errstate(all="ignore"):
        kernel[grid](*map(_HostArray, (*arrays, *results)), **constants)
    return tuple(results)
