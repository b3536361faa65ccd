"""MoDA from a trained plain model: SmolLM2-135M goes on with books, with depth slots and without.

Needs:    runs/smollm2, made by `moda-jax import FOLDER --name smollm2` of the published checkpoint
Command:  moda-jax sweep experiments/continued.py
"""

import dataclasses

from experiments.recipe import PLAIN, expected_speed, train
from moda_jax.config import Config, DataConfig, DepthConfig, MoDAConfig, ModelConfig, SourceConfig
from moda_jax.sweep import Experiment

_SMOLLM2 = ModelConfig(
    vocab_size=49152,
    num_layers=30,
    embed_dim=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    norm_placement="pre",
    qk_norm="none",
    norm_eps=1e-5,
    rope_theta=100_000.0,
    tie_embeddings=True,
    depth=PLAIN,
)
_DATA = DataConfig(
    source=None,
    sources=(SourceConfig("books", "data/books.jsonl.xz"),),
    tokenizer="runs/smollm2/tokenizer.json",
    eos_token="<|im_end|>",  # as the checkpoint says
    seq_len=1024,
)
_VARIANTS: dict[str, DepthConfig] = {
    "plain": PLAIN,
    "row3": MoDAConfig(ffn_kv="none"),
    "row3_bias8": MoDAConfig(ffn_kv="none", score_bias=-8.0),
    "row3_bias24": MoDAConfig(ffn_kv="none", score_bias=-24.0),
    "row4_bias8": MoDAConfig(score_bias=-8.0),
}


def _continued(depth: DepthConfig) -> Config:
    """The same 65,536 tokens a step as elsewhere, in rows of 1,024."""
    run = train(dataclasses.replace(_SMOLLM2, depth=depth), tokens=20e6, rate=1e-4)
    return dataclasses.replace(run, data=_DATA, batch_size=64, init_from="runs/smollm2")


experiment = Experiment(
    name="continued",
    title="SmolLM2-135M continued on 20 M tokens of books, plain and as MoDA",
    configs={label: _continued(depth) for label, depth in _VARIANTS.items()},
    seeds=(0, 1, 2),
    baseline="plain",
    speed=expected_speed,
)
