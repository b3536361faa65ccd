"""Mixture-of-Depths Attention (Zhu et al., arXiv 2603.15619) for JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# The names are imported when they are first used: importing JAX takes seconds, and neither the
# processes that tokenize text nor a mistyped command line need it.
_MODULES = {
    "AttentionChoice": "moda_jax.ops.backends",
    "Config": "moda_jax.config",
    "DepthCache": "moda_jax.ops.depth_cache",
    "ExecutionConfig": "moda_jax.config",
    "HeadsBeforeTokensWarning": "moda_jax.ops.attention",
    "ModelConfig": "moda_jax.config",
    "SlowAttentionWarning": "moda_jax.ops.backends",
    "TrainedModel": "moda_jax.train.trained",
    "Transformer": "moda_jax.model.transformer",
    "count_flops": "moda_jax.model.flops",
    "count_parameters": "moda_jax.model.flops",
    "depth_stack": "moda_jax.model.custom",
    "explain_attention": "moda_jax.ops.attention",
    "generate": "moda_jax.model.generation",
    "load_trained": "moda_jax.train.trained",
    "moda_attention": "moda_jax.ops.attention",
    "next_token_loss": "moda_jax.train.losses",
}
_PACKAGES = ("config", "data", "depth", "layers", "model", "ops", "train")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        for module in {*_MODULES.values(), f"moda_jax.{name}"}:
            importlib.import_module(module)
        return importlib.import_module(f"moda_jax.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
