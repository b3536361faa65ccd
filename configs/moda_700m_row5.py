"""The paper's 700M model, MoDA row 5 of Table 3 (own attention slots): 742.4 M parameters.

Recipe and data as in `moda_700m_row4.py`.

Command:  python train.py configs/moda_700m_row5.py
Cost:     computed, not measured: 2.53e21 FLOP (3 * 8.63 TFLOP forward per row, by Table 3),
          9.2 days of eight devices that sustain 400 TFLOP/s each
Expected: not measured here; our notes of the paper give no score for this row
"""

import dataclasses

from configs.moda_700m_row4 import config as row4
from moda_jax.config import MoDAConfig

config = dataclasses.replace(
    row4,
    name="moda_700m_row5",
    model=dataclasses.replace(row4.model, depth=MoDAConfig(attention_kv="project")),
)
