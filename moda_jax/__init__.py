"""Mixture-of-Depths Attention (Zhu et al., arXiv 2603.15619) for JAX."""

from moda_jax.attention import explain_attention, moda_attention
from moda_jax.config import Config, ModelConfig

__all__ = ["Config", "ModelConfig", "explain_attention", "moda_attention"]
