"""Table 6's post-norm rows with whole schedules as long, in seconds, as the plain model's.

The speeds are those of `expected_speed`; where the measured ones differ (tokens/s in the table of
table6.py), `_MEASURED` in recipe.py wants them first.

Command:  moda-jax sweep experiments/table6_time.py
"""

from experiments.recipe import at_time_of, expected_speed
from experiments.table6 import experiment as table6
from moda_jax.sweep import Experiment

_PLAIN = {"row8": "row7", "row9": "row7", "row4": "row2", "row6": "row2"}
_SHORTER = {
    f"{label}_time": at_time_of(table6.configs[label], table6.configs[plain])
    for label, plain in _PLAIN.items()
}

experiment = Experiment(
    name="table6_time",
    title="Table 6 at equal time: schedules that take as long as the plain model's",
    configs={plain: table6.configs[plain] for plain in ("row7", "row2")} | _SHORTER,
    seeds=(0, 1, 2),
    baseline={f"{label}_time": plain for label, plain in _PLAIN.items()},
    speed=expected_speed,
)
