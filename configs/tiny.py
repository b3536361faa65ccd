"""A small MoDA model (Table 3's row 4) that learns Python source, byte by byte, on a laptop.

Command:  make train    (or: python train.py)
Cost:     about 1 s a step on two busy CPU cores (measured over 80 steps), plus compilation
Expected: not measured to the end; after 80 steps (make train ARGS="--steps 60 --eval-every 30",
          then "--steps 80 --eval-every 40") validation loss 2.96 nats a byte; a unigram model of
          the same training text has 3.08
"""

from moda_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig

config = Config(
    name="tiny",
    # float32: CPUs emulate bfloat16. No remat: the activations are small, time is what counts.
    model=ModelConfig(compute_dtype="float32", remat="none"),
    data=DataConfig(seq_len=256),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    steps=200,
    batch_size=8,
    eval_every=100,
    eval_batches=8,
    checkpoint_every=100,
)
