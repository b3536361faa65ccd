"""AdamW, its learning-rate schedule and which parameters decay, as OLMo 2 trains."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moda_jax.config import OptimizerConfig

INPUT_EMBEDDING = "embedding"
"""Name of the model's input embedding parameter (its path's first key)."""


def learning_rate_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Learning rate of a step, given the number of steps already done, skipped ones included.

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


def num_updates(state: Any) -> jax.Array:
    """int32 scalar: updates in `make_optimizer`'s state; skipped steps are left out."""
    return optax.tree.get(
        state, "count", filtering=lambda path, _: path[-1].tuple_name == "ScaleByAdamState"
    )


def make_optimizer(
    config: OptimizerConfig, *, steps: int
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """Clip by global norm, then AdamW with decoupled decay; also the schedule, for the metrics.

    The update of a decaying parameter w is −lr · (m̂ / (√v̂ + eps) + weight_decay · w). Its `update`
    takes `is_good` besides, a bool scalar; where that is False the moments stay as they were and
    the update means nothing.
    """
    schedule = learning_rate_schedule(config, steps=steps)
    adamw = optax.chain(
        _scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw), schedule


def _scale_by_adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, bit for bit, that keeps its state where `is_good` is False.

    The choice stands between a moment and its use: behind the update, as optax.apply_if_finite
    makes it, the new moments are a copy in memory and a pass over them.
    """

    def update(gradients, state, params=None, *, is_good=True):
        def choose(new, old):
            return jax.tree.map(functools.partial(jnp.where, is_good), new, old)

        mu = choose(optax.tree.update_moment(gradients, state.mu, beta1, 1), state.mu)
        nu = choose(optax.tree.update_moment_per_elem_norm(gradients, state.nu, beta2, 2), state.nu)
        count = choose(optax.safe_increment(state.count), state.count)
        mean = optax.tree.bias_correction(mu, beta1, count)
        square = optax.tree.bias_correction(nu, beta2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)
