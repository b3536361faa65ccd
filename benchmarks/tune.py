"""Searches tile sizes of a backend's kernels and prints what is faster than their own choice.

    python -m benchmarks.tune [--kernels forward,depth_backward] [--rows T16K,H128]
    python -m benchmarks.tune --backend triton [--dry-run]

Triton's are also written into their table, pallas_kernels/triton_gpu/tuned.json. mosaic_gpu has no
table: what holds for a head size belongs into its heuristics (`forward_config` and the like).

From a kernel's own choice, one field at a time is changed; what is at least 1% faster stays, and
the fields are gone through until none improves. A config that does not fit the chip, does not
compile, or gives other results than the first one is left out. Each shape (see shapes.py) gives the
table's entry of its head size and group; of several shapes with the same, the last one counts.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import make_inputs
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import milliseconds
from pallas_kernels.triton_gpu.tuned import Table, table_key

GAIN = 0.01
"""A config must be faster by this share: timing scatters by a few tenths of a percent."""


class Kernel(NamedTuple):
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


def tune(kernel: Kernel, shape: Shape, deadline: float, jobs: int = 1) -> tuple[Any, float, float]:
    """`search` over a kernel's configs at a shape, in milliseconds; none is tried past `deadline`.

    Every config must give the default's results, up to the order of its sums. `jobs` configs are
    compiled side by side, and nothing is timed meanwhile.
    """
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return _tune(kernel, shape, deadline, pool)


def _tune(kernel: Kernel, shape: Shape, deadline: float, pool: Any) -> tuple[Any, float, float]:
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


class Kernels(NamedTuple):
    """A backend's kernels, and where their tile sizes go."""

    kernels: dict[str, Kernel]
    table: Table | None = None
    device: str = ""
    """As the table's keys call the device at hand."""


def mosaic_gpu_kernels() -> Kernels:
    return Kernels(kernels())


def triton_kernels() -> Kernels:
    from benchmarks.tune_triton import kernels
    from pallas_kernels.triton_gpu import tiles

    return Kernels(kernels(), tiles.TABLE, tiles.architecture())


