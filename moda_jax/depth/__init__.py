"""The ways of using depth, one file each, and their registry."""

from moda_jax.config import ModelConfig
from moda_jax.depth.attention_residuals import AttentionResiduals
from moda_jax.depth.dense import Dense
from moda_jax.depth.depth_attention import DepthAttention
from moda_jax.depth.hyper_connections import HyperConnections
from moda_jax.depth.mechanism import Mechanism
from moda_jax.depth.mhc import MHC
from moda_jax.depth.moda import MoDA
from moda_jax.depth.residual import Residual

MECHANISMS: dict[str, type[Mechanism]] = {
    "residual": Residual,
    "dense": Dense,
    "depth_attention": DepthAttention,
    "moda": MoDA,
    "attention_residuals": AttentionResiduals,
    "hyper_connections": HyperConnections,
    "mhc": MHC,
}


def make_mechanism(config: ModelConfig) -> Mechanism:
    """The mechanism that `config.depth` names."""
    return MECHANISMS[config.depth.name](config)
