"""Does the gain grow with depth? 12, 24, 48 and 96 layers at D 256, post-norm, 50 M tokens.

Command:  moda-jax sweep experiments/depth.py
"""

import dataclasses

from experiments.recipe import FFN_KV, PLAIN, expected_speed, like, model, train
from moda_jax.config import DepthConfig, ModelConfig
from moda_jax.sweep import Experiment

_LAYERS = (12, 24, 48, 96)


def _model(depth: DepthConfig, layers: int) -> ModelConfig:
    """4 query heads on 2 key/value heads of 64, F = 4 D as in Table 6's models."""
    return dataclasses.replace(
        model(depth, layers=layers), embed_dim=256, num_heads=4, num_kv_heads=2, mlp_dim=1024
    )


_MODELS: dict[str, ModelConfig] = {}
for _layers in _LAYERS:
    _plain, _moda = _model(PLAIN, _layers), _model(FFN_KV, _layers)
    _MODELS |= {
        f"plain_{_layers}": _plain,
        f"wide_{_layers}": like(_plain, _moda),
        f"moda_{_layers}": _moda,
    }

experiment = Experiment(
    name="depth",
    title="Depth: 12 to 96 layers, D 256, post-norm, 50 M tokens of books and code",
    configs={label: train(model, tokens=50e6) for label, model in _MODELS.items()},
    seeds=(0, 1),
    baseline={f"wide_{n}": f"plain_{n}" for n in _LAYERS}
    | {f"moda_{n}": (f"plain_{n}", f"wide_{n}") for n in _LAYERS},
    speed=expected_speed,
)
