"""What of MoDA matters: its variants, 24 layers, post-norm, 50 M tokens.

Command:  moda-jax sweep experiments/moda_parts.py
"""

from experiments.recipe import FFN_KV, PLAIN, expected_speed, like, model, train
from moda_jax.config import MoDAConfig
from moda_jax.sweep import Experiment

_VARIANTS = {
    "row3": MoDAConfig(ffn_kv="none"),
    "row4": FFN_KV,
    "row5": MoDAConfig(attention_kv="project"),
    "every2": MoDAConfig(write_every=2),
    "every4": MoDAConfig(write_every=4),
    "window8": MoDAConfig(window=8),
    "window16": MoDAConfig(window=16),
    "reader": MoDAConfig(key_norm="reader"),
    "score_bias": MoDAConfig(score_bias=0.0),
}
_MODELS = {"plain_wide": like(model(PLAIN), model(FFN_KV))}
_MODELS |= {label: model(depth) for label, depth in _VARIANTS.items()}

experiment = Experiment(
    name="moda_parts",
    title="What of MoDA matters, 24 layers, post-norm, 50 M tokens of books and code",
    configs={label: train(model, tokens=50e6) for label, model in _MODELS.items()},
    seeds=(0, 1),
    baseline={label: "plain_wide" if label == "row4" else ("row4", "plain_wide")
              for label in _VARIANTS},
    speed=expected_speed,
)  # fmt: skip
