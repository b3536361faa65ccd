"""Small models for tests, with random weights that cost no compilation."""

import jax
import numpy as np
from flax import nnx

from moda_jax.config import ModelConfig
from moda_jax.model import Transformer


def random_model(config: ModelConfig, std: float = 0.2) -> Transformer:
    """`Transformer(config)` with normal weights drawn by numpy; norm scales around 1."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def draw(path, leaf):
        mean = 1.0 if any(getattr(key, "key", None) == "scale" for key in path) else 0.0
        return jax.numpy.asarray(rng.normal(mean, std, leaf.shape).astype(leaf.dtype))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))
