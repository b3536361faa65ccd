"""A small MoDA model (Table 3's row 4) that learns Python source, byte by byte, on a laptop.

Command:  make train    (or: python train.py)
Cost:     1 to 4 minutes on two CPU cores, compilation included (measured on two machines: 6,500
          and 2,200 tokens/s)
Expected: final validation loss 2.20 to 2.28 nats a byte (measured, seeds 0, 1, 2:
          docs/reproduce.md); a unigram model of the training text (add-one counts over 600
          batches) has 3.31 on the same 32 batches
"""

from moda_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig

config = Config(
    name="tiny",
    model=ModelConfig(),  # MoDA, row 4
    data=DataConfig(seq_len=256),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    steps=200,
    batch_size=8,
    eval_every=100,
    eval_batches=8,
    checkpoint_every=100,
)
