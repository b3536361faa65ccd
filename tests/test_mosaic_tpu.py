"""The mosaic_tpu implementation: the shared suite in Pallas's TPU interpreter, on the CPU."""
import dataclasses
import pytest
from attention_cases import CASES, HALF
from attention_suite import AttentionSuite


class TestMosaicTpuWhole(AttentionSuite):
    implementation = "mosaic_tpu"
    dtypes = HALF
    cases = tuple(dataclasses.replace(c, dtypes=tuple(d for d in c.dtypes if d in HALF)) for c in CASES)
