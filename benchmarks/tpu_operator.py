"""The attention operator compiled for TPU chips that are not here, beside splash attention.

    pip install -e ".[tpu]"
    python -m benchmarks.tpu_operator [--chips v5e,v5p,v6e] [--output docs/benchmarks/tpu_operator]

Forward, and forward with all gradients, compiled ahead of time: memory as the compiler assigned it,
FLOPs and bytes as it accounts for them, and HBM traffic as `benchmarks.hlo_cost` counts it, with
the kernels' own numbers. Layouts of arguments and results are the compiler's, as inside a model.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from benchmarks import hlo_cost, tpu_chips, tpu_splash
from benchmarks.pages import folded
from benchmarks.tpu_chips import CHIPS
from benchmarks.tpu_kernels import Call, Launch, launches
from benchmarks.tpu_roofline import ISSUE, SMOKE
from moda_jax import moda_attention
from pallas_kernels import platforms
from pallas_kernels.mosaic_tpu import common

VARIANTS = ("moda", "vanilla", "splash", "splash + depth")
PARTS = ("forward", "gradient")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One compiled program; bytes on its chip."""

    row: str
    chip: str
    variant: str
    part: str
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    reported_flops: float
    """By `cost_analysis()`: of a kernel what it declares, nothing where it declares nothing."""
    reported_bytes: float
    """By `cost_analysis()`: VMEM included; of a kernel without a declaration its operands."""
    moved_bytes: float
    """HBM traffic, kernels by their block schedule."""
    kernels: tuple[str, ...]
    seconds: float
    """Of the compilation."""


def functions(call: Call) -> dict[str, Callable[..., Any]]:
    """(query, key, value, depth_key, depth_value) -> o by variant; some do not read the slots."""

    def ours(*arrays):
        return moda_attention(*arrays, implementation="mosaic_tpu")

    return {
        "moda": ours,
        "vanilla": lambda query, key, value, *_: ours(query, key, value),
        "splash": lambda query, key, value, *_: tpu_splash.attend(call, query, key, value),
        "splash + depth": lambda *arrays: tpu_splash.merged(call, *arrays),
    }


def kernels_of(call: Call, variant: str) -> list[Launch]:
    """What the kernels of a variant move, by their schedules."""
    forward, backward = launches(call)
    plain = launches(dataclasses.replace(call, slots=0))
    splash = [*tpu_splash.launches(call), *tpu_splash.launches(call, residuals=False)]
    return {
        "moda": [*forward, *backward],
        "vanilla": [*plain[0], *plain[1]],
        "splash": splash,
        "splash + depth": [*splash, *tpu_splash.depth_alone(call)],
    }[variant]


def compile_call(call: Call, variant: str, part: str, device: jax.Device) -> Any:
    """The compiled program: arrays -> o, or (arrays, do) -> (o, gradients)."""
    function = functions(call)[variant]

    def forward(arrays, d_out):
        return function(*arrays)

    def gradient(arrays, d_out):
        out, pullback = jax.vjp(lambda used: function(*used, *arrays[len(used) :]), arrays[:used])
        return out, pullback(d_out)

    arrays = call.arrays()
    used = 5 if variant == "moda" else 3  # without gradients of what is not read
    layouts = Format(Layout.AUTO, SingleDeviceSharding(device))
    program = jax.jit(
        forward if part == "forward" else gradient, in_shardings=layouts, out_shardings=layouts
    )
    with platforms.compiling_for("tpu"):
        return program.lower(arrays, arrays[0]).compile()


