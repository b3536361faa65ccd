"""Dense connections over depth, scalar form, at the parameters of `tiny.py`.

Same data, same recipe; F 424 instead of 384: 1,781,412 parameters against 1,773,184.

Command:  python train.py configs/tiny_dense.py
Cost:     COST
Expected: EXPECTED
"""

import dataclasses

from configs.tiny import config as tiny
from moda_jax.config import DenseConfig

config = dataclasses.replace(
    tiny,
    name="tiny_dense",
    model=dataclasses.replace(tiny.model, depth=DenseConfig(), mlp_dim=424),
)
