"""Row 3 of the paper's Table 6: 48 layers, pre-norm, depth KV: 123.38 M parameters.

Command:  python train.py configs/table6/row3.py    (data as in row7.py)
Cost:     computed, not measured: 1.0e+18 FLOP, 2.9 hours of a device that sustains 100 TFLOP/s
Expected: not measured here; the paper's validation loss on FineWeb-Edu is 3.3759, with tokens
          and learning rate not printed
"""

import dataclasses

from configs.table6.row7 import config as row7
from moda_jax.config import MoDAConfig

config = dataclasses.replace(
    row7,
    name="table6_row3",
    model=dataclasses.replace(
        row7.model, num_layers=48, norm_placement="pre", depth=MoDAConfig(ffn_kv="none")
    ),
)
