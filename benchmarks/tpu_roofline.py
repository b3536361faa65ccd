"""What the TPU kernels should take, from their own block schedule: a prediction to be checked.

    python -m benchmarks.tpu_roofline [--chips v5e,v5p,v6e] [--output docs/benchmarks/tpu_roofline]

Needs neither a TPU nor libtpu. Every kernel of a call is bounded by the slowest of the matrix unit,
the vector unit, the exponentials and the memory, each at its peak; kernels follow one another.
Beside MoDA stand the same kernels without depth slots and splash attention, the kernel of JAX.
"""

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks import tpu_splash
from benchmarks.pages import folded
from benchmarks.shapes import SHAPES
from benchmarks.tpu_chips import CHIPS, Chip
from benchmarks.tpu_kernels import Call, Launch, bound, launches, overlapped, roofline
from pallas_kernels.mosaic_tpu.schedule import Work

ISSUE = {
    f"T{tokens} S{slots} H{head_dim}": Call(tokens, slots, 16, 8, head_dim)
    for tokens in (4096, 16384)
    for slots in (36, 72)
    for head_dim in (64, 128)
}
"""The 700M model's heads, at two lengths, depths and head sizes."""
LAYERS = {
    name: Call(4096, 35, heads, kv_heads, 64, batch=4, segments=True, grads_dtype="float32")
    for name, heads, kv_heads in (("700M layer", 8, 4), ("1.5B layer", 12, 6))
}
"""One layer in training, the mean one of 36, on one chip of a tensor axis of 2 with 4 rows each."""
TABLE_2 = {
    name: Call(shape.tokens, shape.slots, shape.heads, shape.kv_heads, shape.head_dim)
    for name, shape in SHAPES.items()
    if name in ("T4K", "T16K", "T64K", "G2")
}
"""Rows of the paper's Table 2, as `benchmarks.attention` measures them on a GPU."""
ROWS = ISSUE | LAYERS | TABLE_2
SMOKE = {"smoke": Call(256, 3, 4, 2, 64)}


def variants(call: Call) -> dict[str, tuple[tuple[Launch, ...], tuple[Launch, ...]]]:
    """(forward, backward) kernels: without depth, with it, splash attention's two backwards."""
    splash, fused = tpu_splash.launches(call), tpu_splash.launches(call, fused=True)
    return {
        "vanilla": launches(dataclasses.replace(call, slots=0)),
        "moda": launches(call),
        "splash": (splash[:1], splash[1:]),
        "splash fused": (fused[:1], fused[1:]),
    }


def predict(call: Call, chip: Chip) -> dict[str, Any]:
    """Milliseconds by variant, MoDA's overhead over vanilla, and all kernels in numbers."""
    result: dict[str, Any] = {}
    for name, (forward, backward) in variants(call).items():
        first, both = (_ms(kernels, chip, call) for kernels in (forward, (*forward, *backward)))
        result[name] = {"forward": first, "total": both}
    for part in ("forward", "total"):
        ours = result["moda"][part]
        result[f"{part} overhead"] = ours / result["vanilla"][part] - 1
    forward, backward = launches(call)
    passes = [1e3 * overlapped(kernels, chip, call.head_dim) for kernels in (forward, backward)]
    for part, fused in (("forward", passes[0]), ("total", sum(passes))):
        result[f"{part} overhead, overlapped"] = fused / result["vanilla"][part] - 1
    result["depth"] = {
        "forward": _ms(_depth(forward), chip, call),
        "total": _ms(_depth((*forward, *backward)), chip, call),
    }
    result["kernels"] = {
        f"{name}: {kernel.name}": _numbers(kernel, chip, call)
        for name, (forward, backward) in variants(call).items()
        for kernel in _together((*forward, *backward))
    }
    return result


def _together(kernels: Iterable[Launch]) -> Iterator[Launch]:
    """Launches of the same kernel, one per span of queries, as one."""
    for name, same in itertools.groupby(kernels, key=lambda kernel: kernel.name):
        columns = zip(*(dataclasses.astuple(kernel.work) for kernel in same), strict=True)
        yield Launch(name, Work(*map(sum, columns)))


