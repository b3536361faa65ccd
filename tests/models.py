"""Small models for tests, with random weights that cost no compilation."""

import jax
import numpy as np
from flax import nnx

from moda_jax.config import (
    AttentionResidualsConfig,
    DenseConfig,
    DepthAttentionConfig,
    ExecutionConfig,
    HyperConnectionsConfig,
    MHCConfig,
    MoDAConfig,
    ModelConfig,
    ResidualConfig,
)
from moda_jax.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=37,
    num_layers=4,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=40,
)

FLOAT32 = ExecutionConfig(compute_dtype="float32", remat="full")

VARIANTS = {
    "residual": {"depth": ResidualConfig()},
    "row3": {"depth": MoDAConfig(ffn_kv="none")},
    "row4": {},
    "row5": {"depth": MoDAConfig(attention_kv="project")},
    "row5-without-ffn": {"depth": MoDAConfig(attention_kv="project", ffn_kv="none")},
    "every2": {"depth": MoDAConfig(write_every=2)},
    "every3-row5": {"depth": MoDAConfig(write_every=3, attention_kv="project")},
    "bounded": {"depth": MoDAConfig(window=3, reserved=1)},
    "pre-head-bias": {"norm_placement": "pre", "qk_norm": "head", "use_bias": True},
    "post-none": {"norm_placement": "post", "qk_norm": "none"},
    "tied": {"tie_embeddings": True},
}
"""Changes to `SMALL`: every way in which MoDA writes, every norm placement and QK-norm."""

MECHANISMS = {
    "dense": {"depth": DenseConfig()},
    "dense-matrix": {"depth": DenseConfig(form="matrix")},
    "depth-attention": {"depth": DepthAttentionConfig()},
    "attention-residuals": {"depth": AttentionResidualsConfig()},
    "attention-residuals-block": {"depth": AttentionResidualsConfig(form="block", num_blocks=3)},
    "hyper-connections": {"depth": HyperConnectionsConfig(num_streams=2)},
    "mhc": {"depth": MHCConfig(num_streams=2, sinkhorn_rounds=4)},
}
"""Changes to `SMALL`: the other ways of using depth."""


def random_model(
    config: ModelConfig, execution: ExecutionConfig = FLOAT32, std: float = 0.2
) -> Transformer:
    """A `Transformer` with normal weights drawn by numpy.

    They lie around 0, norm scales around 1, and the mixing of streams around the identity: where
    streams shrink from layer to layer, one rounding of the weights moves logits by 5e-5.
    """
    rng = np.random.default_rng(0)

    def make():
        return Transformer(config, rngs=nnx.Rngs(0), execution=execution)

    graph, state = nnx.split(nnx.eval_shape(make))

    def draw(path, leaf):
        names = {getattr(key, "key", None) for key in path}
        mean = 1.0 if "scale" in names else 0.0
        mean = np.eye(leaf.shape[-1]) if "residual_bias" in names else mean
        return jax.numpy.asarray(rng.normal(mean, std, leaf.shape).astype(leaf.dtype))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))
