"""The paper's small model (Table 6), 48 layers, plain transformer: 123.38 M parameters.

Command:  python train.py configs/small_48_vanilla.py    (data as in small_24_moda.py)
Cost:     computed, not measured: 1.3e18 FLOP, 3.5 hours of a device that sustains 100 TFLOP/s
Expected: not measured here; our notes of the paper give no score for this size
"""

import dataclasses

from configs.small_48_moda import config as base

config = dataclasses.replace(
    base,
    name="small_48_vanilla",
    model=dataclasses.replace(base.model, depth_stream="residual"),
)
