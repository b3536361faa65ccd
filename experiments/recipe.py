"""What all experiments have in common: data, batch, schedule, learning rates, equal sizes.

Every number here is a choice; README.md gives its reason.
"""

import dataclasses
import math

from configs.books_and_code import config as books_and_code
from configs.table6.row7 import config as row7
from configs.table6.row9 import config as row9
from moda_jax.config import (
    Config,
    DepthConfig,
    MoDAConfig,
    ModelConfig,
    OptimizerConfig,
    ResidualConfig,
)
from moda_jax.config.depth import NormPlacement
from moda_jax.model.flops import count_flops, count_parameters

DATA = books_and_code.data
"""Books and code, half and half; the table has a loss for each."""
VOCAB_SIZE = 16_384

TOKENS_PER_STEP = 65_536
BATCH_SIZE = TOKENS_PER_STEP // DATA.seq_len
VALIDATIONS = 16
"""Of a run, at equal distances."""

PLAIN, DEPTH_KV, FFN_KV = ResidualConfig(), MoDAConfig(ffn_kv="none"), MoDAConfig()
"""Table 6's three ways of using depth: none, rows 3 and 4 of Table 3."""

RATES: dict[NormPlacement, tuple[float, ...]] = {
    "post": (5e-4, 1e-3, 2e-3, 4e-3),
    "pre": (1e-3, 2e-3, 4e-3),
    "reordered": (1e-3, 2e-3, 4e-3),
}
"""The values that a search tries; post-norm's best of three was the last, so it has a fourth."""

BEST_RATES: dict[tuple[str, NormPlacement], float] = {
    ("residual", "post"): 2e-3,
    ("moda", "post"): 2e-3,
}
"""(mechanism, norm placement) -> the best rate of the searches (rates.py, rival_rates.py), filled
in from their tables. What is not in here has the second one of `RATES`."""


def best_rate(model: ModelConfig) -> float:
    """The learning rate with which a model of this mechanism and norm placement is compared."""
    placement = model.norm_placement
    return BEST_RATES.get((model.depth.name, placement), RATES[placement][1])


def model(depth: DepthConfig, *, layers: int = 24, norm: NormPlacement = "post") -> ModelConfig:
    """Table 6's shape (D 384, 6 query heads, 2 key/value heads), with this data's vocabulary."""
    return dataclasses.replace(
        row7.model, vocab_size=VOCAB_SIZE, num_layers=layers, norm_placement=norm, depth=depth
    )


def train(model: ModelConfig, *, tokens: float, rate: float | None = None) -> Config:
    """A whole schedule of about `tokens` tokens; `rate` None: the best one that is known."""
    steps = round(tokens / TOKENS_PER_STEP / VALIDATIONS) * VALIDATIONS
    optimizer = OptimizerConfig(
        learning_rate=best_rate(model) if rate is None else rate, warmup_steps=steps // 10
    )
    return Config(
        name="run",
        prepared_dir="runs/prepared",  # where `moda-jax prepare books_and_code` keeps it
        model=model,
        data=DATA,
        optimizer=optimizer,
        steps=steps,
        batch_size=BATCH_SIZE,
        eval_every=steps // VALIDATIONS,
        eval_batches=4,
        checkpoint_every=steps // 4,
        keep_last=1,
        sample_tokens=0,
    )


def at_parameters(model: ModelConfig, parameters: int) -> ModelConfig:
    """`model` with the FFN width, a multiple of 16, that brings it closest to `parameters`.

    Raises ValueError if that takes no FFN at all.
    """

    def size(width: int) -> int:
        return count_parameters(dataclasses.replace(model, mlp_dim=width)).total

    per_16 = size(32) - size(16)
    width = 16 * (1 + round((parameters - size(16)) / per_16))
    if width <= 0:
        raise ValueError(f"parameters: expected more than {size(16):,}, got {parameters:,}")
    return dataclasses.replace(model, mlp_dim=width)


def like(model: ModelConfig, other: ModelConfig) -> ModelConfig:
    """`model` at the number of parameters of `other`."""
    return at_parameters(model, count_parameters(other).total)


def at_time_of(config: Config, other: Config) -> Config:
    """`config` with so few steps that, at the expected speeds, it takes as long as `other`."""
    seconds = other.steps / expected_speed(other)
    tokens = seconds * expected_speed(config) * TOKENS_PER_STEP
    shorter = train(config.model, tokens=tokens, rate=config.optimizer.learning_rate)
    return dataclasses.replace(shorter, optimizer=dataclasses.replace(
        config.optimizer, warmup_steps=shorter.optimizer.warmup_steps))  # fmt: skip


# Measured on an H200 with 256 rows of 512 tokens (docs/benchmarks/train_step.md).
_MEASURED = {"residual": (row7, 500_000.0), "moda": (row9, 400_000.0)}


def expected_speed(config: Config) -> float:
    """Tokens per second on one H200, computed: the FLOP/s that was measured for the mechanism.

    Of mechanisms that were not measured it is MoDA's, and certainly too high: on a CPU attention
    residuals and hyper-connections take 1.3 to 1.9 times as long as MoDA (docs/reproduce.md).
    """
    measured, speed = _MEASURED.get(config.model.depth.name, _MEASURED["moda"])
    flops = [count_flops(run.model, run.data.seq_len).train_per_token for run in (measured, config)]
    return speed * flops[0] / flops[1]


def round_rate(rate: float) -> str:
    """For labels: 0.0005 is 5e-4."""
    exponent = math.floor(math.log10(rate))
    return f"{rate / 10**exponent:.3g}e{exponent}"
