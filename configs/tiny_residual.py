"""The plain transformer, at the parameters of `tiny.py`.

What the FFN's key/value projections cost in MoDA goes into a wider FFN here (F 424 instead of 384):
1,781,376 parameters against 1,773,184.

Command:  python train.py configs/tiny_residual.py
Cost:     1,717 tokens/s on one core of a server's CPU (measured, median of three runs side by
          side): 4 minutes there, compilation excluded
Expected: final validation loss 2.20 to 2.30 nats a byte (an earlier version, seeds 0, 1, 2)
"""

import dataclasses

from configs.tiny import config as tiny
from moda_jax.config import ResidualConfig

config = dataclasses.replace(
    tiny,
    name="tiny_residual",
    model=dataclasses.replace(tiny.model, depth=ResidualConfig(), mlp_dim=424),
)
