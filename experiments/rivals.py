"""Every way of using depth at equal parameters, 24 layers, at each one's best rate.

Parameters are those of MoDA with FFN KV (row 4 of Table 3): the FFN of the others is widened, or
narrowed. A plain model at its own size is there besides.

Command:  moda-jax sweep experiments/rivals.py    (after rival_rates.py)
"""

from experiments.recipe import FFN_KV, PLAIN, expected_speed, like, model, train
from moda_jax.config import (
    AttentionResidualsConfig,
    DenseConfig,
    DepthAttentionConfig,
    DepthConfig,
    HyperConnectionsConfig,
    MHCConfig,
    MoDAConfig,
    ModelConfig,
)
from moda_jax.config.depth import NormPlacement
from moda_jax.sweep import Experiment

NORMS: tuple[NormPlacement, ...] = ("post", "pre")
DEPTHS: dict[str, DepthConfig] = {
    "residual": PLAIN,
    "dense": DenseConfig(),
    "depth_attention": DepthAttentionConfig(),
    "moda_row3": MoDAConfig(ffn_kv="none"),
    "moda_row4": FFN_KV,
    "attention_residuals": AttentionResidualsConfig(),
    "attention_residuals_block": AttentionResidualsConfig(form="block"),
    "hyper_connections": HyperConnectionsConfig(),
    "mhc": MHCConfig(),
}


def models() -> dict[str, ModelConfig]:
    """By label: every mechanism at every norm placement that it is defined for."""
    return {
        f"{name}_{norm}": like(model(depth, norm=norm), model(FFN_KV, norm=norm))
        for norm in NORMS
        for name, depth in DEPTHS.items()
        if norm in depth.placements
    }


_CONFIGS = {f"plain_{norm}": train(model(PLAIN, norm=norm), tokens=50e6) for norm in NORMS}
_CONFIGS |= {label: train(model, tokens=50e6) for label, model in models().items()}

experiment = Experiment(
    name="rivals",
    title="Ways of using depth at equal parameters, 24 layers, 50 M tokens of books and code",
    configs=_CONFIGS,
    seeds=(0, 1),
    baseline={
        label: f"residual_{label.rpartition('_')[2]}"
        for label in _CONFIGS
        if not label.startswith("residual")
    },
    speed=expected_speed,
)
