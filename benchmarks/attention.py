"""Attention with and without depth: cuDNN alone, cuDNN and a depth part in XLA, and this operator.

    python -m benchmarks.attention [--rows T16K,B8] [--implementation mosaic_gpu] [--check]

Everything is timed in one process on the same inputs. Options are argparse's: the machines that
have the GPU do not always have the training loop's packages.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import SHAPES, SMOKE, Shape
from benchmarks.timing import copy_bandwidth, matmul_rate, milliseconds
from moda_jax import explain_attention, moda_attention

Arrays = tuple[jax.Array, ...]

ROWS_AT_ONCE = 4
"""Compiled side by side, then measured: compiling takes longer than measuring, and rows are to be
had before the time budget is spent."""


def make_inputs(shape: Shape, seed: int = 0) -> tuple[Arrays, jax.Array]:
    """((query, key, value, depth_key, depth_value), do): bfloat16, normal."""
    batch, length, head_dim = shape.batch, shape.tokens, shape.head_dim
    kv = (batch, length, shape.kv_heads, head_dim)
    sizes = [(batch, length, shape.heads, head_dim), kv, kv, *[(shape.slots, *kv)] * 2]
    keys = jax.random.split(jax.random.key(seed), 6)

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key, size):
        return jax.random.normal(key, size, jnp.bfloat16)

    return tuple(map(normal, keys, sizes)), normal(keys[5], sizes[0])


def _library() -> Any:
    return "cudnn" if jax.default_backend() == "gpu" else "xla"


def plain(query, key, value, depth_key, depth_value):
    """Causal attention over the sequence alone: cuDNN's on a GPU."""
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=_library()
    )


def with_xla_depth(query, key, value, depth_key, depth_value):
    """What a user would write: attention and its lse, two einsums over the slots, a merge."""
    out, lse = jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=_library(), return_residual=True
    )
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum(
        "btkgh,sbtkh->btkgs", grouped, depth_key, preferred_element_type=jnp.float32
    ) / np.sqrt(head_dim)
    sequence = lse.astype(jnp.float32).reshape(*scores.shape[:-1], 1)
    weights = jax.nn.softmax(jnp.concatenate([sequence, scores], axis=-1), axis=-1)
    depth = jnp.einsum("btkgs,sbtkh->btkgh", weights[..., 1:].astype(query.dtype), depth_value)
    return weights[..., 0].reshape(*out.shape[:3], 1).astype(out.dtype) * out + depth.reshape(
        out.shape
    )


def ours(implementation: str | None) -> Callable[..., jax.Array]:
    return functools.partial(moda_attention, implementation=implementation)


