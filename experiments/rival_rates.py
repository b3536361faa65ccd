"""Learning rates of the ways of using depth that rates.py does not try.

Command:  moda-jax sweep experiments/rival_rates.py
Then:     the best of each three goes to `BEST_RATES` in recipe.py
"""

from experiments.recipe import RATES, expected_speed, round_rate, train
from experiments.rivals import models
from moda_jax.sweep import Experiment

experiment = Experiment(
    name="rival_rates",
    title="Learning rates of the ways of using depth, 24 layers, 30 M tokens",
    configs={
        f"{label}_{round_rate(rate)}": train(model, tokens=30e6, rate=rate)
        for label, model in models().items()
        if model.depth.name not in ("residual", "moda")
        for rate in RATES[model.norm_placement]
    },
    speed=expected_speed,
)
