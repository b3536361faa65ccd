"""Manifold-constrained hyper-connections, 4 streams, at the parameters of `tiny.py`.

Same data, same recipe; F 360 instead of 384: 1,781,808 parameters against 1,773,184.

Command:  python train.py configs/tiny_mhc.py
Cost:     755 tokens/s on one core of a server's CPU (measured, median of three runs side by
          side): 9 minutes there, compilation excluded
Expected: not measured: its runs were cut off at step 190 of 200 (training loss 1.94 to 2.25)
"""

import dataclasses

from configs.tiny import config as tiny
from moda_jax.config import MHCConfig

config = dataclasses.replace(
    tiny,
    name="tiny_mhc",
    model=dataclasses.replace(tiny.model, depth=MHCConfig(), mlp_dim=360),
)
