"""The four steps of the paper's Table 7, from a loop over tokens to group-aware tiles, and ours.

    python -m benchmarks.ablation [--steps flash-compatible,group-aware] [--smoke]

writes ablation.json and ablation.md into docs/benchmarks. Needs the `triton` extra; `--smoke` runs
a tiny shape, on a CPU in Triton's interpreter.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ablation_steps import STEPS, AblationStep, Arrays, flatten, unflatten
from benchmarks.attention import make_inputs, ours, with_gradients
from benchmarks.pages import folded
from benchmarks.shapes import SMOKE, TABLE_7, Shape
from benchmarks.timing import milliseconds

_NOTES = """\
One step after the other, as in the paper's §3.2 and Table 7 (arXiv 2603.15619): B=1, T=1024, K=8,
G=8, H=64, 64 depth slots. Milliseconds, medians, 16-bit operands, causal. *Error* is the largest
relative error (Frobenius) of o and the five gradients against float32. The paper's times are
forward and backward on an A100: compare the gains from step to step, not the times.

- *naive loop*: query token after query token, each gathers its slots. The loop is compiled by XLA
  and differentiated by JAX; the paper's is PyTorch's, which launches every operation from Python.
- *flash-compatible*: the slots of all tokens side by side on one axis of T·S keys, attended to by a
  flash kernel; a tile is 64 tokens of one query head and goes along the whole axis.
- *chunk-aware*: the tile reads the T·S axis only where its own 64 tokens' slots lie.
- *group-aware*: a tile is 64/G tokens times the G query heads of their key/value head. The two
  steps before it copy the slots once per query head, and add up the copies' gradients.
- *as shipped*: `moda_attention(implementation="triton")`, whose slots are one array each (the
  layout that layers append to), read in blocks of a tile's tokens.

The sequence part is the same kernel in all steps but the first.
"""


def run_steps(shape: Shape, names: list[str], dtype: Any) -> dict[str, dict[str, Any]]:
    """{step: milliseconds of a forward ("forward") and of forward and backward ("total"), error}.

    A step that fails has "error message" instead.
    """
    arrays, d_out = jax.tree.map(lambda x: x.astype(dtype), make_inputs(shape))
    expected = reference(arrays, d_out)
    inputs = {False: arrays, True: (*arrays[:3], *map(flatten, arrays[3:]))}
    results: dict[str, dict[str, Any]] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            name: [
                pool.submit(_compile, function, inputs[STEPS[name].flat], d_out)
                for function in (_without_gradients(STEPS[name]), STEPS[name].run)
            ]
            for name in names
        }
    for name in names:
        step, given = STEPS[name], inputs[STEPS[name].flat]
        try:
            forward, total = (job.result() for job in jobs[name])
            results[name] = {
                "error": worst_error(step, total(given, d_out), expected, shape),
                "forward": milliseconds(forward, given, d_out),
                "total": milliseconds(total, given, d_out),
            }
        except Exception as error:  # the other steps are still worth having
            results[name] = {"error message": f"{type(error).__name__}: {error}"[:200]}
        print(name, results[name], flush=True)
    return results


def _compile(function: Callable[..., Any], arrays: Arrays, d_out: jax.Array) -> Any:
    return jax.jit(function).lower(arrays, d_out).compile()


def _without_gradients(step: AblationStep) -> Callable[..., Any]:
    """The compiler drops the backward, which nothing depends on."""
    return lambda arrays, d_out: step.run(arrays, d_out)[0]


def reference(arrays: Arrays, d_out: jax.Array) -> list[np.ndarray]:
    """o and the gradients in float32, by `xla`."""
    with jax.default_matmul_precision("highest"):
        cast = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, d_out))
        out, grads = jax.jit(with_gradients(ours("xla")))(*cast)
    return [np.asarray(x) for x in (out, *grads)]


def worst_error(step: AblationStep, got: Any, expected: list[np.ndarray], shape: Shape) -> float:
    """The largest relative error of o and the gradients."""
    out, grads = got
    if step.flat:
        grads = (*grads[:3], *(unflatten(x, shape.slots) for x in grads[3:]))
    pairs = zip((out, *grads), expected, strict=True)
    return max(
        float(np.linalg.norm(np.asarray(x, np.float32) - y) / np.linalg.norm(y)) for x, y in pairs
    )


def table(results: dict[str, Any]) -> str:
    """Markdown: the measured times beside the paper's, each with its gain over the step before."""
    lines = [
        "| step | forward | forward + backward | gain | error | paper A100 | gain |",
        "|---|---|---|---|---|---|---|",
    ]
    before: dict[str, float] = {}
    for name, row in results["steps"].items():
        now = {"measured": row.get("total"), "paper": STEPS[name].paper}
        gains = {
            kind: f"{before[kind] / ms:.2f}" if ms and kind in before else ""
            for kind, ms in now.items()
        }
        cells = [
            name,
            _number(row.get("forward")),
            _number(now["measured"]),
            gains["measured"],
            f"{row['error']:.1e}" if "error" in row else row["error message"],
            _number(now["paper"]),
            gains["paper"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
        before |= {kind: ms for kind, ms in now.items() if ms}
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def page(results: dict[str, Any]) -> str:
    """The Markdown page: what came out, the table, and what the steps are."""
    steps = {name: row["total"] for name, row in results["steps"].items() if "total" in row}
    sentence = "No step was measured."
    if steps:
        slowest, fastest = max(steps, key=steps.__getitem__), min(steps, key=steps.__getitem__)
        sentence = (
            f"From *{slowest}* to *{fastest}*, forward and backward take "
            f"**{steps[slowest]:.4g} to {steps[fastest]:.4g} ms**, a factor of "
            f"{steps[slowest] / steps[fastest]:.0f}. The steps are those of the paper's §3.2, and "
            "what ships."
        )
    return (
        f"# From a loop to a kernel, {results['device']}\n\n{sentence}\n\n{table(results)}\n\n"
        f"`{results['command']}`; JAX {results['jax']}, shape {results['shape']}.\n\n"
        f"{folded('What the steps and columns are', _NOTES)}"
    )


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a step failed, after the others."""
    arguments = sys.argv[1:] if argv is None else argv
    options = _options(arguments)
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated
    # The interpreter multiplies no bfloat16.
    dtype = jnp.float16 if on_cpu else jnp.bfloat16
    shape = SMOKE if options.smoke else TABLE_7[0]
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.ablation", *arguments]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "shape": shape.name,
        "steps": run_steps(shape, options.steps, dtype),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    options.json.with_suffix(".md").write_text(page(results))
    return int(any("error message" in row for row in results["steps"].values()))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    split = functools.partial(str.split, sep=",")
    parser.add_argument("--steps", type=split, default=list(STEPS), help=", ".join(STEPS))
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, for a CPU")
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/ablation.json"))
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.steps if name not in STEPS]:
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, got {', '.join(unknown)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
