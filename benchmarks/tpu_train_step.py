"""Whole training steps compiled for TPU slices that are not here: memory, FLOPs and bytes per chip.

    pip install -e ".[tpu]"
    python -m benchmarks.tpu_train_step [--topologies v5e:4x4,v5p:4x4x4] [--attention mosaic_tpu]

Each config of `configs/` is compiled, ahead of time, for a mesh of fsdp x tensor over the slice's
chips: the real optimizer step (`moda_jax.train.train_step`). NAME/FIELD=VALUE+FIELD=VALUE is NAME
with other fields of its ModelConfig or ExecutionConfig, or with depth=MECHANISM. Nothing runs:
memory is what the compiler assigned, FLOPs and bytes are counted in the program that it made
(`benchmarks.hlo_cost`), those of the attention kernels in their own block schedule. Takes one to
two minutes per program.
"""

import argparse
import dataclasses
import importlib
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import hlo_cost, tpu_chips
from benchmarks.pages import folded
from benchmarks.tpu_chips import Chip
from benchmarks.tpu_kernels import mean_kernels
from moda_jax.config import DEPTH_CONFIGS, Config, ExecutionConfig, MeshConfig
from moda_jax.depth import make_mechanism
from moda_jax.model.flops import count_flops, count_parameters
from moda_jax.ops.sharding import batch_sharding, make_mesh
from moda_jax.train.train_step import make_train_functions
from pallas_kernels import platforms

_VANILLA = "/depth=residual"
CONFIGS = ("olmo2_700m_36", "moda_700m_row4", f"moda_1b5_guess{_VANILLA}", "moda_1b5_guess")
TOPOLOGIES = ("v5e:4x4", "v5p:4x4x4")
_SMOKE: dict[str, Any] = {
    "vocab_size": 256,
    "num_layers": 3,
    "embed_dim": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "mlp_dim": 256,
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled training step; bytes and FLOPs of one chip."""

    name: str
    topology: str
    data: int
    fsdp: int
    tensor: int
    rows: int
    """Over all chips."""
    seq_len: int
    attention: str
    parameters: int
    argument_bytes: int
    """State and batch; the state's new values take the place of the old ones."""
    temporary_bytes: int
    total_bytes: int
    hbm_bytes: float
    """Of the chip."""
    flops: float
    """Executed: recomputation and a kernel's masked entries count."""
    model_flops: float
    """`moda_jax.model.flops`: neither counts. Shared out evenly."""
    moved_bytes: float
    """HBM traffic."""
    collective_bytes: float
    """Results of collectives, about what arrives over the links."""
    kernels: dict[str, dict[str, float]]
    """Calls, and FLOPs and bytes of all of them, by kernel."""
    seconds: float
    """Roofline: each kernel's own; for the rest the larger of its FLOPs and its bytes at peak."""
    compile_seconds: float
    unknown_loops: int
    """Loops over a number of slots that the program's text does not tell: counted as the mean."""


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a program failed to compile, after the others have been tried."""
    args = _arguments().parse_args(argv)
    steps: list[Step] = []
    errors: dict[str, str] = {}
    for topology in args.topologies.split(","):
        for name in args.configs.split(","):
            try:
                steps.append(measure(name, topology, args))
                print(row(steps[-1], steps), flush=True)
                write(args, argv, steps, errors)
            except Exception as error:  # one program must not cost the others their numbers
                text = " ".join(str(error).split())
                errors[f"{name} on {topology}"] = f"{type(error).__name__}: {text[:300]}"
                print(f"{name} on {topology}: {text[:300]}", file=sys.stderr, flush=True)
    write(args, argv, steps, errors)
    return 1 if errors else 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.tpu_train_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--configs", default=",".join(CONFIGS), help="comma-separated")
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES), help="comma-separated")
    parser.add_argument("--data", type=int, default=1, help="replicas of the parameters")
    parser.add_argument("--tensor", type=int, default=2, help="chips that share the heads")
    parser.add_argument("--rows", type=int, default=4, help="rows of each group of such chips")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--attention", default="mosaic_tpu", help="implementation")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--hlo", type=Path, help="folder for the compiled programs' text")
    parser.add_argument("--largest", type=int, default=0, help="print the N costliest instructions")
    parser.add_argument("--smoke", action="store_true", help="tiny models")
    return parser


def adapt(name: str, chips: int, args: argparse.Namespace) -> Config:
    """The named config on `chips` chips, with the command line's settings."""
    base, _, fields = name.partition("/")
    config: Config = importlib.import_module(f"configs.{base}").config
    how: dict[str, Any] = {"attention": args.attention}
    what: dict[str, Any] = dict(_SMOKE) if args.smoke else {}
    execution_fields = {field.name for field in dataclasses.fields(ExecutionConfig)}
    for field, value in (pair.split("=") for pair in fields.split("+") if pair):
        if field == "depth":
            what[field] = DEPTH_CONFIGS[value]()
        else:
            changes = how if field in execution_fields else what
            changes[field] = int(value) if value.isdigit() else value
    model = dataclasses.replace(config.model, **what)
    fsdp, left = divmod(chips, args.data * args.tensor)
    if left:
        raise ValueError(
            f"data, tensor: expected divisors of {chips} chips, got {args.data}, {args.tensor}"
        )
    return dataclasses.replace(
        config,
        model=model,
        execution=dataclasses.replace(config.execution, **how),
        mesh=MeshConfig(args.data, fsdp, args.tensor),
        accumulation_steps=1,
        batch_size=args.rows * args.data * fsdp,
        data=dataclasses.replace(config.data, seq_len=args.seq_len),
    )


def compile_step(config: Config, devices: list[jax.Device]) -> Any:
    """The compiled `train_step` of `config` for `devices`, which need not be here."""
    mesh = make_mesh(config.mesh, devices)
    shape = config.batch_size, config.data.seq_len
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), rows)
    with jax.set_mesh(mesh), platforms.compiling_for("tpu"):
        functions = make_train_functions(config, mesh)
        train_step: Any = functions.train_step  # of jax.jit
        return train_step.lower(functions.abstract_state, batch).compile()


