"""The triton implementation: the shared suite, compiled on a GPU, else in Triton's interpreter."""

import dataclasses

import jax.numpy as jnp
import pytest
from attention_cases import CASES
from attention_suite import AttentionSuite

from moda_jax.attention import check
from pallas_kernels import platforms, triton_gpu

_SMALL = check(*(jnp.zeros((1, 8, 2, 64), jnp.float16),) * 3)
REFUSED = triton_gpu.refusal(*_SMALL, platforms.current())
needs_triton = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))
# In the interpreter a thousand tokens take minutes, and go through the same loops as a hundred.
TAKEN = tuple(
    case
    for case in CASES
    if case.query_offset is None
    and case.kv_length is None
    and (case.q_len < 1000 or platforms.current() == "gpu")
)
ON_GPU = platforms.current() == "gpu"
DTYPES = ("float32", "float16", "bfloat16") if ON_GPU else ("float32", "float16")
FAST = ("one_token", "packed", "window", "depth_only", "chunk_packed")


@needs_triton
class TestTriton:
    """The part of the suite that the interpreter does in less than a minute."""

    implementation = "triton"
    dtypes = DTYPES
    cases = tuple(case for case in TAKEN if case.name in FAST)
    pytest_generate_tests = AttentionSuite.pytest_generate_tests
    compiled = AttentionSuite.compiled
    test_equals_reference = AttentionSuite.test_equals_reference


@needs_triton
@pytest.mark.slow
class TestTritonWhole(AttentionSuite):
    implementation = "triton"
    dtypes = DTYPES
    cases = tuple(
        dataclasses.replace(case, dtypes=tuple(dict.fromkeys((*case.dtypes, *DTYPES[1:]))))
        for case in TAKEN
    )
