"""Training steps of whole models on one device: tokens per second, MFU and memory.

    python -m benchmarks.train_step [--configs olmo2_700m_36,moda_700m_row3,moda_700m_row4]
        [--batch-size 16] [--remat full] [--kernels 20] [--output docs/benchmarks/train_step]

Each config of `configs/` runs its real optimizer step (`moda_jax.train.train_step`) on random
tokens of Zipf's frequencies, one document a row, without data loading. Ratios are to the first
config, in the same process. Without `--batch-size` every config gets the largest batch that the
device's allocator can hold: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, JAX takes 0.75 of the memory
by itself.
"""

import argparse
import collections
import dataclasses
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moda_jax.config import Config, ExecutionConfig, MeshConfig
from moda_jax.model.execution import describe_execution
from moda_jax.model.flops import count_flops, count_parameters
from moda_jax.ops.sharding import batch_sharding, make_mesh
from moda_jax.train.throughput import peak_flops
from moda_jax.train.train_step import TrainFunctions, make_train_functions

CONFIGS = ("olmo2_700m_36", "moda_700m_row3", "moda_700m_row4")
_SMOKE: dict[str, Any] = {
    "vocab_size": 64,
    "num_layers": 3,
    "embed_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 48,
}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One config at one batch size; memory in bytes, None where the device does not say."""

    name: str
    batch_size: int
    seq_len: int
    parameters: int
    attention: str
    """The implementation that the step's attention picked."""
    execution: str
    """How the step was computed, and why."""
    step_ms: float
    tokens_per_second: float
    mfu: float | None
    """Model FLOPs over the device's peak; what remat computes again does not count."""
    compiled_bytes: int
    """The compiler's account: arguments, results and temporaries of a step."""
    peak_bytes: int | None
    """The allocator's peak so far in this process, other configs included."""


class _Compiled(NamedTuple):
    config: Config
    """With its batch size."""
    functions: TrainFunctions
    step: Any
    """The compiled `functions.train_step`."""


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a config failed, after the others have run."""
    args = _arguments().parse_args(argv)
    results: list[Measurement] = []
    errors: dict[str, str] = {}
    for name in args.configs.split(","):
        try:
            config = adapt(name, args)
            options = {"xla_gpu_enable_triton_gemm": True} if args.triton_products else None
            results.append(measure(config, args.batch_size, args.steps, args.kernels, options))
            print(row(results[-1], results[0]), flush=True)
        except Exception as error:  # one config must not cost the others their numbers
            errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{name}: {errors[name]}", file=sys.stderr, flush=True)
    if args.output and results:
        write(args, results, errors)
    return 1 if errors else 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.train_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--configs", default=",".join(CONFIGS), help="names, the first is 1.0")
    parser.add_argument("--batch-size", type=int, help="rows; left out: the largest that fits")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="timed ones, after two others")
    parser.add_argument("--remat", choices=("full", "save_attention", "save_products"))
    parser.add_argument(
        "--triton-products",
        action="store_true",
        help="let XLA take Triton's matrix products, without which the training loop compiles",
    )
    parser.add_argument("--attention", help="implementation; left out: the fastest")
    parser.add_argument("--slot-gradients", choices=("add", "gather"))
    parser.add_argument("--slot-gradient-block", type=int)
    parser.add_argument("--slot-gradient-dtype", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--kernels", type=int, default=0, help="print the N longest of one more step"
    )
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--smoke", action="store_true", help="tiny models, for a CPU")
    return parser


def adapt(name: str, args: argparse.Namespace) -> Config:
    """The named config on one device, with the command line's settings."""
    config: Config = importlib.import_module(f"configs.{name}").config
    settings = [field.name for field in dataclasses.fields(ExecutionConfig)]
    changes: dict[str, Any] = {key: getattr(args, key, None) for key in settings}
    changes = {key: value for key, value in changes.items() if value is not None}
    model = dataclasses.replace(config.model, **(_SMOKE if args.smoke else {}))
    execution = dataclasses.replace(config.execution, **changes)
    return dataclasses.replace(
        config,
        model=model,
        execution=execution,
        mesh=MeshConfig(),
        accumulation_steps=1,
        data=dataclasses.replace(config.data, seq_len=args.seq_len),
    )


def measure(
    config: Config,
    batch_size: int | None,
    steps: int,
    kernels: int = 0,
    options: dict[str, Any] | None = None,
) -> Measurement:
    """Compiles with XLA's `options`, finds the batch size if none is given, and times the step."""
    if batch_size is not None:
        return time_steps(_compile(config, batch_size, options), steps, kernels)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise ValueError("batch_size: expected a number, this device does not tell its memory")
    compiled: dict[int, _Compiled] = {}

    def needed(size: int) -> int:
        if size not in compiled:
            try:
                compiled[size] = _compile(config, size, options)
            except jax.errors.JaxRuntimeError as error:  # the compiler tries kernels out, too
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return limit + 1
        return step_bytes(compiled[size].step)

    size = largest_batch(needed, limit)
    while True:
        try:
            step = compiled.get(size) or _compile(config, size, options)
            return time_steps(step, steps, kernels)
        except jax.errors.JaxRuntimeError as error:  # fragmentation, or workspaces not accounted
            if "RESOURCE_EXHAUSTED" not in str(error) or size == 1:
                raise
            size -= 1


