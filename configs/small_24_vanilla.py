"""The paper's small model (Table 6), 24 layers, plain transformer: 71.35 M parameters.

Command:  python train.py configs/small_24_vanilla.py    (data as in small_24_moda.py)
Cost:     computed, not measured: 7.1e17 FLOP, 2.0 hours of a device that sustains 100 TFLOP/s
Expected: not measured here; our notes of the paper give no score for this size
"""

import dataclasses

from configs.small_24_moda import config as base

config = dataclasses.replace(
    base,
    name="small_24_vanilla",
    model=dataclasses.replace(base.model, depth_stream="residual"),
)
