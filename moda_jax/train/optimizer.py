"""AdamW, its learning-rate schedule and which parameters decay, as OLMo 2 trains."""

from typing import Any

import jax
import optax

from moda_jax.config import OptimizerConfig

INPUT_EMBEDDING = "embedding"
"""Name of the model's input embedding parameter (its path's first key)."""


def learning_rate_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Learning rate of an update, given the number of updates already done.

    With s = count + 1 the number of the step (1 … steps), W warm-up steps, peak p and final
    fraction f:

        s ≤ W:  p · s / W                                       (0 would be step 0)
        s > W:  p · (f + (1 − f) · (1 + cos(π · (s − W) / (steps − W))) / 2)

    so step W has the peak, the last step exactly p · f, and any later step too. A run with
    steps ≤ W never leaves the warm-up.
    """
    warmup = config.warmup_steps
    curve = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, max(warmup, 1)),
            optax.cosine_decay_schedule(
                config.learning_rate, max(steps - warmup, 1), alpha=config.final_fraction
            ),
        ],
        boundaries=[warmup],
    )
    return lambda count: curve(count + 1)


def decay_mask(params: Any) -> Any:
    """True for every parameter that weight decay shrinks: all but the input embedding.

    OLMo 2 exempts the input embedding, since small embeddings make the first layers' gradients
    large. That reason holds for tied embeddings too, so a tied matrix, input embedding and output
    head in one, does not decay either. Norm scales and biases decay, as in OLMo 2.

    Raises:
        ValueError: `params` has no input embedding, so nothing would be exempt.
    """

    def decays(path: tuple, _: Any) -> bool:
        return getattr(path[0], "key", None) != INPUT_EMBEDDING

    mask = jax.tree_util.tree_map_with_path(decays, params)
    if all(jax.tree.leaves(mask)):
        raise ValueError(f"params: expected a parameter named {INPUT_EMBEDDING!r}, found none")
    return mask


def make_optimizer(
    config: OptimizerConfig, *, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clip by global norm, then AdamW with decoupled decay; also the schedule, for the metrics.

    The update of a decaying parameter w is −lr · (m̂ / (√v̂ + eps) + weight_decay · w).
    """
    schedule = learning_rate_schedule(config, steps=steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
    return optimizer, schedule
