"""Trains a model: `python train.py [CONFIG.py] [--dotted.overrides]`; see `--help`."""

import sys

from moda_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
