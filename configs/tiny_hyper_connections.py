"""Hyper-connections, 4 streams, at the parameters of `tiny.py`.

Same data, same recipe; F 416 instead of 384: 1,771,552 parameters against 1,773,184.

Command:  python train.py configs/tiny_hyper_connections.py
Cost:     873 tokens/s on one core of a server's CPU (measured, median of three runs side by
          side): 8 minutes there, compilation excluded
Expected: final validation loss 2.11 to 2.16 nats a byte (measured, seeds 0, 1, 2:
          docs/reproduce.md)
"""

import dataclasses

from configs.tiny import config as tiny
from moda_jax.config import HyperConnectionsConfig

config = dataclasses.replace(
    tiny,
    name="tiny_hyper_connections",
    model=dataclasses.replace(tiny.model, depth=HyperConnectionsConfig(), mlp_dim=416),
)