def measure(name: str, topology: str, args: argparse.Namespace) -> Step:
    """Compiles one training step and counts."""
    chip, devices = tpu_chips.chip_of(topology), tpu_chips.devices(topology)
    config = adapt(name, len(devices), args)
    started = time.perf_counter()
    compiled = compile_step(config, devices)
    compile_seconds = time.perf_counter() - started
    text = compiled.as_text()
    if args.hlo:
        args.hlo.mkdir(parents=True, exist_ok=True)
        file = re.sub(r"[^\w-]", "-", f"{name}-{topology}")
        (args.hlo / f"{file}.txt").write_text(text)
    slots = make_mechanism(config.model).visible_slots()
    kernels = mean_kernels(config, chip)
    cost = hlo_cost.count(
        text,
        unknown_trips=sum(slots) / len(slots),
        kernel=lambda call: kernels.get(str(hlo_cost.kernel_name(call))),
    )
    for by in ("bytes", "flops") if args.largest else ():
        print("\n".join(cost.lines(args.largest, by)))
    step = _step(config, topology, chip, compiled.memory_analysis(), cost, kernels, compile_seconds)
    return dataclasses.replace(step, name=name)


def _step(
    config: Config,
    topology: str,
    chip: Chip,
    memory: Any,
    cost: hlo_cost.Cost,
    kernels: dict[str, Any],
    compile_seconds: float,
) -> Step:
    chips = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    tokens = config.batch_size * config.data.seq_len
    calls = {
        name: {
            "calls": count,
            "flops": count * kernels[name].flops,
            "hbm_bytes": count * kernels[name].hbm_bytes,
            "seconds": count * kernels[name].seconds,
        }
        for name, count in cost.kernel_calls.items()
    }
    own = {
        key: sum(call[key] for call in calls.values()) for key in ("flops", "hbm_bytes", "seconds")
    }
    rest = max(
        (cost.flops - own["flops"]) / chip.mxu_flops,
        (cost.hbm_bytes - own["hbm_bytes"]) / chip.hbm_bandwidth,
    )
    return Step(
        name=config.name,
        topology=topology,
        data=config.mesh.data,
        fsdp=config.mesh.fsdp,
        tensor=config.mesh.tensor,
        rows=config.batch_size,
        seq_len=config.data.seq_len,
        attention=str(config.execution.attention),
        parameters=count_parameters(config.model).total,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        total_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        hbm_bytes=chip.hbm_bytes,
        flops=cost.flops,
        model_flops=tokens * count_flops(config.model, config.data.seq_len).train_per_token / chips,
        moved_bytes=cost.hbm_bytes,
        collective_bytes=cost.collective_bytes,
        kernels=calls,
        seconds=rest + own["seconds"],
        compile_seconds=compile_seconds,
        unknown_loops=len(cost.unknown_loops),
    )


