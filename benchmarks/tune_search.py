"""The search over a kernel's tile sizes.

From a kernel's own choice, one field at a time is changed; what is at least 1% faster stays, and
the fields are gone through until none improves. A config that does not fit the chip, does not
compile, or gives other results than the first one is left out.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.shapes import Shape
from benchmarks.timing import milliseconds

GAIN = 0.01
"""A config must be faster by this share: timing scatters by a few tenths of a percent."""


class TunedKernel(NamedTuple):
    """A kernel with tile sizes to choose."""

    default: Callable[[Shape], Any]
    """The config that the kernel takes by itself at a shape."""
    grid: Mapping[str, Sequence[Any]]
    """Values to try, by field."""
    run: Callable[[Shape, Any], tuple[Callable[..., Any], tuple[Any, ...]]]
    """(shape, config) -> (function, its arguments)."""


def candidates(config: Any, grid: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Configs that differ from `config` in one field of the grid."""
    changed = [
        dataclasses.replace(config, **{field: value})
        for field, values in grid.items()
        for value in values
    ]
    return [other for other in changed if other != config]


def search(
    default: Any, neighbours: Callable[[Any], list[Any]], cost: Callable[[Any], float | None]
) -> tuple[Any, float, float]:
    """(best config, its cost, the default's); cost None: the config does not work.

    Raises ValueError if the default itself does not work.
    """
    costs: dict[Any, float | None] = {default: cost(default)}
    first = costs[default]
    if first is None:
        raise ValueError(f"the kernel's own choice does not work: {default}")
    best, lowest = default, first
    improved = True
    while improved:
        improved = False
        for config in neighbours(best):
            if config not in costs:
                costs[config] = cost(config)
            value = costs[config]
            if value is not None and value < lowest * (1 - GAIN):
                best, lowest, improved = config, value, True
    return best, lowest, first


def tune(
    kernel: TunedKernel, shape: Shape, deadline: float, jobs: int = 1
) -> tuple[Any, float, float]:
    """`search` over a kernel's configs at a shape, in milliseconds; none is tried past `deadline`.

    Every config must give the default's results, up to the order of its sums. `jobs` configs are
    compiled side by side, and nothing is timed meanwhile.
    """
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return _tune(kernel, shape, deadline, pool)


def _tune(
    kernel: TunedKernel, shape: Shape, deadline: float, pool: Any
) -> tuple[Any, float, float]:
    expected: list[Any] = []
    programs: dict[Any, Any] = {}

    def build(config: Any) -> Any:
        if expected and time.perf_counter() > deadline:
            raise TimeoutError("the time budget is spent")
        function, arguments = kernel.run(shape, config)
        return jax.jit(function).lower(*arguments).compile(), arguments

    def neighbours(config: Any) -> list[Any]:
        found = candidates(config, kernel.grid)
        for other in found:
            if other not in programs:
                programs[other] = pool.submit(build, other)
        concurrent.futures.wait([programs[other] for other in found])
        return found

    def cost(config: Any) -> float | None:
        if expected and time.perf_counter() > deadline:
            return None
        try:
            program = programs.pop(config, None)
            compiled, arguments = build(config) if program is None else program.result()
            results = jax.tree.leaves(compiled(*arguments))
            if not expected:
                expected.extend(results)
            _check_results(results, expected)
            duration = milliseconds(compiled, *arguments, budget=0.1)
        except Exception as error:  # a config that does not compile is an answer, too
            text = " ".join(str(error).split())[:150]
            print(f"  {config}: {type(error).__name__}: {text}", flush=True)
            return None
        print(f"  {config}: {duration:.3f} ms", flush=True)
        return duration

    return search(kernel.default(shape), neighbours, cost)


def _check_results(results: list[jax.Array], expected: list[jax.Array]) -> None:
    for got, wanted in zip(results, expected, strict=True):
        error, same_places = _difference(got, wanted)  # on the device: these are large
        if not error < 1e-2 or not same_places:  # 16-bit rounding
            raise ValueError(f"other results than the first config's, relative error {error:.1e}")


@jax.jit
def _difference(got: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Relative error over what is finite, and whether the same entries are."""
    finite = jnp.isfinite(wanted)
    x, y = (jnp.where(finite, z, 0).astype(jnp.float32) for z in (got, wanted))
    error = jnp.linalg.norm((x - y).ravel()) / jnp.maximum(jnp.linalg.norm(y.ravel()), 1e-30)
    return error, jnp.array_equal(jnp.isfinite(got), finite)
