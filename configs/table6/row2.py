"""Row 2 of the paper's Table 6: 48 layers, post-norm, a plain transformer: 123.38 M parameters.

Command:  python train.py configs/table6/row2.py    (data as in row7.py)
Cost:     computed, not measured: 1.0e+18 FLOP, 2.9 hours of a device that sustains 100 TFLOP/s
Expected: not measured here; the paper's validation loss on FineWeb-Edu is 3.4062, with tokens
          and learning rate not printed
"""

import dataclasses

from configs.table6.row7 import config as row7

config = dataclasses.replace(
    row7,
    name="table6_row2",
    model=dataclasses.replace(row7.model, num_layers=48),
)
