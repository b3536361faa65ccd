"""Attention residuals, full form, at the parameters of `tiny.py`.

Same data, same recipe; F 416 instead of 384: 1,761,152 parameters against 1,773,184.

Command:  python train.py configs/tiny_attention_residuals.py
Cost:     852 tokens/s on one core of a server's CPU (measured, median of three runs side by
          side): 8 minutes there, compilation excluded
Expected: final validation loss 2.11 to 2.17 nats a byte (measured, seeds 0, 1, 2:
          docs/reproduce.md)
"""

import dataclasses

from configs.tiny import config as tiny
from moda_jax.config import AttentionResidualsConfig

config = dataclasses.replace(
    tiny,
    name="tiny_attention_residuals",
    model=dataclasses.replace(tiny.model, depth=AttentionResidualsConfig(), mlp_dim=416),
)
