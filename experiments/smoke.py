"""The whole chain in a minute on a CPU: two tiny models, two seeds, and one that must diverge.

Command:  moda-jax sweep experiments/smoke.py    (`make evidence-smoke` tests it)
"""

import dataclasses

from moda_jax.config import Config, DataConfig, MoDAConfig, ModelConfig, OptimizerConfig
from moda_jax.config import ResidualConfig as Residual
from moda_jax.sweep import Experiment

_MODEL = ModelConfig(
    vocab_size=257, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)
_MODA = Config(
    name="run",
    model=dataclasses.replace(_MODEL, depth=MoDAConfig(ffn_kv="none")),
    data=DataConfig(seq_len=32),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=12),
    steps=120,
    batch_size=8,
    log_every=5,
    eval_every=30,
    eval_batches=1,
    checkpoint_every=60,
    keep_last=1,
    sample_tokens=0,
)
_PLAIN = dataclasses.replace(_MODA, model=dataclasses.replace(_MODEL, depth=Residual()))
_WILD = dataclasses.replace(
    _PLAIN,
    optimizer=OptimizerConfig(learning_rate=1e38, warmup_steps=0, clip_norm=1e38),
    max_skipped_steps=0,
)

experiment = Experiment(
    name="smoke",
    title="Smoke test: it shows that the chain works, nothing else",
    configs={"plain": _PLAIN, "moda": _MODA, "wild": _WILD},
    seeds={"plain": (0, 1), "moda": (0, 1), "wild": (0,)},
    baseline="plain",
)
