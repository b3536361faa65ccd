"""Row 6 of the paper's Table 6: 48 layers, post-norm, depth KV and FFN KV: 128.02 M parameters.

Table 6 prints 128.11 M: it counts an FFN key/value projection on every layer (here on
all but the last, whose slots nobody would read) and leaves the final norm out.

Command:  python train.py configs/table6/row6.py    (data as in row7.py)
Cost:     computed, not measured: 1.1e+18 FLOP, 3.0 hours of a device that sustains 100 TFLOP/s
Expected: not measured here; the paper's validation loss on FineWeb-Edu is 3.3484, with tokens
          and learning rate not printed
"""

import dataclasses

from configs.table6.row7 import config as row7
from moda_jax.config import MoDAConfig

config = dataclasses.replace(
    row7,
    name="table6_row6",
    model=dataclasses.replace(row7.model, num_layers=48, depth=MoDAConfig()),
)
