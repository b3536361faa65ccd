"""Learning rates of plain models and MoDA at both norms, before anything is compared.

Command:  moda-jax sweep experiments/rates.py
Then:     the best of each four goes to `BEST_RATES` in recipe.py; where it is at the edge of the
          three, one more beyond it
"""

from experiments.recipe import FFN_KV, PLAIN, RATES, expected_speed, model, round_rate, train
from moda_jax.config.depth import NormPlacement
from moda_jax.sweep import Experiment

_NORMS: tuple[NormPlacement, ...] = ("post", "pre")

experiment = Experiment(
    name="rates",
    title="Learning rates, 24 layers, 30 M tokens",
    configs={
        f"{name}_{norm}_{round_rate(rate)}": train(model(depth, norm=norm), tokens=30e6, rate=rate)
        for norm in _NORMS
        for name, depth in (("plain", PLAIN), ("moda", FFN_KV))
        for rate in RATES[norm]
    },
    speed=expected_speed,
)
