"""Means, spreads and differences of a few seeds, and losses at a given time."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moda_jax.sweep.results import Result


class Difference(NamedTuple):
    """Of two configs' losses."""

    mean: float
    error: float | None
    """Standard error of the mean; None: too few seeds to tell."""
    pairs: int
    """Seeds that both have; 0: the error is that of independent samples (Welch's)."""


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample (n − 1 in the denominator); None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def difference(losses: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Mean of `losses` minus mean of `baseline`, both by seed; None if either is empty.

    Over the seeds that both have, pair by pair, as a seed fixes the order of the data and pairs
    share its luck: sd(d) / √n for n differences d. Without a common seed √(s₁²/n₁ + s₂²/n₂).
    """
    seeds = sorted(losses.keys() & baseline.keys())
    if seeds:
        pairs = [losses[seed] - baseline[seed] for seed in seeds]
        spread = deviation(pairs)
        error = None if spread is None else spread / math.sqrt(len(pairs))
        return Difference(statistics.fmean(pairs), error, len(pairs))
    if not losses or not baseline:
        return None
    samples = [list(losses.values()), list(baseline.values())]
    mean = statistics.fmean(samples[0]) - statistics.fmean(samples[1])
    spreads = [deviation(sample) for sample in samples]
    if None in spreads:
        return Difference(mean, None, 0)
    squares = [s**2 / len(x) for s, x in zip(spreads, samples, strict=True) if s is not None]
    return Difference(mean, math.sqrt(sum(squares)), 0)


def loss_at(result: Result, seconds: float) -> float | None:
    """The validation loss that a finished run had after `seconds` of training steps, nats.

    Between two validations on a straight line; after the run's end, its last loss. The validations
    in mid-run are over fewer batches than the last one; all are shifted by what the two differ by
    at the last step. None before the first validation, or where nothing was timed.
    """
    if result.validation_loss is None or not result.seconds or not result.steps:
        return None
    if seconds >= result.seconds:
        return result.validation_loss
    curve = result.validation_curve
    step = seconds / result.seconds * result.steps
    if not curve or step < curve[0][0]:
        return None
    shift = result.validation_loss - curve[-1][1] if curve[-1][0] == result.steps else 0.0
    for (left, high), (right, low) in itertools.pairwise(curve):
        if left <= step <= right:
            return high + (low - high) * (step - left) / (right - left) + shift
    return curve[-1][1] + shift
