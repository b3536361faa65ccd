"""Mixture-of-Depths Attention (Zhu et al., arXiv 2603.15619) for JAX."""

from moda_jax.attention import explain_attention, moda_attention
from moda_jax.backends import AttentionChoice, SlowAttentionWarning
from moda_jax.checkpoint import TrainedModel, load_trained
from moda_jax.config import Config, ModelConfig
from moda_jax.depth_cache import DepthCache
from moda_jax.flops import count_flops, count_parameters
from moda_jax.generation import generate
from moda_jax.losses import next_token_loss
from moda_jax.model import Transformer

__all__ = [
    "AttentionChoice",
    "Config",
    "DepthCache",
    "ModelConfig",
    "SlowAttentionWarning",
    "TrainedModel",
    "Transformer",
    "count_flops",
    "count_parameters",
    "explain_attention",
    "generate",
    "load_trained",
    "moda_attention",
    "next_token_loss",
]
