"""The table and the picture of what `benchmarks.attention` measured.

    python -m benchmarks.report [docs/benchmarks/attention.json]

writes attention.md and attention.png beside the file.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.shapes import SHAPES, SMOKE, Shape

_HEADER = """\
| row | B | T | K | G | H | S | cuDNN | + XLA depth | ours | cuDNN / ours | floor | official | \
official / ours | paper A100 |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""

_NOTES = """\
Milliseconds, medians, bfloat16, causal; ratios are of one process. *cuDNN* attends to the sequence
alone, *+ XLA depth* adds the depth part as two einsums and a merge.

*Floor* is the time that neither part can do without, with the rates measured in the same run: for
each pass the larger of its sequence products over the matrix rate and its bytes over the copy
rate. Bytes are the depth keys and values (read forward; read, and their gradients written,
backward) and the query-sized arrays (q, o; q, o, do, dq).

*Official* is the paper's Triton kernel on an H200, measured in another process (its backward with
the best of 32 tile settings: as published it does not compile there). *Paper A100* is its Table 2
(FlashAttention-2 → MoDA) or Table 7.
"""


def floor_ms(shape: Shape, copy_rate: float, matrix_rate: float, *, backward: bool) -> float:
    """Roofline of a forward, or of forward and backward, in milliseconds.

    Args:
        shape: of the call.
        copy_rate: TB/s.
        matrix_rate: TFLOP/s.
        backward: add the backward's.
    """
    queries = 2 * shape.batch * shape.tokens * shape.heads * shape.head_dim
    flops = shape.sequence_flops(backward=False)
    passes = [(flops, shape.depth_bytes + 2 * queries)]
    if backward:
        all_flops = shape.sequence_flops(backward=True)
        passes.append((all_flops - flops, 2 * shape.depth_bytes + 4 * queries))
    return sum(max(f / matrix_rate, b / copy_rate) / 1e9 for f, b in passes)


def table(results: dict[str, Any], part: str) -> str:
    """Markdown, one line per row; `part` is "forward" or "total" (forward and backward)."""
    lines = [_HEADER]
    for name, row in results["rows"].items():
        lines.append(_table_line(_shape(name), row, part, results))
    return "\n".join(lines)


def _table_line(shape: Shape, row: dict[str, Any], part: str, results: dict[str, Any]) -> str:
    cudnn, merged, ours = (
        row.get(name, {}).get(part) for name in ("cudnn", "cudnn + XLA depth", "ours")
    )
    backward = part == "total"
    floor = floor_ms(shape, results["copy TB/s"], results["matmul TFLOP/s"], backward=backward)
    official = shape.official if backward else shape.official_forward
    paper = ""
    if backward and shape.paper is not None:
        paper = " → ".join(f"{x:g}" for x in shape.paper if x is not None)
    sizes = (shape.batch, shape.tokens, shape.kv_heads, shape.group, shape.head_dim, shape.slots)
    cells = [
        shape.name,
        *map(str, sizes),
        _ms(cudnn),
        _ms(merged),
        _ms(ours),
        f"{cudnn / ours:.1%}" if cudnn and ours else "",
        _ms(floor),
        _ms(official),
        f"{official / ours:.2f}" if official and ours else "",
        paper,
    ]
    return "| " + " | ".join(cells) + " |"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _shape(name: str) -> Shape:
    return SMOKE if name == SMOKE.name else SHAPES[name]


def other_tables(results: dict[str, Any]) -> str:
    """The depth part alone against the copy rate, and the errors, where they were measured."""
    copy = results["copy TB/s"]
    depth = [
        f"| {name} | "
        + " | ".join(
            f"{row['depth alone'][f'{part} TB/s']:.2f} | "
            f"{row['depth alone'][f'{part} TB/s'] / copy:.0%}"
            for part in ("forward", "backward")
        )
        + " |"
        for name, row in results["rows"].items()
        if "forward TB/s" in row.get("depth alone", {})
    ]
    errors = [
        f"| {name} | {max(row['check']['error'].values()):.2e} | "
        f"{row['check']['worst ratio']:.2f} | {row['check']['bitwise equal']} |"
        for name, row in results["rows"].items()
        if "check" in row
    ]
    failures = [
        f"- {name}, {where}: {error}"
        for name, row in results["rows"].items()
        for where, error in _errors(row)
    ]
    parts = []
    if depth:
        parts += [
            "## The depth part alone",
            "",
            "| row | forward TB/s | of copy | backward TB/s | of copy |\n|---|---|---|---|---|",
            *depth,
            "",
        ]
    if errors:
        parts += [
            "## Errors",
            "",
            "Relative to float32, the largest over o and all gradients; the "
            "largest ratio to the error of `xla` in bfloat16; whether two runs gave the same "
            "bits.",
            "",
            "| row | error | ratio | same bits |\n|---|---|---|---|",
            *errors,
            "",
        ]
    if failures:
        parts += ["## What failed", "", *failures, ""]
    return "\n".join(parts)


