"""A mixture: books and Python code, half and half, under one 16K vocabulary.

Command:  moda-jax prepare books_and_code --vocab-size 16384
              trains data/bpe16k.json on both and prepares both; needs data/books.jsonl.xz, one
              JSON object with a "text" a line
          python train.py configs/books_and_code.py
Cost:     training: computed, not measured: 4.7e+15 FLOP, a minute at 100 TFLOP/s
Expected: not measured; validation loss is printed for each source and their mean
"""

from moda_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, SourceConfig

config = Config(
    name="books_and_code",
    model=ModelConfig(vocab_size=16384, num_layers=8, embed_dim=256, num_heads=4, num_kv_heads=2,
                      head_dim=64, mlp_dim=768),
    data=DataConfig(
        source=None,
        sources=(
            SourceConfig("books", "data/books.jsonl.xz"),
            SourceConfig("code", "python"),
        ),
        tokenizer="data/bpe16k.json",
        seq_len=512,
        on_error="skip",  # some installed package's source is not what its encoding says
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
    steps=2000,
    batch_size=64,
    eval_every=500,
    checkpoint_every=500,
)  # fmt: skip