HEADER = (
    "| config | slice | mesh | rows | arguments GiB | temporaries GiB | total GiB | of HBM | "
    "TFLOP | of model's | moved GB | links GB | roofline ms | of vanilla |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(step: Step, steps: list[Step]) -> str:
    """A line of the table under `HEADER`; `steps` may hold the vanilla twin."""
    twin = _twin(step, steps)
    ratio = "" if twin is None else f"{step.seconds / twin.seconds:.2f}"
    mesh = f"{step.data} x {step.fsdp} x {step.tensor}"
    return (
        f"| {step.name} | {step.topology} | {mesh} | {step.rows} | "
        f"{step.argument_bytes / 2**30:.2f} | {step.temporary_bytes / 2**30:.2f} | "
        f"{step.total_bytes / 2**30:.2f} | {step.total_bytes / step.hbm_bytes:.0%} | "
        f"{step.flops / 1e12:.1f} | {step.flops / step.model_flops:.2f} | "
        f"{step.moved_bytes / 1e9:.0f} | {step.collective_bytes / 1e9:.1f} | "
        f"{1e3 * step.seconds:.0f} | {ratio} |"
    )


def _twin(step: Step, steps: list[Step]) -> Step | None:
    """The vanilla model of the same layers on the same slice."""
    base = step.name.partition("/")[0]
    wanted = "olmo2_700m_36" if base.startswith("moda_700m") else base + _VANILLA
    found = (x for x in steps if (x.name, x.topology) == (wanted, step.topology) and x is not step)
    return next(found, None)


def write(
    args: argparse.Namespace, argv: list[str] | None, steps: list[Step], errors: dict[str, str]
) -> None:
    """OUTPUT.json has everything, OUTPUT.md the table and the command; nothing without OUTPUT."""
    if not args.output:
        return
    words = sys.argv[1:] if argv is None else argv
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.tpu_train_step", *words]),
        "jax": jax.__version__,
        "steps": [dataclasses.asdict(step) for step in steps],
        "errors": errors,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(_page(record, steps))


def _page(record: dict[str, Any], steps: list[Step]) -> str:
    """Markdown: what came out, the table, and what its columns mean."""
    sentences = []
    if steps:
        fullest = max(steps, key=lambda step: step.total_bytes / step.hbm_bytes)
        sentences.append(
            f"{len(steps)} of {len(steps) + len(record['errors'])} steps compile and fit; the "
            f"fullest, {fullest.name}, takes {fullest.total_bytes / fullest.hbm_bytes:.0%} of a "
            f"chip's memory on {fullest.topology}."
        )
    twins = [(step, twin) for step in steps if (twin := _twin(step, steps))]
    if ratios := [step.seconds / twin.seconds for step, twin in twins]:
        sentences.append(
            "By their roofline, a bound from below, steps with depth take "
            f"{min(ratios):.2f} to {max(ratios):.2f} times those of the same layers without."
        )
    failed = "".join(f"\n{name}: {error}\n" for name, error in record["errors"].items())
    table = "\n".join([HEADER, *(row(step, steps) for step in steps)])
    return (
        "# Training steps compiled for TPU slices\n\n**No TPU was at hand: nothing on this page "
        f"was timed.** {' '.join(sentences)}\n\n{table}\n{failed}\n`{record['command']}` (JAX "
        f"{record['jax']}).\n\n{folded('What the columns mean', _NOTES)}"
    )


_NOTES = """\
Every program was compiled ahead of time by libtpu, which refuses one that does not fit its chip;
rows of 4096 tokens unless the command says otherwise.

*Mesh* is data x fsdp x tensor. Per chip: *arguments* are parameters, Adam's moments and the batch,
*total* is what the step holds at its peak. *TFLOP* are executed, counted in the compiled program
with its loops and, for the attention kernels, in their block schedule; *of model's* divides them by
the FLOPs that the model's formula asks for (recomputation is the difference). *moved* is HBM
traffic, *links* what collectives deliver. *roofline* is the time of the kernels by their own
roofline plus, for the rest, the larger of FLOPs and bytes at the chip's peak: links, latencies and
imperfect overlap come on top, so it is a bound from below. *of vanilla* divides it by that of the
same layers without depth."""


if __name__ == "__main__":
    sys.exit(main())
