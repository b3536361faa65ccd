"""The mosaic_gpu implementation: the shared suite, interpreted on the CPU, compiled on a Hopper.

In the interpreter the forward is the fused kernel and the sequence part of the backward our own:
cuDNN's, and copies of whole blocks of slots, exist on the GPU only.
"""

import dataclasses

import jax
import pytest
from attention_cases import CASES
from attention_suite import AttentionSuite

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Pallas Mosaic GPU needs JAX >= 0.11"
)

HALF = ("bfloat16", "float16")


class TestMosaicGpu(AttentionSuite):
    implementation = "mosaic_gpu"
    dtypes = HALF
    cases = tuple(
        dataclasses.replace(case, dtypes=HALF[: 1 + ("float16" in case.dtypes)])
        for case in CASES
        if case.query_offset is None and case.kv_length is None
    )
