"""The nine rows of the paper's Table 6, and plain models at the parameters of its FFN KV rows.

Command:  moda-jax sweep experiments/table6.py
"""

from experiments.recipe import DEPTH_KV, FFN_KV, PLAIN, expected_speed, like, model, train
from moda_jax.config import ModelConfig
from moda_jax.sweep import Experiment

_MODELS: dict[str, ModelConfig] = {
    "row7": model(PLAIN),
    "row7_wide": like(model(PLAIN), model(FFN_KV)),
    "row8": model(DEPTH_KV),
    "row9": model(FFN_KV),
    "row2": model(PLAIN, layers=48),
    "row2_wide": like(model(PLAIN, layers=48), model(FFN_KV, layers=48)),
    "row4": model(DEPTH_KV, layers=48),
    "row6": model(FFN_KV, layers=48),
    "row1": model(PLAIN, layers=48, norm="pre"),
    "row1_wide": like(model(PLAIN, layers=48, norm="pre"), model(FFN_KV, layers=48, norm="pre")),
    "row3": model(DEPTH_KV, layers=48, norm="pre"),
    "row5": model(FFN_KV, layers=48, norm="pre"),
}
_PRE_NORM = ("row1", "row1_wide", "row3", "row5")

experiment = Experiment(
    name="table6",
    title="Table 6 of the paper: D 384, rows of 512 tokens, 100 M tokens of books and code",
    configs={label: train(model, tokens=100e6) for label, model in _MODELS.items()},
    seeds={label: (0,) if label in _PRE_NORM else (0, 1, 2) for label in _MODELS},
    baseline={
        "row7_wide": "row7",
        "row8": "row7",
        "row9": ("row7", "row7_wide", "row8"),
        "row2_wide": "row2",
        "row4": "row2",
        "row6": ("row2", "row2_wide", "row4"),
        "row1_wide": "row1",
        "row3": "row1",
        "row5": ("row1", "row1_wide", "row3"),
    },
    paper={
        "row1": 3.3800,
        "row2": 3.4062,
        "row3": 3.3759,
        "row4": 3.3653,
        "row5": 3.3656,
        "row6": 3.3484,
        "row7": 3.4740,
        "row8": 3.4537,
        "row9": 3.4338,
    },
    speed=expected_speed,
)
