"""The paper's 700M baseline at MoDA's size, OLMo 2 with 38 layers (Table 3): 700.5 M parameters.

Recipe and data as in `moda_700m_row4.py`.

Command:  python train.py configs/olmo2_700m_38.py
Cost:     computed, not measured: 2.46e21 FLOP (3 * 8.41 TFLOP forward per row, by Table 3),
          8.9 days of eight devices that sustain 400 TFLOP/s each
Expected: not measured here; our notes of the paper give no score for this row
"""

import dataclasses

from configs.moda_700m_row4 import config as row4
from moda_jax.config import ResidualConfig

config = dataclasses.replace(
    row4,
    name="olmo2_700m_38",
    model=dataclasses.replace(row4.model, depth=ResidualConfig(), num_layers=38),
)