def _ms(kernels: Iterable[Launch], chip: Chip, call: Call) -> float:
    return 1e3 * bound(kernels, chip, call.head_dim)


def _depth(kernels: Iterable[Launch]) -> list[Launch]:
    return [kernel for kernel in kernels if "depth" in kernel.name]


def _numbers(kernel: Launch, chip: Chip, call: Call) -> dict[str, Any]:
    units = roofline(kernel.work, chip, call.head_dim)
    times = {f"{unit} ms": 1e3 * value for unit, value in dataclasses.asdict(units).items()}
    return dataclasses.asdict(kernel.work) | times | {"limit": units.limit}


def main(argv: list[str] | None = None) -> int:
    """Prints a table per chip; writes all files if asked."""
    args = _arguments().parse_args(argv)
    rows = SMOKE if args.smoke else ROWS
    predictions = {
        chip: {name: predict(call, CHIPS[chip]) for name, call in rows.items()}
        for chip in args.chips.split(",")
    }
    text = "\n".join(_chip_text(chip, rows, found) for chip, found in predictions.items())
    print(text)
    if args.output:
        words = sys.argv[1:] if argv is None else argv
        command = shlex.join(["python", "-m", "benchmarks.tpu_roofline", *words])
        _write(args.output, command, rows, predictions, text)
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.tpu_roofline", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--chips", default=",".join(CHIPS), help="comma-separated")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json, .md and .png")
    parser.add_argument("--smoke", action="store_true", help="one tiny shape")
    return parser


_TIMES = """\
| row | B | T | N | K | H | S | vanilla | MoDA | of it depth | overhead | overlapped | \
vanilla f+b | MoDA f+b | of it depth | overhead | overlapped | splash f+b |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""
_KERNELS = """\
| kernel | grid steps | of them work | GB read | GB written | MXU GFLOP | VPU Gop | exp G | \
MXU ms | VPU ms | exp ms | HBM ms | steps ms | limit |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""
_NOTES = """\
No TPU was at hand: all times are predictions, milliseconds, bfloat16, causal. *Vanilla* is this
project's kernels without depth slots, *f+b* forward and backward, *splash* the faster of splash
attention's two backwards (blocks of 512) by the same reckoning.

A kernel takes the largest of four times: products at the matrix unit's peak (a head smaller than
its array leaves the rest idle: half of 128 x 128 at H = 64, three quarters of v6e's 256 x 256),
vector operations, exponentials, and bytes at the memory's peak; kernels follow one another, each
reaches its peak, and all arrays come from HBM. *Overlapped* is the overhead that one kernel could
reach in which the depth part's memory traffic runs under the sequence part's products.

`moda_..._forward` and `..._backward` hand over what they fetch and compute from the schedule that
they run by; the numbers of splash attention follow from its block masks and index maps. *steps ms*
is 0.35 µs per grid step, mostly hidden, not in the prediction. In the rows *layer* the backward
adds into the float32 running gradient cache of a layer stack, elsewhere it writes its own.
"""


def summary(predictions: dict[str, dict[str, Any]]) -> str:
    """The page's first sentences: the smallest and the largest overhead of depth on each chip."""
    lines = []
    for chip, found in predictions.items():
        overhead = {name: result["total overhead"] for name, result in found.items()}
        least, most = (
            min(overhead, key=overhead.__getitem__),
            max(overhead, key=overhead.__getitem__),
        )
        ends = (f"**{overhead[name]:.0%}** ({name})" for name in (least, most))
        lines.append(f"- {chip}: from {' to '.join(ends)}")
    return (
        "How much longer attention with depth slots should take than the same kernels without "
        "them, forward and backward, predicted:\n\n" + "\n".join(lines)
    )