def _errors(row: dict[str, Any]) -> list[tuple[str, str]]:
    if "error" in row:
        return [("all", row["error"])]
    return [
        (name, part["error"])
        for name, part in row.items()
        if name != "check" and isinstance(part, dict) and "error" in part
    ]


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars: speed relative to cuDNN's plain attention, forward and backward, row by row."""
    names = [n for n, row in results["rows"].items() if "total" in row.get("cudnn", {})]
    figure = Figure(figsize=(2.5 + 0.6 * max(len(names), 4), 5), layout="constrained")
    axes = figure.subplots()
    series = {
        label: points
        for variant, label in (("ours", "ours"), ("cudnn + XLA depth", "cuDNN + XLA depth"))
        if (points := _speeds(results, names, variant))
    }
    for number, (label, points) in enumerate(series.items()):
        offset = 0.4 * number - 0.2 * (len(series) - 1)  # centred, one or two bars a row
        where, speed = zip(*points, strict=True)
        axes.bar([i + offset for i in where], speed, width=0.38, label=label)
    official = [
        (i, results["rows"][name]["cudnn"]["total"] / shape_ms)
        for i, name in enumerate(names)
        if (shape_ms := _shape(name).official) is not None
    ]
    if official:
        label = "official Triton kernel (another process)"
        axes.plot(*zip(*official, strict=True), "k_", markersize=14, label=label)
    axes.axhline(1.0, color="gray", linewidth=0.8)
    rows = [_row_label(_shape(name)) for name in names]
    axes.set_xticks(range(len(names)), rows, rotation=90, fontsize=8)
    axes.set(
        xlabel="queries B × T × N × H; K key/value heads; S depth slots; all bfloat16",
        ylabel="speed of cuDNN's plain attention",
        title=f"forward and backward, bfloat16, {results['device']}",
    )
    if names:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)


def _row_label(shape: Shape) -> str:
    queries = f"{shape.batch} × {shape.tokens} × {shape.heads} × {shape.head_dim}"
    return f"{shape.name}: {queries}\nK {shape.kv_heads}, S {shape.slots}, bf16"


def _speeds(results: dict[str, Any], names: list[str], variant: str) -> list[tuple[int, float]]:
    """(index of the row, speed relative to cuDNN) where the variant was measured."""
    rows = [results["rows"][name] for name in names]
    return [
        (i, row["cudnn"]["total"] / row[variant]["total"])
        for i, row in enumerate(rows)
        if "total" in row.get(variant, {})
    ]


def write(path: Path) -> None:
    """Writes the .md and the .png beside the .json at `path`."""
    results = json.loads(path.read_text())
    note = f"{results['note']}\n\n" if "note" in results else ""  # put there by hand
    text = (
        f"# Attention, {results['device']}\n\n"
        f"`{results['command']}`, then "
        f"`python -m benchmarks.report docs/benchmarks/{path.name}`; JAX {results['jax']}. "
        f"Measured in the run: copy {results['copy TB/s']:.2f} TB/s, bfloat16 matrix product "
        f"{results['matmul TFLOP/s']:.0f} TFLOP/s. Implementation: {results['implementation']}.\n\n"
        f"{note}{_NOTES}\n## Forward and backward\n\n{table(results, 'total')}\n\n## Forward\n\n"
        f"{table(results, 'forward')}\n\n{other_tables(results)}"
        f"![Speed relative to cuDNN]({path.with_suffix('.png').name})\n"
    )
    path.with_suffix(".md").write_text(text)
    plot(results, path.with_suffix(".png"))


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    path = Path(arguments[0] if arguments else "docs/benchmarks/attention.json")
    if not path.is_file():
        print(
            f"error: {path} is missing: python -m benchmarks.attention writes it", file=sys.stderr
        )
        return 2
    write(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
