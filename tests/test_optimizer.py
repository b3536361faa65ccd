"""Schedules, decay mask, clipping and AdamW against their closed forms."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moda_jax.config import OptimizerConfig
from moda_jax.train.optimizer import (
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
    num_updates,
)

CONFIG = OptimizerConfig(learning_rate=2e-3, final_fraction=0.1, warmup_steps=10)


def closed_form(step: int, steps: int, config: OptimizerConfig) -> float:
    peak, warmup, final = config.learning_rate, config.warmup_steps, config.final_fraction
    if step <= warmup:
        return peak * step / warmup
    done = min((step - warmup) / (steps - warmup), 1.0)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedule_is_the_documented_curve(warmup):
    config = OptimizerConfig(learning_rate=2e-3, warmup_steps=warmup)
    schedule = learning_rate_schedule(config, steps=50)
    got = [float(schedule(step - 1)) for step in range(1, 61)]
    expected = [closed_form(step, 50, config) for step in range(1, 61)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_schedule_landmarks():
    schedule = learning_rate_schedule(CONFIG, steps=50)
    landmarks = {1: 2e-4, 10: 2e-3, 30: 2e-3 * 0.55, 50: 2e-4, 1000: 2e-4}
    for step, value in landmarks.items():
        assert float(schedule(step - 1)) == pytest.approx(value, rel=1e-6), step


def wsd(step: int, steps: int, config: OptimizerConfig) -> float:
    """Warm-up, stable, decay."""
    peak, warmup = config.learning_rate, config.warmup_steps
    stable = max(steps - round(config.decay_fraction * steps), warmup)
    if step <= warmup:
        return peak * step / warmup
    done = min(max(step - stable, 0) / (steps - stable), 1.0)
    return peak * (1 - (1 - config.final_fraction) * done)


@pytest.mark.parametrize("warmup", [0, 10, 45])
def test_warm_up_stable_decay_is_the_documented_curve(warmup):
    config = OptimizerConfig(
        learning_rate=2e-3, schedule="wsd", decay_fraction=0.3, warmup_steps=warmup
    )
    schedule = learning_rate_schedule(config, steps=50)
    got = [float(schedule(step - 1)) for step in range(1, 61)]
    # Close to 0 the line peak − (peak − 0) · (1 − s/W) of float32 is that much off.
    np.testing.assert_allclose(got, [wsd(step, 50, config) for step in range(1, 61)], rtol=1e-5)


def test_warm_up_stable_decay_landmarks():
    config = dataclasses.replace(CONFIG, schedule="wsd")  # decays in the last 20%
    landmarks = {1: 2e-4, 10: 2e-3, 40: 2e-3, 45: 1.1e-3, 50: 2e-4, 1000: 2e-4}
    longer = {10: 2e-3, 50: 2e-3, 80: 2e-3, 100: 2e-4}
    for steps, values in ((50, landmarks), (100, longer)):
        schedule = learning_rate_schedule(config, steps=steps)
        for step, value in values.items():
            assert float(schedule(step - 1)) == pytest.approx(value, rel=1e-6), step


def test_run_shorter_than_the_warmup_stays_in_it():
    for name in ("cosine", "wsd"):
        config = dataclasses.replace(CONFIG, schedule=name)
        schedule = learning_rate_schedule(config, steps=5)
        assert float(schedule(4)) == pytest.approx(1e-3, rel=1e-6)


def test_all_but_the_input_embedding_decay():
    params = {
        "embedding": jnp.ones(2),
        "head": jnp.ones(2),
        "layers": {"norm": jnp.ones(2), "ffn_embedding": jnp.ones(2)},
    }
    assert decay_mask(params) == {
        "embedding": False,
        "head": True,
        "layers": {"norm": True, "ffn_embedding": True},
    }


def test_renamed_embedding_is_not_silently_decayed():
    with pytest.raises(ValueError, match="'embedding', found none"):
        decay_mask({"wte": jnp.ones(2)})


def adamw_by_hand(gradients, weight, config, learning_rates, decay):
    """Kingma & Ba's AdamW with decoupled decay, in float64."""
    m = v = np.zeros_like(weight)
    for t, (g, lr) in enumerate(zip(gradients, learning_rates, strict=True), start=1):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
        step = m_hat / (np.sqrt(v_hat) + config.eps)
        weight = weight - lr * (step + decay * weight)
    return weight


def test_updates_are_adamw_with_clipping():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, clip_norm=1.0, weight_decay=0.5)
    optimizer, _ = make_optimizer(config, steps=4)
    params = {"embedding": jnp.array([1.0, -2.0]), "head": jnp.array([3.0])}
    state = optimizer.init(params)
    # Global norms 5 and 0.5: the first gradient is scaled down to norm 1, the second is left alone.
    raw = [([3.0, 0.0], [4.0]), ([0.3, 0.0], [-0.4])]
    clipped = [([0.6, 0.0], [0.8]), ([0.3, 0.0], [-0.4])]
    for embedding, head in raw:
        gradients = {"embedding": jnp.array(embedding), "head": jnp.array(head)}
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)

    rates = [closed_form(step, 4, config) for step in (1, 2)]
    for name, index, start, decay in (("embedding", 0, [1.0, -2.0], 0.0), ("head", 1, [3.0], 0.5)):
        gradients = [np.array(g[index]) for g in clipped]
        expected = adamw_by_hand(gradients, np.array(start), config, rates, decay)
        np.testing.assert_allclose(params[name], expected, rtol=1e-6)


def test_good_steps_are_bitwise_optax_and_a_bad_one_changes_no_moment():
    ours, schedule = make_optimizer(CONFIG, steps=50)
    theirs = optax.chain(
        optax.clip_by_global_norm(CONFIG.clip_norm),
        optax.adamw(
            schedule,
            b1=CONFIG.beta1,
            b2=CONFIG.beta2,
            eps=CONFIG.eps,
            weight_decay=CONFIG.weight_decay,
            mask=decay_mask,
        ),
    )
    rng = np.random.default_rng(0)
    params = {"embedding": jnp.ones((3, 5)), "head": jnp.ones(7)}
    state = theirs.init(params)
    chex.assert_trees_all_equal(ours.init(params), state)
    update = jax.jit(ours.update)
    expected_update = jax.jit(theirs.update)
    for _ in range(4):
        gradients = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        expected = expected_update(gradients, state, params)
        updates, after = update(gradients, state, params, is_good=True)
        chex.assert_trees_all_equal((updates, after), expected)
        _, skipped = update(jax.tree.map(lambda g: g * np.nan, gradients), state, params,
                            is_good=False)  # fmt: skip
        chex.assert_trees_all_equal(skipped[1][0], state[1][0])
        assert int(num_updates(after)) == int(num_updates(skipped)) + 1
        state = after
