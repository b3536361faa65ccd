"""Pages and pictures of what `benchmarks.attention` and `benchmarks.train_step` measured.

    python -m benchmarks.report [docs/benchmarks/attention.json]
    python -m benchmarks.report docs/benchmarks/train_step.json

writes attention.md and attention.png beside the file, of training steps train_step.png alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.pages import folded
from benchmarks.shapes import SHAPES, SMOKE, Shape

_HEADER = """\
| row | B | T | K | G | H | S | cuDNN | + XLA depth | ours | cuDNN / ours | floor | official | \
official / ours | paper A100 |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""

_NOTES = """\
A row is a shape: B rows of T tokens, K key/value heads with G query heads each, of size H, and S
depth slots. Milliseconds, medians, bfloat16, causal; ratios are of one process. *cuDNN* attends to
the sequence alone, *+ XLA depth* adds the depth part as two einsums and a merge.

*Floor* is the time that neither part can do without, with the rates measured in the same run: for
each pass the larger of its sequence products over the matrix rate and its bytes over the copy
rate. Bytes are the depth keys and values (read forward; read, and their gradients written,
backward) and the query-sized arrays (q, o; q, o, do, dq).

*Official* is the paper's Triton kernel on an H200, measured in another process (its backward with
the best of 32 tile settings: as published it does not compile there). *Paper A100* is its Table 2
(FlashAttention-2 → MoDA) or Table 7.
"""

_STEP_LABELS = {
    "olmo2_700m_36": "700M: plain",
    "moda_700m_row3": "700M: MoDA row 3\n(depth KV)",
    "moda_700m_row4": "700M: MoDA row 4\n(+ FFN KV)",
    "table6.row7": "71M: plain",
    "table6.row9": "71M: MoDA row 9\n(depth and FFN KV)",
}


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


def summary(results: dict[str, Any]) -> str:
    """The page's first sentences: the best and the worst row, and the largest error."""
    cudnn: dict[str, float] = {}
    official: dict[str, float] = {}
    for name, row in results["rows"].items():
        ours, plain = (row.get(variant, {}).get("total") for variant in ("ours", "cudnn"))
        if ours and plain:
            cudnn[name] = plain / ours
        if ours and (paper := _shape(name).official):
            official[name] = paper / ours
    sentences = []
    if cudnn:
        best, worst = max(cudnn, key=cudnn.__getitem__), min(cudnn, key=cudnn.__getitem__)
        sentences.append(
            "Attention with depth slots, forward and backward, runs at "
            f"**{cudnn[best]:.1%} of the speed of cuDNN's attention without them** in the best "
            f"row, {best} ({_in_words(_shape(best))}), and at {cudnn[worst]:.1%} in the worst, "
            f"{worst} ({_in_words(_shape(worst))})."
        )
    if official:
        best, worst = (
            max(official, key=official.__getitem__),
            min(official, key=official.__getitem__),
        )
        sentences.append(
            f"It is {official[worst]:.2f} ({worst}) to {official[best]:.2f} times ({best}) as fast "
            "as the paper's own kernel."
        )
    checks = [row["check"] for row in results["rows"].values() if "check" in row]
    if checks:
        ratio = max(check["worst ratio"] for check in checks)
        same = all(check["bitwise equal"] for check in checks)
        sentences.append(
            f"Its errors are at most {ratio:.2f} times those of `xla` in bfloat16; two runs "
            f"{'give' if same else 'do not always give'} the same bits."
        )
    return " ".join(sentences) or "No row was measured."


def _in_words(shape: Shape) -> str:
    return f"{shape.tokens} tokens, {shape.heads} query heads, {shape.slots} slots"


def write(path: Path) -> None:
    """Writes the .md and the .png beside the .json at `path`, of training steps the .png alone."""
    results = json.loads(path.read_text())
    if "runs" in results:
        plot_steps(results, path.with_suffix(".png"))
        return
    note = f"\n\n{results['note']}" if "note" in results else ""  # put there by hand
    implementation = results["implementation"]
    conditions = (
        f"Measured in the run: copy {results['copy TB/s']:.2f} TB/s, bfloat16 matrix product "
        f"{results['matmul TFLOP/s']:.0f} TFLOP/s. Implementation: {implementation}.{note}"
    )
    text = (
        f"# Attention on an {results['device']}: `{implementation.split()[0]}`\n\n"
        f"{summary(results)}\n\n"
        f"![Speed relative to cuDNN]({path.with_suffix('.png').name})\n\n"
        f"`{results['command']}`, then "
        f"`python -m benchmarks.report docs/benchmarks/{path.name}`; JAX {results['jax']}.\n\n"
        f"{folded('What the columns mean', _NOTES)}\n"
        f"{folded('How it was measured', conditions)}\n"
        f"## Forward and backward\n\n{table(results, 'total')}\n\n## Forward\n\n"
        f"{table(results, 'forward')}\n\n{other_tables(results)}"
    )
    path.with_suffix(".md").write_text(text.rstrip() + "\n")
    plot(results, path.with_suffix(".png"))


def plot_steps(results: dict[str, Any], path: Path) -> None:
    """Bars: tokens per second and memory of whole training steps, the newest run of each model."""
    newest: dict[str, dict[str, Any]] = {}
    for run in results["runs"]:  # the newest first
        for step in run["results"]:
            newest.setdefault(step["name"], step)
    steps = {name: newest[name] for name in _STEP_LABELS}
    plain = {"700M": steps["olmo2_700m_36"], "71M": steps["table6.row7"]}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for number, (name, step) in enumerate(steps.items()):
        base = plain[_STEP_LABELS[name].partition(":")[0]]
        ratio = step["tokens_per_second"] / base["tokens_per_second"]
        gib = step.get("compiled_gib") or step["compiled_bytes"] / 2**30
        color = "gray" if step is base else "tab:blue"
        bars = ((speed, ratio, f"{ratio:.1%}"), (memory, gib, f"{gib:.1f}"))
        for axes, height, label in bars:
            axes.bar(number, height, color=color)
            axes.annotate(label, (number, height), ha="center", va="bottom", fontsize=8)
    for axes in (speed, memory):
        axes.set_xticks(range(len(steps)), [_STEP_LABELS[name] for name in steps], fontsize=7)
        axes.tick_params(axis="x", rotation=30)
        axes.margins(y=0.12)
    speed.set(ylabel="tokens/s, of the plain model", title="speed of a training step")
    memory.set(ylabel="GiB by the compiler's account", title="memory of a training step")
    figure.suptitle(f"{results['device']}; 700M: 32 rows of 4096, 71M: 256 rows of 512", fontsize=9)
    figure.savefig(path, dpi=100)


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
