"""The Triton kernels compiled for GPUs that are not here: they fit, whatever the head size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="an optional extra")

# What a block may have: compute capability 8.0 and 9.0 more than 8.9; gfx942's local data share.
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "gfx942": 64}
SPILLED = 1024
"""Bytes a thread; a few values that wait in the first-level cache cost less than smaller tiles."""
KERNELS = {
    "sequence_forward_kernel",
    "sequence_dkv_kernel",
    "sequence_dq_kernel",
    "depth_forward_kernel",
    "depth_backward_kernel",
    "chunk_forward_kernel",
    "chunk_dkv_kernel",
    "chunk_dq_kernel",
}


def compile_kernels(*arguments: str) -> list[dict]:
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), *sys.path])}
    command = [sys.executable, tests / "compile_triton.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "heads", "dtype"),
    [
        ("sm_80", "64x8", "bfloat16"),
        ("sm_89", "128x4", "bfloat16"),
        ("sm_90", "64x1", "bfloat16"),
        ("sm_90", "64x8", "bfloat16"),  # the measured table's, as the next
        ("sm_90", "128x4", "float16"),
        ("gfx942", "64x8", "bfloat16"),
        ("gfx942", "128x4", "float16"),
        ("sm_80", "128x4", "float32"),
    ],
)
def test_kernels_fit(architecture, heads, dtype):
    compiled = compile_kernels(architecture, "--heads", heads, "--dtype", dtype)
    assert {row["kernel"] for row in compiled} == KERNELS
    for row in compiled:
        assert row["shared"] <= SHARED[architecture] * 1024, row
        assert row["spilled"] <= SPILLED, row
