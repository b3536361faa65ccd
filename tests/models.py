"""Small models for tests, with random weights that cost no compilation."""

import jax
import numpy as np
from flax import nnx

from moda_jax.config import ModelConfig
from moda_jax.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=37,
    num_layers=4,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=40,
    compute_dtype="float32",
)

VARIANTS = {
    "residual": {"depth_stream": "residual"},
    "row3": {"depth_ffn_kv": "none"},
    "row4": {},
    "row5": {"depth_attention_kv": "project"},
    "row5-without-ffn": {"depth_attention_kv": "project", "depth_ffn_kv": "none"},
    "every2": {"depth_write_every": 2},
    "every3-row5": {"depth_write_every": 3, "depth_attention_kv": "project"},
    "bounded": {"depth_window": 3, "depth_reserved": 1},
    "pre-head-bias": {"norm_placement": "pre", "qk_norm": "head", "use_bias": True},
    "post-none": {"norm_placement": "post", "qk_norm": "none"},
    "tied": {"tie_embeddings": True},
}
"""Changes to `SMALL`: every depth stream, norm placement and QK-norm."""


def random_model(config: ModelConfig, std: float = 0.2) -> Transformer:
    """`Transformer(config)` with normal weights drawn by numpy; norm scales around 1."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def draw(path, leaf):
        mean = 1.0 if any(getattr(key, "key", None) == "scale" for key in path) else 0.0
        return jax.numpy.asarray(rng.normal(mean, std, leaf.shape).astype(leaf.dtype))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))