def plot(predictions: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars: the predicted overhead of depth, forward and backward, row by row and chip by chip."""
    names = list(next(iter(predictions.values())))
    figure = Figure(figsize=(2.5 + 0.5 * len(names), 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(predictions)
    for number, (chip, found) in enumerate(predictions.items()):
        where = [i + (number - (len(predictions) - 1) / 2) * width for i in range(len(names))]
        overhead = [100 * found[name]["total overhead"] for name in names]
        axes.bar(where, overhead, width=0.95 * width, label=chip)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
    axes.set(ylabel="predicted overhead, %", title="depth slots, forward and backward, bfloat16")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def _chip_text(chip: str, rows: dict[str, Call], found: dict[str, dict[str, Any]]) -> str:
    times = "\n".join([_TIMES, *(_row(name, rows[name], result) for name, result in found.items())])
    first = next(iter(found))
    kernels = "\n".join(
        [_KERNELS, *(_kernel_row(*item) for item in found[first]["kernels"].items())]
    )
    return (
        f"## {chip}\n\n{_peaks(CHIPS[chip])}\n\n{times}\n\n"
        f"{folded(f'The kernels of {first}', kernels)}"
    )


def _peaks(chip: Chip) -> str:
    return (
        f"{chip.mxu_flops / 1e12:.0f} TFLOP/s bfloat16, {chip.hbm_bandwidth / 1e9:.0f} GB/s, "
        f"vector unit {chip.vpu_ops / 1e12:.1f} Top/s (estimate)."
    )


def _row(name: str, call: Call, result: dict[str, Any]) -> str:
    splash = min(result["splash"]["total"], result["splash fused"]["total"])
    sizes = (call.batch, call.tokens, call.heads, call.kv_heads, call.head_dim, call.slots)
    cells = [name, *map(str, sizes)]
    for part in ("forward", "total"):
        cells += [
            f"{result['vanilla'][part]:.3f}",
            f"{result['moda'][part]:.3f}",
            f"{result['depth'][part]:.3f}",
            f"{result[f'{part} overhead']:.0%}",
            f"{max(result[f'{part} overhead, overlapped'], 0.0):.0%}",  # not -0%
        ]
    return "| " + " | ".join([*cells, f"{splash:.3f}"]) + " |"


def _kernel_row(name: str, numbers: dict[str, Any]) -> str:
    giga = [
        numbers[x] / 1e9 for x in ("bytes_read", "bytes_written", "mxu_flops", "vpu_ops", "exps")
    ]
    times = [numbers[f"{unit} ms"] for unit in ("mxu", "vpu", "exps", "hbm", "steps")]
    cells = [
        name,
        str(numbers["steps"]),
        str(numbers["pairs"]),
        *(f"{x:.3f}" for x in giga),
        *(f"{x:.3f}" for x in times),
        numbers["limit"],
    ]
    return "| " + " | ".join(cells) + " |"


def _write(
    output: Path, command: str, rows: dict[str, Call], predictions: dict[str, Any], text: str
) -> None:
    record = {
        "command": command,
        "jax": jax.__version__,
        "chips": {name: CHIPS[name]._asdict() for name in predictions},
        "rows": {name: dataclasses.asdict(call) for name, call in rows.items()},
        "kernels": {
            name: {
                f"{variant}: {kernel.name}": dataclasses.asdict(kernel.work)
                for variant, passes in variants(call).items()
                for kernel in _together((*passes[0], *passes[1]))
            }
            for name, call in rows.items()
        },
        "predictions": {
            chip: {row: {k: v for k, v in x.items() if k != "kernels"} for row, x in found.items()}
            for chip, found in predictions.items()
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    output.with_suffix(".md").write_text(
        "# Predicted times of the TPU kernels\n\n**No TPU was at hand: all times on this page are "
        f"predictions.**\n\n{summary(predictions)}\n\n"
        f"![Predicted overhead of depth slots]({output.with_suffix('.png').name})\n\n"
        f"`{command}` (JAX {jax.__version__}).\n\n"
        f"{folded('How times are predicted, and what the columns mean', _NOTES)}\n{text}"
    )
    plot(predictions, output.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
