"""Searches tile sizes of the mosaic_gpu kernels and writes pallas_kernels/mosaic_gpu/tuned.json.

    python -m benchmarks.tune [--kernels forward,depth_backward] [--rows T16K,H128] [--dry-run]

From a kernel's own choice, one field at a time is changed; what is at least 1% faster stays, and
the fields are gone through until none improves. A config that does not fit the chip, does not
compile, or gives other results than the first one is left out. Each shape (see shapes.py) gives the
entry of its head size and group; of several shapes with the same, the last one counts.
"""

import argparse
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
from pallas_kernels.mosaic_gpu import tuned

GAIN = 0.01
"""A config must be faster by this share: timing scatters by a few tenths of a percent."""


class Kernel(NamedTuple):
    """A kernel with tile sizes to choose."""

    default: Callable[[int], Any]
    """Head size -> the config that the kernel takes by itself."""
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


def tune(kernel: Kernel, shape: Shape, deadline: float) -> tuple[Any, float, float]:
    """`search` over a kernel's configs at a shape, in milliseconds; none is tried past `deadline`.

    Every config must give the default's results, up to the order of its sums.
    """
    expected: list[Any] = []

    def cost(config: Any) -> float | None:
        if expected and time.perf_counter() > deadline:
            return None
        try:
            function, arguments = kernel.run(shape, config)
            compiled = jax.jit(function)
            results = [np.asarray(x, np.float32) for x in jax.tree.leaves(compiled(*arguments))]
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

    neighbours = functools.partial(candidates, grid=kernel.grid)
    return search(kernel.default(shape.head_dim), neighbours, cost)


def _check_results(results: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for got, wanted in zip(results, expected, strict=True):
        finite = np.isfinite(wanted)
        size = float(np.linalg.norm(wanted[finite]))
        error = float(np.linalg.norm((got - wanted)[finite])) / max(size, 1e-30)
        if not error < 1e-2 or not np.array_equal(np.isfinite(got), finite):  # 16-bit rounding
            raise ValueError(f"other results than the first config's, relative error {error:.1e}")


def kernels() -> dict[str, Kernel]:
    """The kernels of mosaic_gpu; imported here, where a GPU is needed."""
    from pallas_kernels.mosaic_gpu.depth_backward import depth_backward
    from pallas_kernels.mosaic_gpu.depth_forward import depth_forward
    from pallas_kernels.mosaic_gpu.depth_tiles import DepthConfig
    from pallas_kernels.mosaic_gpu.forward import attend
    from pallas_kernels.mosaic_gpu.forward_tiles import forward_config
    from pallas_kernels.mosaic_gpu.sequence_backward import Depth, fuses, sequence_backward
    from pallas_kernels.mosaic_gpu.sequence_tiles import sequence_backward_config

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
            part = Depth(depth_key, depth_value, slots(shape))
            fused = fuses(query, key, part, is_causal=True, config=config)
            function = scaled(
                sequence_backward, shape, config, is_causal=True, dq_dtype=query.dtype,
                depth=part if fused else None,
            )  # fmt: skip
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
            depth_forward, shape, config, slots=slots(shape), is_prefix=True, sequence=None,
            valid=None,
        )  # fmt: skip
        return function, (query, *depth)

    def run_depth_backward(shape: Shape, config: Any):
        (query, _, _, *depth), d_out = make_inputs(shape)
        function = scaled(
            depth_backward, shape, config, slots=slots(shape), is_prefix=True
        )  # fmt: skip
        return function, (query, d_out, *rows(shape), *depth)

    depth = {"columns": (32, 64, 128), "stages": (2, 3, 4), "tokens_first": (False, True)}
    return {
        "forward": Kernel(
            forward_config,
            {
                "block_kv": (64, 128, 192), "stages": (2, 3, 4), "warpgroups": (2, 3),
                "persistent": (False, True), "turns": (False, True), "interleave": (False, True),
            },
            run_forward,
        ),
        "sequence_backward": Kernel(
            sequence_backward_config,
            {
                "dq_block_kv": (64, 128), "dq_stages": (2, 3), "dq_warpgroups": (2, 3),
                "dkv_block_q": (64, 128), "dkv_stages": (2, 3), "dkv_warpgroups": (2, 3),
                "dq_interleave": (False, True), "fuse_depth": (False, True),
            },
            run_sequence_backward,
        ),
        "depth_forward": Kernel(lambda _: DepthConfig(), depth, run_depth_forward),
        "depth_backward": Kernel(lambda _: DepthConfig(), depth, run_depth_backward),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a kernel could not be tuned at a shape, after the others."""
    parser = _options()
    options = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        parser.error(f"needs a GPU, the default device here is a {jax.default_backend()}")
    deadline = time.perf_counter() + options.time_budget
    available = kernels()
    failed = False
    for name in options.kernels.split(",") if options.kernels else available:
        for row in options.rows.split(","):
            try:
                shape = SHAPES[row]
                best, lowest, first = tune(available[name], shape, deadline)
            except Exception as error:  # the other kernels' entries are still worth having
                text = " ".join(str(error).split())[:200]
                print(f"{name} at {row}: {type(error).__name__}: {text}", file=sys.stderr)
                failed = True
                continue
            print(f"{name} at {row}: {first:.3f} -> {lowest:.3f} ms, {best}", flush=True)
            if lowest < first and not options.dry_run:
                device = jax.devices()[0].device_kind
                key = tuned.table_key(name, shape.head_dim, shape.group, True, device)
                entry = {
                    "config": dataclasses.asdict(best), "shape": row, "ms": lowest,
                    "default_ms": first,
                }  # fmt: skip
                tuned.write_entries({key: entry})
    return int(failed)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tune", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--kernels", help="names, comma-separated; left out: all")
    parser.add_argument("--rows", default="T16K,B8,H128", help="shapes, comma-separated")
    parser.add_argument("--time-budget", type=float, default=300.0, help="seconds in all")
    parser.add_argument("--dry-run", action="store_true", help="writes no table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
