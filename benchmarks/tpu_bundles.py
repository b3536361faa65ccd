"""Instruction bundles of the TPU attention kernels, ours and splash's: no TPU needed.

    python -m benchmarks.tpu_bundles [--chips v5e:2x2,v6e:2x2] [--head-dims 64,128]
        [--tiles k_step=512,...]

A TPU core issues one bundle a cycle, so a loop's bundles are the cycles that it takes when it never
waits for memory. They are read from the compiler's own listing of its final schedule, which libtpu
writes on request; its format is not documented and may change. Each number is for 512 x 512 scores
of one query head: a pair of blocks that needs no mask, or with splash, which has no such case, any.
"""

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moda_jax import moda_attention
from pallas_kernels import platforms
from pallas_kernels.mosaic_tpu import schedule

TOKENS, HEADS, KV_HEADS, BLOCK = 4096, 16, 8, 512
_REGION = re.compile(r"\s*0x([0-9a-f]+) (?:LB|PF|PB|LE|LH)")


@dataclasses.dataclass(frozen=True)
class Loop:
    """The longest stretch of code of a kernel without a branch: its pair of blocks."""

    bundles: float
    use: dict[str, float]
    """Share of the issue slots taken, by unit: MATMUL, VALU, XLU, EUP, VLOAD, VSTORE ..."""


def read_loop(folder: Path, kernel: str) -> Loop:
    """From the listing of the last schedule and of the units that each bundle uses.

    Raises:
      FileNotFoundError: no such kernel was compiled, or libtpu writes other files.
    """
    listings = sorted(folder.glob(f"*-{kernel}.*final_bundles.txt"))
    listings = [path for path in listings if "analysis" not in path.name]
    usage = sorted(folder.glob(f"*-{kernel}.*final_hlo-static-per-bundle-utilization.txt"))
    if not listings or not usage:
        raise FileNotFoundError(f"no schedule of {kernel} in what libtpu wrote")
    starts = [int(m[1], 16) for m in map(_REGION.match, listings[0].read_text().splitlines()) if m]
    lines = usage[0].read_text().splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = [int(n) for n in lines[2].split()]
    begin = lines.index("== UTILIZATION:") + 1
    rows = [[int(n) for n in line.split()] for line in lines[begin:] if line.strip()]
    ends = [*starts[1:], len(rows)]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    # Of two about equally long ones, the shorter has no mask.
    length = min(n for n in lengths if n > 0.8 * max(lengths))
    start = starts[lengths.index(length)]
    end = start + length
    total = [sum(column) for column in zip(*rows[start:end], strict=True)]
    use = {n: t / c / (end - start) for n, t, c in zip(names, total, capacity, strict=True)}
    return Loop(end - start, use)


def _shapes(head_dim: int, device: Any, *, heads_first: bool) -> list[jax.ShapeDtypeStruct]:
    sharding = jax.sharding.SingleDeviceSharding(device)
    sizes = [(HEADS, TOKENS), (KV_HEADS, TOKENS), (KV_HEADS, TOKENS)]
    shapes = [pair if heads_first else (1, *pair[::-1]) for pair in sizes]
    return [
        jax.ShapeDtypeStruct((*shape, head_dim), jnp.bfloat16, sharding=sharding)
        for shape in shapes
    ]


def _gradient(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(*arrays):
        out, pullback = jax.vjp(attend, *arrays)
        return out, pullback(out)

    return run


def compile_ours(head_dim: int, device: Any) -> dict[str, tuple[str, float]]:
    """Kernel names, with how many times their pair of blocks fits into 512 x 512 scores."""
    shapes = _shapes(head_dim, device, heads_first=False)
    with platforms.compiling_for("tpu"):
        jax.jit(_gradient(moda_attention)).lower(*shapes).compile()
    shape = schedule.CallShape(1, TOKENS, TOKENS, KV_HEADS, HEADS // KV_HEADS, head_dim, itemsize=2)
    tiles = schedule.choose_tiles(shape)
    return {
        "forward": ("moda_tokens_forward", BLOCK**2 / (tiles.q_block * tiles.k_block)),
        "backward": ("moda_tokens_backward", BLOCK**2 / (tiles.q_grad_block * tiles.k_grad_block)),
    }


def compile_splash(head_dim: int, device: Any) -> dict[str, tuple[str, float]]:
    """With blocks of 512 and the fused backward, its fastest."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    sizes = splash_attention_kernel.BlockSizes(
        block_q=BLOCK,
        block_kv=BLOCK,
        block_kv_compute=BLOCK,
        block_q_dkv=BLOCK,
        block_kv_dkv=BLOCK,
        block_kv_dkv_compute=BLOCK,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((TOKENS, TOKENS))] * HEADS
    )
    attend = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes)
    shapes = _shapes(head_dim, device, heads_first=True)
    jax.jit(_gradient(attend)).lower(*shapes).compile()
    return {
        "forward": ("splash_mha_fwd_residuals", 1.0),
        "backward": ("splash_mha_dkv_no_residuals", 1.0),
    }


def table(rows: list[tuple[str, str, int, str, Loop]]) -> str:
    """Markdown; one line per chip, kernel and head size."""
    lines = [
        "| chip | kernel | H | pass | bundles | MXU | vector | exchange | load | store |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    units = ("MATMUL", "VALU", "XLU", "VLOAD", "VSTORE")
    for chip, kernel, head_dim, direction, loop in rows:
        shares = " | ".join(f"{loop.use[unit]:.0%}" for unit in units)
        lines.append(
            f"| {chip} | {kernel} | {head_dim} | {direction} | {loop.bundles:.0f} | {shares} |"
        )
    return "\n".join(lines)


def measure(chip: str, head_dim: int, dumps: Path) -> list[tuple[str, str, int, str, Loop]]:
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    rows = []
    for name, compile_kernels in (("mosaic_tpu", compile_ours), ("splash", compile_splash)):
        for path in dumps.iterdir():
            path.unlink()
        for direction, (kernel, pairs) in compile_kernels(head_dim, device).items():
            loop = read_loop(dumps, kernel)
            loop = dataclasses.replace(loop, bundles=loop.bundles * pairs)
            rows.append((chip.split(":")[0], name, head_dim, direction, loop))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 1 if the compiler's listings are not there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", default="v5e:2x2,v6e:2x2", help="topologies, with commas")
    parser.add_argument("--head-dims", default="64,128", help="head sizes, with commas")
    parser.add_argument("--tiles", default="", help="sizes of our tiles: field=tokens, with commas")
    args = parser.parse_args(argv)
    pairs = (item.split("=") for item in args.tiles.split(",") if item)
    sizes = {field: int(size) for field, size in pairs}
    rows = []
    with tempfile.TemporaryDirectory() as folder, schedule.override(**sizes):
        # libtpu reads them once, when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        try:
            for chip in args.chips.split(","):
                for head_dim in map(int, args.head_dims.split(",")):
                    rows += measure(chip, head_dim, Path(folder))
        except FileNotFoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
