"""Many runs from one list: `moda-jax sweep FILE` runs them, keeps their results and compares."""

from moda_jax.sweep.experiment import Experiment

__all__ = ["Experiment"]
