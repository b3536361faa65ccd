"""A small MoDA model (Table 3's row 4) that learns Python source, byte by byte, on a laptop.

Command:  make train    (or: python train.py)
Cost:     not measured yet
Expected: not measured yet
"""

from moda_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig

config = Config(
    name="tiny",
    # float32: CPUs emulate bfloat16. No remat: the activations are small, time is what counts.
    model=ModelConfig(compute_dtype="float32", remat="none"),
    data=DataConfig(seq_len=256),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    steps=300,
    batch_size=8,
    eval_every=100,
    eval_batches=8,
    checkpoint_every=100,
)
