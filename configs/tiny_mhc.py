"""Manifold-constrained hyper-connections, 4 streams, at the parameters of `tiny.py`.

Same data, same recipe; F 360 instead of 384: 1,781,808 parameters against 1,773,184.

Command:  python train.py configs/tiny_mhc.py
Cost:     COST
Expected: EXPECTED
"""

import dataclasses

from configs.tiny import config as tiny
from moda_jax.config import MHCConfig

config = dataclasses.replace(
    tiny,
    name="tiny_mhc",
    model=dataclasses.replace(tiny.model, depth=MHCConfig(), mlp_dim=360),
)
