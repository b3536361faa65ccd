"""Muon, which the authors' later recipe uses, beside AdamW: does MoDA's gain depend on it?

Command:  moda-jax sweep experiments/optimizers.py
"""

import dataclasses

from experiments.recipe import FFN_KV, PLAIN, expected_speed, like, model, train
from moda_jax.config import Config
from moda_jax.sweep import Experiment

_MODELS = {"plain": like(model(PLAIN), model(FFN_KV)), "moda": model(FFN_KV)}


def _with_muon(config: Config, factor: float) -> Config:
    """Muon at a rate of `factor` times AdamW's, to which its updates are scaled."""
    optimizer = dataclasses.replace(
        config.optimizer, name="muon", learning_rate=factor * config.optimizer.learning_rate
    )
    return dataclasses.replace(config, optimizer=optimizer)


_CONFIGS: dict[str, Config] = {}
for _label, _one in _MODELS.items():
    _adamw = train(_one, tokens=50e6)
    _CONFIGS[f"{_label}_adamw"] = _adamw
    for _factor in (1, 2):
        _CONFIGS[f"{_label}_muon_{_factor}x"] = _with_muon(_adamw, _factor)

experiment = Experiment(
    name="optimizers",
    title="AdamW and Muon, 24 layers, post-norm, 50 M tokens of books and code",
    configs=_CONFIGS,
    seeds=(0, 1),
    baseline={
        "plain_muon_1x": "plain_adamw",
        "plain_muon_2x": "plain_adamw",
        "moda_adamw": "plain_adamw",
        "moda_muon_1x": ("moda_adamw", "plain_muon_1x"),
        "moda_muon_2x": ("moda_adamw", "plain_muon_2x"),
    },
    speed=expected_speed,
)
