"""Reading the compiler's listings of TPU kernels."""

import importlib.util
import os
import subprocess
import sys

import pytest

from benchmarks import tpu_bundles

LISTING = """
     0   :  { entry }
   0x2 LB: > { a loop }
   0x4 PF: > { with a mask }
   0xa LB: >> { without }
   0xf PF: > { end }
"""
USAGE = """== CAPACTIY:
MATMUL, VALU
    4     2
== UTILIZATION:
"""


def test_reads_the_longest_loop(tmp_path):
    (tmp_path / "1-a_kernel.1-72-final_bundles.txt").write_text(LISTING)
    (tmp_path / "1-a_kernel.1-71-schedule-analysis_final_bundles.txt").write_text("not this")
    rows = [(4, 0)] * 10 + [(2, 1)] * 5 + [(0, 2)] * 3
    usage = USAGE + "".join(f"{a} {b}\n" for a, b in rows)
    (tmp_path / "1-a_kernel.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(usage)
    loop = tpu_bundles.read_loop(tmp_path, "a_kernel")
    assert loop.bundles == 5  # of 6 and 5, which differ by a mask
    assert loop.use == {"MATMUL": 0.5, "VALU": 0.5}
    with pytest.raises(FileNotFoundError, match="no schedule of another"):
        tpu_bundles.read_loop(tmp_path, "another")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_counts_ours_and_splash():
    """In a process of its own: libtpu reads its settings when it is loaded."""
    command = [sys.executable, "-m", "benchmarks.tpu_bundles", "--chips", "v5e:2x2"]
    run = subprocess.run(
        [*command, "--head-dims", "64"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith("| v5e ")]
    assert [row.split(" | ")[1:4:2] for row in rows] == [
        ["mosaic_tpu", "forward"],
        ["mosaic_tpu", "backward"],
        ["splash", "forward"],
        ["splash", "backward"],
    ]
