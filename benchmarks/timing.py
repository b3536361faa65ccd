"""Milliseconds of compiled functions on a device that runs asynchronously."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def milliseconds(function: Callable[..., Any], *args: Any, budget: float = 0.3) -> float:
    """Median over 5 rounds of back-to-back calls; a round takes about a fifth of `budget` s."""
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    once = time.perf_counter() - start
    calls = max(1, min(50, int(budget / 5 / max(once, 1e-6))))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(rounds)


def copy_bandwidth(nbytes: int) -> float:
    """TB/s of a device copy, counting what is read and what is written."""
    x = jnp.ones((nbytes // 4,), jnp.float32)
    return 2 * nbytes / milliseconds(jax.jit(lambda x: x + 1), x) / 1e9


def matmul_rate(size: int) -> float:
    """TFLOP/s of a bfloat16 product on normal data."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    return 2 * size**3 / milliseconds(jax.jit(lambda x: x @ x), x) / 1e9
