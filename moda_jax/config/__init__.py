"""Every setting of a run, as frozen typed dataclasses.

A config file in `configs/` builds one `Config`; the command line overrides single fields by dotted
names (`--model.num-layers 4`). Values are checked once, here, and an error names the field.
"""

from moda_jax.config.data import DataConfig, SourceConfig
from moda_jax.config.depth import (
    DEPTH_CONFIGS,
    AttentionResidualsConfig,
    DenseConfig,
    DepthAttentionConfig,
    DepthConfig,
    HyperConnectionsConfig,
    MHCConfig,
    MoDAConfig,
    ResidualConfig,
)
from moda_jax.config.files import dataclass_from_json, from_json, to_json
from moda_jax.config.model import ExecutionConfig, ModelConfig
from moda_jax.config.run import Config, MeshConfig, OptimizerConfig

__all__ = [
    "DEPTH_CONFIGS",
    "AttentionResidualsConfig",
    "Config",
    "DataConfig",
    "DenseConfig",
    "DepthAttentionConfig",
    "DepthConfig",
    "ExecutionConfig",
    "HyperConnectionsConfig",
    "MHCConfig",
    "MeshConfig",
    "MoDAConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ResidualConfig",
    "SourceConfig",
    "dataclass_from_json",
    "from_json",
    "to_json",
]
