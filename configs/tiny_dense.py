"""Dense connections over depth, scalar form, at the parameters of `tiny.py`.

Same data, same recipe; F 424 instead of 384: 1,781,412 parameters against 1,773,184.

Command:  python train.py configs/tiny_dense.py
Cost:     1,452 tokens/s on one core of a server's CPU (measured, median of three runs side by
          side): 5 minutes there, compilation excluded
Expected: final validation loss 2.15 to 2.28 nats a byte (measured, seeds 0, 1, 2:
          docs/reproduce.md)
"""

import dataclasses

from configs.tiny import config as tiny
from moda_jax.config import DenseConfig

config = dataclasses.replace(
    tiny,
    name="tiny_dense",
    model=dataclasses.replace(tiny.model, depth=DenseConfig(), mlp_dim=424),
)