def with_gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(arrays, do) -> (o, gradients); what `function` does not use gets no gradient."""

    def run(arrays: Arrays, d_out: jax.Array) -> Any:
        used = 3 if function is plain else len(arrays)
        rest = arrays[used:]
        out, pullback = jax.vjp(lambda *first: function(*first, *rest), *arrays[:used])
        return out, pullback(d_out)

    return run


def depth_alone(implementation: str | None) -> Callable[..., jax.Array]:
    def attend(query, depth_key, depth_value):
        return moda_attention(
            query, None, None, depth_key, depth_value, implementation=implementation
        )

    return attend


def programs(shape: Shape, variants: list[str], implementation: str | None) -> dict[str, Any]:
    """What is to be timed: (lowered program, which of the five arrays it takes) by name."""
    specs, d_out = jax.eval_shape(lambda: make_inputs(shape))
    functions = {
        "cudnn": plain,
        "cudnn + XLA depth": with_xla_depth,
        "ours": ours(implementation),
        "depth alone": depth_alone(implementation),
    }
    lowered: dict[str, Any] = {}
    for name in variants:
        taken = (0, 3, 4) if name == "depth alone" else (0, 1, 2, 3, 4)
        arrays = tuple(specs[i] for i in taken)
        forward = lambda arrays, d_out, f=functions[name]: f(*arrays)  # noqa: E731
        for part, function in (("forward", forward), ("total", with_gradients(functions[name]))):
            lowered[f"{name}/{part}"] = jax.jit(function).lower(arrays, d_out), taken
    return lowered


def check_programs(shape: Shape, implementation: str | None) -> dict[str, Any]:
    """What `check` runs: (lowered program, its arrays' dtype) by name."""
    specs = jax.eval_shape(lambda: make_inputs(_reduced(shape)))
    lowered: dict[str, Any] = {}
    for name, chosen, dtype in (
        ("ours", implementation, jnp.bfloat16),
        ("xla", "xla", jnp.bfloat16),
        ("reference", "xla", jnp.float32),
    ):
        cast = jax.tree.map(lambda x, dtype=dtype: jax.ShapeDtypeStruct(x.shape, dtype), specs)
        with jax.default_matmul_precision("highest"):
            lowered[f"check/{name}"] = jax.jit(with_gradients(ours(chosen))).lower(*cast), dtype
    return lowered


def compile_all(
    shapes: list[Shape], variants: list[str], implementation: str | None, *, checks: bool = False
) -> dict[str, Any]:
    """{shape/variant/part: (program or error, arrays it takes)}, compiled side by side.

    With `checks` also {shape/check/name: (program or error, dtype)}.
    """
    jobs: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for shape in shapes:
            found = programs(shape, variants, implementation)
            found |= check_programs(shape, implementation) if checks else {}
            for name, (lowered, taken) in found.items():
                jobs[f"{shape.name}/{name}"] = pool.submit(lowered.compile), taken
    return {name: (job.exception() or job.result(), taken) for name, (job, taken) in jobs.items()}


def measure(shape: Shape, variants: list[str], compiled: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds by variant: forward, and forward and backward."""
    arrays, d_out = make_inputs(shape)
    row: dict[str, Any] = {}
    for name in variants:
        row[name] = {}
        for part in ("forward", "total"):
            program, taken = compiled[f"{shape.name}/{name}/{part}"]
            try:
                if isinstance(program, BaseException):
                    raise program
                row[name][part] = milliseconds(program, tuple(arrays[i] for i in taken), d_out)
            except Exception as error:  # out of memory must not lose the other variants
                row[name]["error"] = _line(error)
    _add_rates(shape, row)
    return row


def _add_rates(shape: Shape, row: dict[str, Any]) -> None:
    """TFLOP/s of the sequence part for whole calls; TB/s of what the depth part alone must move."""
    for name, times in row.items():
        if "error" in times:
            continue
        backward = times["total"] - times["forward"]
        if name == "depth alone":
            rows = 2 * shape.batch * shape.tokens * shape.heads * shape.head_dim
            times["forward TB/s"] = (shape.depth_bytes + 2 * rows) / times["forward"] / 1e9
            times["backward TB/s"] = (2 * shape.depth_bytes + 4 * rows) / backward / 1e9
        else:
            for part, both in (("forward", False), ("total", True)):
                flops = shape.sequence_flops(backward=both)
                times[f"{part} TFLOP/s"] = flops / times[part] / 1e9
    if "total" in row.get("cudnn", {}) and "total" in row.get("ours", {}):
        row["speed of cudnn"] = {
            part: row["cudnn"][part] / row["ours"][part] for part in ("forward", "total")
        }


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def _reduced(shape: Shape) -> Shape:
    """One key/value head and two rows at most: a reference for all of them would take minutes."""
    return shape._replace(kv_heads=1, batch=min(shape.batch, 2))


def check(shape: Shape, compiled: dict[str, Any]) -> dict[str, Any]:
    """Relative errors (Frobenius) to float32 of ours and of xla in bfloat16; repeatability."""
    arrays, d_out = make_inputs(_reduced(shape), seed=int(time.time()))
    names = ("o", "dq", "dk", "dv", "dkd", "dvd")

    def run(name: str) -> list[np.ndarray]:
        program, dtype = compiled[f"{shape.name}/check/{name}"]
        if isinstance(program, BaseException):
            raise program
        out, grads = program(tuple(x.astype(dtype) for x in arrays), d_out.astype(dtype))
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    reference, baseline, mine, again = map(run, ("reference", "xla", "ours", "ours"))

    def errors(results):
        return [
            float(np.linalg.norm(x - y) / np.linalg.norm(y))
            for x, y in zip(results, reference, strict=True)
        ]

    own, base = errors(mine), errors(baseline)
    return {
        "error": dict(zip(names, own, strict=True)),
        "xla bfloat16": dict(zip(names, base, strict=True)),
        "worst ratio": max(a / b for a, b in zip(own, base, strict=True)),
        "bitwise equal": all(np.array_equal(x, y) for x, y in zip(mine, again, strict=True)),
    }


def main() -> int:
    options = _options()
    shapes = [SMOKE] if options.smoke else [SHAPES[name] for name in options.rows]
    started = time.perf_counter()
    peaks = (2**20, 128) if options.smoke else (2**32, 8192)
    first = shapes[0]
    spec = [
        jax.ShapeDtypeStruct(x.shape, x.dtype)
        for x in jax.eval_shape(lambda: make_inputs(first))[0]
    ]
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.attention", *sys.argv[1:]]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "implementation": str(explain_attention(*spec, implementation=options.implementation)),
        "copy TB/s": copy_bandwidth(peaks[0]),
        "matmul TFLOP/s": matmul_rate(peaks[1]),
        "rows": {},
    }
    print({k: v for k, v in results.items() if k != "rows"}, flush=True)
    failed = False
    compiled: dict[str, Any] = {}
    for number, shape in enumerate(shapes):
        row: dict[str, Any] = {"error": "not measured, the time budget is spent"}
        try:
            if time.perf_counter() - started < options.time_budget:
                if number % ROWS_AT_ONCE == 0:
                    rows = shapes[number : number + ROWS_AT_ONCE]
                    compiled = compile_all(
                        rows, options.variants, options.implementation, checks=options.check
                    )
                    print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
                row = measure(shape, options.variants, compiled)
                if options.check:
                    row["check"] = check(shape, compiled)
        except Exception as error:  # the other rows are still worth having
            row = {"error": _line(error)}
        failed |= "error" in row or any("error" in row.get(name, {}) for name in options.variants)
        results["rows"][shape.name] = row
        print(shape.name, _short(row), flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


def _short(row: dict[str, Any]) -> str:
    def rounded(x):
        if isinstance(x, dict):
            return {name: rounded(y) for name, y in x.items()}
        return float(f"{x:.4g}") if isinstance(x, float) else x

    return json.dumps(rounded(row))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("cudnn", "cudnn + XLA depth", "ours", "depth alone")
    split = functools.partial(str.split, sep=",")
    add = parser.add_argument
    add("--rows", type=split, default=list(SHAPES), help="names, comma-separated")
    add("--variants", type=split, default=list(names), help=", ".join(names))
    add("--implementation", help="of moda_attention; by default it picks")
    add("--check", action="store_true", help="also compare with float32")
    add("--smoke", action="store_true", help="one tiny shape, for a CPU")
    add("--time-budget", type=float, default=600.0, help="seconds; no row begins later")
    add("--json", type=Path, default=Path("docs/benchmarks/attention.json"))
    options = parser.parse_args()
    for name, known in (("rows", SHAPES), ("variants", names)):
        if unknown := [x for x in getattr(options, name) if x not in known]:
            parser.error(f"--{name}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
