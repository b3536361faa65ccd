"""A plain transformer: every sublayer reads the residual stream h and writes h + f(h)."""

from moda_jax.config import ResidualConfig
from moda_jax.depth.mechanism import Mechanism


class Residual(Mechanism[ResidualConfig]):
    """The protocol's defaults are the residual stream."""
