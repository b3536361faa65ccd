"""Searches tile sizes of a backend's kernels and prints what is faster than their own choice.

    python -m benchmarks.tune [--kernels forward,depth_backward] [--rows T16K,H128]
    python -m benchmarks.tune --backend triton [--dry-run]

Triton's are also written into their table, pallas_kernels/triton_gpu/tuned.json. mosaic_gpu has no
table: what holds for a head size belongs into its heuristics (`forward_config` and the like).

Each shape (see shapes.py) gives the table's entry of its head size and group; of several shapes
with the same, the last one counts. How the search goes on: see tune_search.py.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from benchmarks import tune_mosaic_gpu, tune_triton
from benchmarks.shapes import SHAPES
from benchmarks.tune_search import TunedKernel, tune
from pallas_kernels.triton_gpu import tiles
from pallas_kernels.triton_gpu.tuned import Table, table_key


class TunedBackend(NamedTuple):
    """A backend's kernels, and where their tile sizes go."""

    kernels: dict[str, TunedKernel]
    table: Table | None = None
    device: str = ""
    """As the table's keys call the device at hand."""


BACKENDS: dict[str, Callable[[], TunedBackend]] = {
    "mosaic_gpu": lambda: TunedBackend(tune_mosaic_gpu.kernels()),
    "triton": lambda: TunedBackend(tune_triton.kernels(), tiles.TABLE, tiles.architecture()),
}


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a kernel could not be tuned at a shape, after the others."""
    parser = _options()
    options = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        parser.error(f"needs a GPU, the default device here is a {jax.default_backend()}")
    deadline = time.perf_counter() + options.time_budget
    available = BACKENDS[options.backend]()
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


def _narrowed(kernel: TunedKernel, fields: str | None) -> TunedKernel:
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
    parser.add_argument("--backend", default="mosaic_gpu", choices=tuple(BACKENDS))
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
