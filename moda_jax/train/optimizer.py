"""AdamW or Muon, the learning-rate schedules, and which parameters decay."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from moda_jax.config import OptimizerConfig

INPUT_EMBEDDING = "embedding"
"""Name of the model's input embedding parameter (its path's first key)."""

MATCHED_RMS = 0.2
"""Root mean square of the entries of Muon's update at learning rate 1 (arXiv 2502.16982, section
2.2)."""


def learning_rate_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Learning rate of a step, given the number of steps already done, skipped ones included.

    With s = count + 1 the number of the step (1 … steps), W warm-up steps, peak p and final
    fraction f:

        s ≤ W:  p · s / W                                       (0 would be step 0)
        s > W:  p · (f + (1 − f) · (1 + cos(π · (s − W) / (steps − W))) / 2)         "cosine"
                p · (1 − (1 − f) · max(s − S, 0) / (steps − S))                      "wsd"

    where S = max(steps − round(decay_fraction · steps), W) is the last step of the stable phase.
    So step W has the peak, the last step exactly p · f, and any later step too. A run with
    steps ≤ W never leaves the warm-up. Until S a wsd curve does not depend on `steps`: a run that
    is continued from there with more steps is one that had them from the start. The linear decay is
    Hägele et al.'s (arXiv 2405.18392), who find that 20% of the steps suffice.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    up = optax.linear_schedule(0.0, peak, max(warmup, 1))
    if config.schedule == "cosine":
        down = optax.cosine_decay_schedule(
            peak, max(steps - warmup, 1), alpha=config.final_fraction
        )
        curve = optax.join_schedules([up, down], boundaries=[warmup])
    else:
        stable = max(steps - round(config.decay_fraction * steps), warmup)
        down = optax.linear_schedule(peak, peak * config.final_fraction, max(steps - stable, 1))
        curve = optax.join_schedules(
            [up, optax.constant_schedule(peak), down], boundaries=[warmup, stable]
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
    """Clip by global norm, then AdamW or Muon with decoupled decay; also the schedule.

    The update of a decaying parameter w is −lr · (u + weight_decay · w), where AdamW's u is
    m̂ / (√v̂ + eps) and Muon's, for a matrix of R rows and C columns (`matrix_axes`), is

        u = 0.2 · √max(R, C) · NewtonSchulz₅(momentum · m̂' + (1 − momentum) · ĝ),

    Nesterov's look-ahead m̂' of the mean of gradients, whose singular values five rounds of Newton
    and Schulz bring close to 1 (Jordan et al., 2024; optax.contrib.scale_by_muon). Such a matrix
    has entries of root mean square 1/√max(R, C), so the factor (Liu et al., arXiv 2502.16982,
    section 2.2) gives every matrix an update whose entries are as large as those of AdamW's, 0.2 to
    0.4 in training: one learning rate and one weight decay serve both parts, and a rate that was
    found for AdamW is a good first try for Muon.

    Its `update` takes `is_good` besides, a bool scalar; where that is False the moments stay as
    they were and the update means nothing.
    """
    schedule = learning_rate_schedule(config, steps=steps)
    scaled = _scale_by_adam(config.beta1, config.beta2, config.eps)
    if config.name == "muon":
        parts = {"muon": _scale_by_muon(config.momentum, config.eps), "adamw": scaled}
        scaled = optax.partition(parts, _optimizer_of_each)
    decayed = optax.chain(
        scaled,
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), decayed), schedule


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


def _scale_by_muon(momentum: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """optax.contrib.scale_by_muon and the factor that matches AdamW, for stacked matrices.

    It keeps its state where `is_good` is False.
    """
    muon = contrib.scale_by_muon(beta=momentum, eps=eps, weight_dimension_numbers=_matrices)

    def update(gradients, state, params=None, *, is_good=True):
        updates, new = muon.update(gradients, state, params)
        kept = jax.tree.map(functools.partial(jnp.where, is_good), new, state)
        scaled = jax.tree.map(_match_rms, updates, is_leaf=_is_parameter)
        return scaled, kept

    return optax.GradientTransformationExtraArgs(muon.init, update)


def matrix_axes(logical_axes: Sequence[str | None]) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter are a matrix's rows and columns; None: it is no matrix for Muon.

    A matrix has the residual stream ("embed") on one side; all other axes but "layers" together are
    the other side, and every index of "layers" has a matrix of its own:

        query, key, value, depth keys and values   [L, D, N, H]: D rows, N·H columns
        attention's output                         [L, N, H, D]: N·H rows, D columns
        gate, up; down                             [L, D, F]; [L, F, D]
        matrices of `dense` (one a pair of layers) [P, D, D]

    All heads are one matrix, as Muon's authors have it. The vocabulary's matrices, embedding and
    head, are none for Muon: their gradient's rows belong to tokens, of which most are rare. Norm
    scales, biases and the small gates of mechanisms are none either.

    Args:
        logical_axes: a name for each axis, as `moda_jax.ops.sharding.RULES` has them.
    """
    axes = [axis for axis, name in enumerate(logical_axes) if name != "layers"]
    names = [logical_axes[axis] for axis in axes]
    if len(axes) < 2 or "vocab" in names or names.count("embed") != 1:
        return None
    rows = 1 if names[0] == "embed" else len(axes) - 1
    return contrib.MuonDimensionNumbers(tuple(axes[:rows]), tuple(axes[rows:]))


def _is_parameter(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _axes_of(parameter: Any) -> contrib.MuonDimensionNumbers | None:
    if not _is_parameter(parameter):
        raise ValueError(f"params: expected parameters with logical_axes, got {type(parameter)}")
    return matrix_axes(parameter.get_metadata()["logical_axes"])


def _optimizer_of_each(params: Any) -> Any:
    """The name of its part in the place of every parameter."""
    return jax.tree.map(
        lambda parameter: "adamw" if _axes_of(parameter) is None else "muon",
        params,
        is_leaf=_is_parameter,
    )


def _matrices(params: Any) -> Any:
    """A tree like `params`, whose other part is masked, with rows and columns as its leaves."""
    return jax.tree.map(
        lambda parameter: jax.tree.map(lambda _: _axes_of(parameter), parameter),
        params,
        is_leaf=_is_parameter,
    )


def _match_rms(update: Any) -> Any:
    axes = _axes_of(update)
    assert axes is not None
    sides = (axes.reduction_axis, axes.output_axis)
    (shape,) = (leaf.shape for leaf in jax.tree.leaves(update))
    longest = max(math.prod(shape[axis] for axis in side) for side in sides)
    return jax.tree.map(lambda u: MATCHED_RMS * longest**0.5 * u, update)