def largest_batch(needed: Callable[[int], int], limit: int) -> int:
    """Largest batch with needed(batch) <= limit, if `needed` is close to linear.

    Two sizes give a line; from where it meets the limit it steps to the border. A step of a large
    model takes long to compile, so few sizes are tried.

    Raises ValueError if not even one row fits.
    """
    one = needed(1)
    if one > limit:
        raise ValueError(f"batch_size: one row needs {one:,} bytes, {limit:,} are there")
    two = needed(2)
    size = 1 + (limit - one) // max(two - one, 1)
    while size > 1 and needed(size) > limit:
        size -= max(1, (needed(size) - limit) // max(two - one, 1))
    size = max(size, 1)
    while needed(size + 1) <= limit:
        size += 1
    return size


def step_bytes(compiled: Any) -> int:
    """Arguments, results that do not take an argument's place, and temporaries."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _compile(config: Config, batch_size: int, options: dict[str, Any] | None) -> _Compiled:
    config = dataclasses.replace(config, batch_size=batch_size)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    functions = make_train_functions(config, mesh)
    with jax.set_mesh(mesh):
        train_step: Any = functions.train_step  # of jax.jit
        lowered = train_step.lower(functions.abstract_state, _batch(config))
        step = lowered.compile(compiler_options=options)
    return _Compiled(config, functions, step)


def _batch(config: Config) -> Mapping[str, np.ndarray]:
    """Random tokens, as frequent as Zipf's law has words of text; every row is one document.

    How often tokens are equal decides what the embedding's gradient costs.
    """
    shape = config.batch_size, config.data.seq_len
    frequency = 1 / np.arange(1, config.model.vocab_size + 1)
    tokens, targets = np.random.default_rng(0).choice(
        config.model.vocab_size, (2, *shape), p=frequency / frequency.sum()
    ).astype(np.int32)  # fmt: skip
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    }


def time_steps(compiled: _Compiled, steps: int, kernels: int = 0) -> Measurement:
    """Median over single steps, each waited for; the model trains on meanwhile.

    Then prints the `kernels` longest kernels of one more step.
    """
    config, functions, step = compiled
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = functions.init()
        batch = jax.device_put(_batch(config), batch_sharding(mesh))
        seconds = []
        for _ in range(2 + steps):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
        if kernels:
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    jax.block_until_ready(step(state, batch))
                print(kernel_table(config.name, Path(folder), kernels), flush=True)
    if not np.isfinite(loss):
        raise ValueError(f"loss is {loss}: the step computes nonsense, its time means nothing")
    return _measurement(compiled, statistics.median(seconds[2:]))


def kernel_table(name: str, folder: Path, count: int) -> str:
    """Milliseconds and calls of the longest GPU kernels in a folder of `jax.profiler.trace`."""
    total: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for path in folder.glob("**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines if plane.name.startswith("/device:") else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    kernel = event.name.split("(")[0]
                    total[kernel] += event.duration_ns
                    calls[kernel] += 1
    if not total:
        return f"{name}: the profiler saw no kernels of a GPU"
    lines = [
        f"{ns / 1e6:10.2f} ms {calls[kernel]:6d}x {kernel}"
        for kernel, ns in total.most_common(count)
    ]
    return "\n".join([f"{name}: kernels take {sum(total.values()) / 1e6:.1f} ms", *lines])


def _measurement(compiled: _Compiled, seconds: float) -> Measurement:
    config, functions, step = compiled
    model, device = config.model, jax.devices()[0]
    resolved = functions.execution
    described = describe_execution(config, resolved)
    rate = config.batch_size * config.data.seq_len / seconds
    peak = peak_flops(device, resolved.execution.compute_dtype)
    flops = count_flops(model, config.data.seq_len).train_per_token
    return Measurement(
        name=config.name,
        batch_size=config.batch_size,
        seq_len=config.data.seq_len,
        parameters=count_parameters(model).total,
        attention=described["attention"].split()[0],
        execution=described["execution"],
        step_ms=1e3 * seconds,
        tokens_per_second=rate,
        mfu=None if peak is None else rate * flops / peak,
        compiled_bytes=step_bytes(step),
        peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
    )


HEADER = (
    "| config | rows | ms | tokens/s | of the first | MFU | compiled GiB | peak GiB | attention |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def row(result: Measurement, first: Measurement) -> str:
    """A line of the table under `HEADER`."""
    ratio = result.tokens_per_second / first.tokens_per_second
    mfu = "" if result.mfu is None else f"{result.mfu:.1%}"
    peak = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.1f}"
    return (
        f"| {result.name} | {result.batch_size} | {result.step_ms:.1f} | "
        f"{result.tokens_per_second:,.0f} | {ratio:.1%} | {mfu} | "
        f"{result.compiled_bytes / 2**30:.1f} | {peak} | {result.attention} |"
    )


def write(args: argparse.Namespace, results: list[Measurement], errors: dict[str, str]) -> None:
    """OUTPUT.json has everything, OUTPUT.md the table and the command."""
    options = {k: v for k, v in vars(args).items() if k != "output" and v not in (None, False)}
    command = "python -m benchmarks.train_step " + " ".join(
        f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}")
        for key, value in options.items()
    )
    record = {
        "command": command,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "results": [dataclasses.asdict(result) for result in results],
        "errors": errors,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [row(result, results[0]) for result in results]
    text = (
        f"# Training step, {record['device']}\n\n`{command}` (JAX {jax.__version__}); "
        f"{args.seq_len} tokens a row. The peak is the allocator's, of the process so far.\n\n"
        + "\n".join([HEADER, *lines, *(f"\n{name}: {error}" for name, error in errors.items())])
    )
    args.output.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