def kernels() -> dict[str, Kernel]:
    """The kernels of mosaic_gpu; imported here, where a GPU is needed."""
    from pallas_kernels.mosaic_gpu.depth.backward import depth_backward
    from pallas_kernels.mosaic_gpu.depth.forward import depth_forward
    from pallas_kernels.mosaic_gpu.depth.tiles import DepthConfig
    from pallas_kernels.mosaic_gpu.fused_forward.attend import attend
    from pallas_kernels.mosaic_gpu.row_tiles import forward_config
    from pallas_kernels.mosaic_gpu.sequence_backward.backward import (
        DepthPart,
        fuses,
        sequence_backward,
    )
    from pallas_kernels.mosaic_gpu.sequence_backward.tiles import sequence_backward_config

    def slots(shape: Shape) -> np.ndarray:
        return np.asarray([0, shape.slots, shape.slots, shape.slots], np.int32)

    def scaled(function: Callable[..., Any], shape: Shape, config: Any, **settings: Any):
        return functools.partial(function, scale=shape.head_dim**-0.5, config=config, **settings)

    def rows(shape: Shape) -> tuple[jax.Array, jax.Array]:
        """lse and delta of a plausible size; their values do not change the time."""
        sizes = (shape.batch, shape.tokens, shape.heads)
        return jnp.full(sizes, np.log(shape.tokens), jnp.float32), jnp.zeros(sizes, jnp.float32)

    def run_forward(shape: Shape, config: Any):
        arrays, _ = make_inputs(shape)
        return scaled(attend, shape, config, is_causal=True), (*arrays, jnp.asarray(slots(shape)))

    def run_sequence_backward(shape: Shape, config: Any):
        (query, key, value, *depth), d_out = make_inputs(shape)

        def backward(query, key, value, d_out, lse, delta, depth_key, depth_value):
            part = DepthPart(depth_key, depth_value, slots(shape))
            fused = fuses(query, key, part, is_causal=True, config=config)
            function = scaled(
                sequence_backward,
                shape,
                config,
                is_causal=True,
                dq_dtype=query.dtype,
                depth=part if fused else None,
            )
            grads = function(query, key, value, d_out, lse, delta)
            if fused:
                return grads
            dq, new = scaled(depth_backward, shape, None, slots=slots(shape), is_prefix=True)(
                query, d_out, lse, delta, depth_key, depth_value, d_query=grads.query
            )
            return grads._replace(query=dq, slots=new)

        return backward, (query, key, value, d_out, *rows(shape), *depth)

    def run_depth_forward(shape: Shape, config: Any):
        (query, _, _, *depth), _ = make_inputs(shape)
        function = scaled(
            depth_forward, shape, config, slots=slots(shape), is_prefix=True, valid=None
        )
        return function, (query, *depth)

    def run_depth_backward(shape: Shape, config: Any):
        (query, _, _, *depth), d_out = make_inputs(shape)
        function = scaled(depth_backward, shape, config, slots=slots(shape), is_prefix=True)
        return function, (query, d_out, *rows(shape), *depth)

    depth = {"columns": (32, 64, 128), "stages": (2, 3, 4), "tokens_first": (False, True)}
    return {
        "forward": Kernel(
            lambda shape: forward_config(shape.head_dim),
            {
                "block_kv": (64, 128, 192),
                "stages": (2, 3, 4),
                "warpgroups": (2, 3),
                "persistent": (False, True),
                "turns": (False, True),
                "depth_parts": (1, 2, 4),
                "alternate": (False, True),
                "piles": (1, 2, 4),
            },
            run_forward,
        ),
        "sequence_backward": Kernel(
            lambda shape: sequence_backward_config(shape.head_dim),
            {
                "dq_block_kv": (64, 128),
                "dq_stages": (2, 3),
                "dq_slot_stages": (2, 3),
                "dq_warpgroups": (2, 3),
                "dq_piles": (1, 2, 4),
                "dkv_block_q": (64, 128),
                "dkv_stages": (2, 3),
                "dkv_warpgroups": (2, 3),
                "fuse_depth": (False, True),
            },
            run_sequence_backward,
        ),
        "depth_forward": Kernel(lambda _: DepthConfig(), depth, run_depth_forward),
        "depth_backward": Kernel(lambda _: DepthConfig(), depth, run_depth_backward),
    }


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a kernel could not be tuned at a shape, after the others."""
    parser = _options()
    options = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        parser.error(f"needs a GPU, the default device here is a {jax.default_backend()}")
    deadline = time.perf_counter() + options.time_budget
    available = {"mosaic_gpu": mosaic_gpu_kernels, "triton": triton_kernels}[options.backend]()
    failed = False
    for name in options.kernels.split(",") if options.kernels else available.kernels:
        for row in options.rows.split(","):
            try:
                shape = SHAPES[row]
                kernel = _narrowed(available.kernels[name], options.fields)
                best, lowest, first = tune(kernel, shape, deadline, options.jobs)
            except Exception as error:  # the other kernels' entries are still worth having
                text = " ".join(str(error).split())[:200]
                print(f"{name} at {row}: {type(error).__name__}: {text}", file=sys.stderr)
                failed = True
                continue
            print(f"{name} at {row}: {first:.3f} -> {lowest:.3f} ms, {best}", flush=True)
            if lowest < first and available.table is not None and not options.dry_run:
                key = table_key(name, shape.head_dim, shape.group, True, available.device)
                entry = {
                    "config": dataclasses.asdict(best),
                    "shape": row,
                    "ms": lowest,
                    "default_ms": first,
                }
                available.table.write({key: entry})
    return int(failed)


def _narrowed(kernel: Kernel, fields: str | None) -> Kernel:
    """With those fields of its grid only."""
    if fields is None:
        return kernel
    wanted = fields.split(",")
    return kernel._replace(grid={name: kernel.grid[name] for name in wanted if name in kernel.grid})


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", default="mosaic_gpu", choices=("mosaic_gpu", "triton"))
    jobs = "configs compiled side by side (Triton's compiler holds Python's lock: no faster there)"
    parser.add_argument("--jobs", type=int, default=1, help=jobs)
    parser.add_argument("--kernels", help="names, comma-separated; left out: all")
    parser.add_argument("--fields", help="fields to search, comma-separated; left out: all")
    parser.add_argument("--rows", default="T16K,B8,H128", help="shapes, comma-separated")
    parser.add_argument("--time-budget", type=float, default=300.0, help="seconds in all")
    parser.add_argument("--dry-run", action="store_true", help="writes no table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
