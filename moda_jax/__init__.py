"""Mixture-of-Depths Attention (Zhu et al., arXiv 2603.15619) for JAX."""

from moda_jax.config import Config, ExecutionConfig, ModelConfig
from moda_jax.model.custom import depth_stack
from moda_jax.model.flops import count_flops, count_parameters
from moda_jax.model.generation import generate
from moda_jax.model.transformer import Transformer
from moda_jax.ops.attention import HeadsBeforeTokensWarning, explain_attention, moda_attention
from moda_jax.ops.backends import AttentionChoice, SlowAttentionWarning
from moda_jax.ops.depth_cache import DepthCache
from moda_jax.train.losses import next_token_loss
from moda_jax.train.trained import TrainedModel, load_trained

__all__ = [
    "AttentionChoice",
    "Config",
    "DepthCache",
    "ExecutionConfig",
    "HeadsBeforeTokensWarning",
    "ModelConfig",
    "SlowAttentionWarning",
    "TrainedModel",
    "Transformer",
    "count_flops",
    "count_parameters",
    "depth_stack",
    "explain_attention",
    "generate",
    "load_trained",
    "moda_attention",
    "next_token_loss",
]
