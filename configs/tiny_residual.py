"""The plain transformer, at the parameters of `tiny.py`.

What the FFN's key/value projections cost in MoDA goes into a wider FFN here (F 424 instead of 384):
1,781,376 parameters against 1,773,184.

Command:  python train.py configs/tiny_residual.py
Cost:     COST
Expected: EXPECTED
"""

import dataclasses

from configs.tiny import config as tiny
from moda_jax.config import ResidualConfig

config = dataclasses.replace(
    tiny,
    name="tiny_residual",
    model=dataclasses.replace(tiny.model, depth=ResidualConfig(), mlp_dim=424),
)