def measure(row: str, call: Call, chip: str, variant: str, part: str) -> Compiled:
    """Compiles one program and counts."""
    device = tpu_chips.devices(CHIPS[chip].topology)[0]
    started = time.perf_counter()
    compiled = compile_call(call, variant, part, device)
    seconds = time.perf_counter() - started
    works = {kernel.name: kernel.work for kernel in kernels_of(call, variant)}

    def cost(instruction):
        work = works.get(str(hlo_cost.kernel_name(instruction)))
        if work is None:
            return None
        return hlo_cost.Kernel(work.mxu_flops, work.bytes_read + work.bytes_written)

    counted = hlo_cost.count(compiled.as_text(), kernel=cost)
    if unknown := set(counted.kernel_calls) - set(works):
        raise ValueError(f"{variant}: no schedule for the kernels {', '.join(sorted(unknown))}")
    memory, reported = compiled.memory_analysis(), compiled.cost_analysis()
    return Compiled(
        row,
        chip,
        variant,
        part,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        reported["flops"],
        reported["bytes accessed"],
        counted.hbm_bytes,
        tuple(counted.kernel_calls),
        seconds,
    )


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a program failed to compile, after the others have been tried."""
    args = _arguments().parse_args(argv)
    rows = SMOKE if args.smoke else {name: ISSUE[name] for name in args.rows.split(",")}
    results: list[Compiled] = []
    errors: dict[str, str] = {}
    for chip in args.chips.split(","):
        for row, call in rows.items():
            for variant, part in _programs(args.variants.split(",")):
                name = f"{row} {variant} {part} on {chip}"
                try:
                    results.append(measure(row, call, chip, variant, part))
                    print(_line(results[-1]), flush=True)
                except Exception as error:  # the others are still worth having
                    errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    print(f"{name}: {errors[name]}", file=sys.stderr, flush=True)
    if args.output and results:
        words = sys.argv[1:] if argv is None else argv
        command = shlex.join(["python", "-m", "benchmarks.tpu_operator", *words])
        _write(args.output, command, rows, results, errors)
    return 1 if errors else 0


def _programs(variants: list[str]) -> list[tuple[str, str]]:
    """Splash attention with its lse cannot be differentiated: forward alone."""
    return [
        (variant, part)
        for variant in variants
        for part in PARTS
        if (variant, part) != ("splash + depth", "gradient")
    ]


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.tpu_operator", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--chips", default=",".join(CHIPS), help="comma-separated")
    parser.add_argument("--rows", default=",".join(ISSUE), help="comma-separated")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--smoke", action="store_true", help="one tiny shape")
    return parser


HEADER = """\
| chip | row | program | part | arguments MB | results MB | temporaries MB | GFLOP reported | \
MB reported | MB moved | compiled in s |
|---|---|---|---|---|---|---|---|---|---|---|"""


def _line(result: Compiled) -> str:
    sizes = (result.argument_bytes, result.output_bytes, result.temporary_bytes)
    return (
        f"| {result.chip} | {result.row} | {result.variant} | {result.part} | "
        + " | ".join(f"{size / 1e6:.1f}" for size in sizes)
        + f" | {result.reported_flops / 1e9:.1f} | {result.reported_bytes / 1e6:.0f} | "
        f"{result.moved_bytes / 1e6:.0f} | {result.seconds:.0f} |"
    )


_NOTES = """\
All is bfloat16, causal, B = 1, N = 16, K = 8. *Moda* is `moda_attention`, *vanilla* the same
without slots, *splash* JAX's splash attention (blocks of 512), *splash + depth* its (o, lse) merged
with a depth-only call: forward alone, since JAX cannot differentiate the lse. *Gradient* is forward
and backward.

*Reported* is `cost_analysis()`: of a kernel it knows what the kernel declares; splash attention
declares nothing. *Moved* is HBM traffic, kernels by their block schedule; XLA may keep arrays in
VMEM between kernels, so the traffic of a kernel's operands is an upper bound at small sizes.
"""


def _write(
    output: Path,
    command: str,
    rows: dict[str, Call],
    results: list[Compiled],
    errors: dict[str, str],
) -> None:
    record = {
        "command": command,
        "jax": jax.__version__,
        "rows": {name: dataclasses.asdict(call) for name, call in rows.items()},
        "vmem": {name: _vmem(call) for name, call in rows.items()},
        "programs": [dataclasses.asdict(result) for result in results],
        "errors": errors,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    share = max(size for call in rows.values() for size in _vmem(call).values())
    output.with_suffix(".md").write_text(_page(record, results, share / common.VMEM_LIMIT))


def _page(record: dict[str, Any], results: list[Compiled], share: float) -> str:
    """Markdown; `share` is the largest part of its VMEM limit that a kernel's blocks take."""
    errors = record["errors"]
    temporary = max(
        (x.temporary_bytes for x in results if (x.variant, x.part) == ("moda", "forward")),
        default=0,
    )
    tables = [
        folded(
            f"{chip}: all programs",
            "\n".join([HEADER, *(_line(x) for x in results if x.chip == chip)]),
        )
        for chip in dict.fromkeys(x.chip for x in results)
    ]
    failed = "".join(f"\n{name}: {error}\n" for name, error in errors.items())
    return (
        "# The attention operator compiled for TPU\n\n**No TPU was at hand: programs were "
        f"compiled, not run.**\n\n{len(results)} of {len(results) + len(errors)} programs compile. "
        f"By the schedule a kernel's blocks take at most {share:.0%} of the VMEM that it allows "
        "itself. Beside its operands and results MoDA's forward needs at most "
        f"{temporary / 1e6:.1f} MB.\n\n`{record['command']}` (JAX {record['jax']}).\n\n"
        f"{folded('What the columns mean', _NOTES)}\n" + "\n".join(tables) + failed
    )


def _vmem(call: Call) -> dict[str, int]:
    """Bytes of VMEM by kernel, of `common.VMEM_LIMIT`; the compiler refuses a kernel over it."""
    from pallas_kernels.mosaic_tpu import schedule

    shape = schedule.CallShape(
        call.batch,
        call.tokens,
        call.tokens,
        call.kv_heads,
        call.heads // call.kv_heads,
        call.head_dim,
        2,
    )
    return schedule.vmem_need(shape, schedule.choose_tiles(shape))


if __name__ == "__main__":
    sys.exit(main())
