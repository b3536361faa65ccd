"""Is the best rate of 30 M tokens the best of 100 M? Table 6's 24-layer rows at two rates.

Command:  moda-jax sweep experiments/rates_long.py
"""

from experiments.recipe import (
    DEPTH_KV,
    FFN_KV,
    PLAIN,
    expected_speed,
    like,
    model,
    round_rate,
    train,
)
from moda_jax.sweep import Experiment

_MODELS = {
    "row7_wide": like(model(PLAIN), model(FFN_KV)),
    "row8": model(DEPTH_KV),
    "row9": model(FFN_KV),
}

experiment = Experiment(
    name="rates_long",
    title="Learning rates, 24 layers, post-norm, 100 M tokens",
    configs={
        f"{name}_{round_rate(rate)}": train(model, tokens=100e6, rate=rate)
        for name, model in _MODELS.items()
        for rate in (1e-3, 2e-3)
    },
    speed=expected_speed,
)
