"""Compiles the Triton kernels of real calls for GPUs that are not here, and prints what they take.

    python tests/compile_triton.py sm_80 [--heads 128x4] [--dtype float32]

One JSON object a line: kernel, shared memory in bytes, registers, spilled bytes. A process of its
own, because a kernel is either compiled or interpreted from the moment it is decorated.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TRITON_INTERPRET"] = "0"

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels import platforms
from pallas_kernels.operands import Operands, Options
from pallas_kernels.triton_gpu import operator, tiles

TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32"}


class Call(NamedTuple):
    """What jax-triton would have been asked for."""

    kernel: Any
    arrays: list[Any]
    options: dict[str, int]
    constants: dict[str, Any]


def record_calls() -> list[Call]:
    """From here on kernels are not launched but put on the list."""
    calls: list[Call] = []

    def triton_call(
        *inputs,
        kernel,
        out_shape,
        grid,
        num_warps,
        num_stages,
        input_output_aliases,
        compute_capability,
        **constants,
    ):
        options = {"num_warps": num_warps, "num_stages": num_stages}
        calls.append(Call(kernel, [*inputs, *out_shape], options, constants))
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=triton_call)  # type: ignore[assignment]
    return calls


def trace(head_dim: int, group: int, dtype: str, slots: int = 8, tokens: int = 4096) -> None:
    """The calls of a training step: with slots, causal, packed, chunk-visible, into a running
    gradient; nothing is computed.
    """
    kv_heads = 2

    def array(*shape: int, dtype: Any = dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    kv = array(1, tokens, kv_heads, head_dim)
    depth = array(slots, *kv.shape)
    query = array(1, tokens, kv_heads * group, head_dim)
    segments = array(1, tokens, dtype=jnp.int32)
    rows = array(*query.shape[:3], dtype=jnp.float32)

    def run(operands, options, out, lse, d_out, grads):
        operator.forward(operands, options)
        return operator.backward(operands, options, out, lse, d_out, None, grads)

    plain = Operands(query, kv, kv, depth, depth)
    packed = plain._replace(query_segments=segments, key_segments=segments)
    running = (array(*depth.shape, dtype=jnp.float32),) * 2
    scale = head_dim**-0.5
    for operands, options, grads in (
        (plain, Options(scale), None),
        (packed, Options(scale), running),
        (packed, Options(scale, depth_chunk=64), running),
    ):
        call = lambda *arrays, o=options: run(arrays[0], o, *arrays[1:])  # noqa: E731
        with platforms.compiling_for("gpu"):
            jax.eval_shape(call, operands, query, rows, query, grads)


def compile_call(call: Call, target: GPUTarget) -> Any:
    names = call.kernel.arg_names
    signature = {
        name: f"*{TYPES[str(x.dtype)]}" for name, x in zip(names, call.arrays, strict=False)
    } | dict.fromkeys(call.constants, "constexpr")
    constants = {(names.index(name),): value for name, value in call.constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(call.arrays))}
    source = ASTSource(call.kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=call.options)


def measure(compiled: Any, architecture: str) -> dict[str, Any]:
    """Shared memory of a block, registers of a thread, spilled bytes."""
    if architecture.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        counts = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))  # type: ignore[union-attr]
            for name in ("vgpr_count", "vgpr_spill_count")
        }
        registers, spilled = counts["vgpr_count"], 4 * counts["vgpr_spill_count"]
    else:
        registers, spilled = _assemble(compiled.asm["ptx"], architecture)
    return {"shared": compiled.metadata.shared, "registers": registers, "spilled": spilled}


def _assemble(ptx: str, architecture: str) -> tuple[int, int]:
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    name = architecture + "a" * (architecture == "sm_90")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={name}", path, "-o", path.with_suffix(".cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    return int(re.search(r"Used (\d+) registers", log).group(1)), spilled  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("architecture")
    parser.add_argument("--heads", default="64x8", help="head size x query heads per key head")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    architecture = options.architecture
    target = GPUTarget("cuda", int(architecture[3:]), 32)
    if architecture.startswith("gfx"):
        target = GPUTarget("hip", architecture, 64)
    calls = record_calls()
    tiles.architecture = lambda: architecture
    head_dim, group = map(int, options.heads.split("x"))
    trace(head_dim, group, options.dtype)
    seen = set()
    for call in calls:
        key = str((call.kernel.__name__, call.constants, [x.dtype for x in call.arrays]))
        if key not in seen:
            seen.add(key)
            result = measure(compile_call(call, target), architecture)
            print(
                json.dumps({"kernel": call.kernel.__name__, **call.options, **result}), flush=True
            )


if __name__ == "__main__":
    main()
