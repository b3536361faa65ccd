"""The paper's 700M baseline, OLMo 2 with 36 layers (Table 3): 669.0 M parameters.

Recipe and data as in `moda_700m_row4.py`.

Command:  python train.py configs/olmo2_700m_36.py
Cost:     computed, not measured: 2.35e21 FLOP (3 * 8.01 TFLOP forward per row, by Table 3),
          8.5 days of eight devices that sustain 400 TFLOP/s each
Expected: not measured here; our notes of the paper give no score for this row
"""

import dataclasses

from configs.moda_700m_row4 import config as row4
from moda_jax.config import ResidualConfig

config = dataclasses.replace(
    row4,
    name="olmo2_700m_36",
    model=dataclasses.replace(row4.model, depth=ResidualConfig()),
)
