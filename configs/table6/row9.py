"""Row 9 of the paper's Table 6: 24 layers, post-norm, depth KV and FFN KV: 73.62 M parameters.

Table 6 prints 73.72 M: it counts an FFN key/value projection on every layer (here on
all but the last, whose slots nobody would read) and leaves the final norm out.

Command:  python train.py configs/table6/row9.py    (data as in row7.py)
Cost:     computed, not measured: 6.2e+17 FLOP, 1.7 hours of a device that sustains 100 TFLOP/s
Expected: not measured here; the paper's validation loss on FineWeb-Edu is 3.4338, with tokens
          and learning rate not printed
"""

import dataclasses

from configs.table6.row7 import config as row7
from moda_jax.config import MoDAConfig

config = dataclasses.replace(
    row7,
    name="table6_row9",
    model=dataclasses.replace(row7.model, depth=MoDAConfig()),
)
