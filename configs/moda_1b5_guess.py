"""A GUESS at the paper's 1.5B model, MoDA row 4: 1510.8 M parameters.

The paper's tables do not print this shape; D 1536, N 24, K 12, F 6144 and 36 layers fit the
pattern of its 700M model. Recipe and data as in `moda_700m_row4.py`.

Command:  python train.py configs/moda_1b5_guess.py
Cost:     computed, not measured: 4.75e21 FLOP (3 * 16.2 TFLOP forward per row, by its formula),
          17.2 days of eight devices that sustain 400 TFLOP/s each
Expected: not measured here, and no score of the paper belongs to a guessed shape
"""

import dataclasses

from configs.moda_700m_row4 import config as row4

config = dataclasses.replace(
    row4,
    name="moda_1b5_guess",
    model=dataclasses.replace(
        row4.model, embed_dim=1536, num_heads=24, num_kv_heads=12, mlp_dim=6144
    ),
)
