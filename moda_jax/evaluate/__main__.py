"""`python -m moda_jax.evaluate run --model moda_jax ...`: lm_eval's command with this model."""

from lm_eval.__main__ import cli_evaluate

from moda_jax.evaluate.harness import register

if __name__ == "__main__":
    register()
    cli_evaluate()
