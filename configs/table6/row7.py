"""Row 7 of the paper's Table 6: 24 layers, post-norm, a plain transformer: 71.35 M parameters.

The base of the other rows. Rows of 512 tokens fit the FLOPs that the paper prints; optimizer, batch
and number of steps are our choice, since it prints none.

Command:  python train.py configs/table6/row7.py
          with text in data/text/*.txt and a GPT-2-sized tokenizer in data/tokenizer.json;
          --data.source stdlib --data.tokenizer bytes runs without either
Cost:     computed, not measured: 6.0e+17 FLOP, 1.7 hours of a device that sustains 100 TFLOP/s
Expected: not measured here; the paper's validation loss on FineWeb-Edu is 3.4740, with tokens
          and learning rate not printed
"""

from moda_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, ResidualConfig

config = Config(
    name="table6_row7",
    model=ModelConfig(
        vocab_size=50304,
        num_layers=24,
        embed_dim=384,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=1536,
        norm_placement="post",
        qk_norm="head",
        use_bias=True,
        tie_embeddings=True,
        depth=ResidualConfig(),
    ),
    data=DataConfig(source="data/text", tokenizer="data/tokenizer.json", seq_len=512),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
    steps=10_000,
    batch_size=256,
    eval_every=500,
    eval_batches=4,
    checkpoint_every=500,
)
