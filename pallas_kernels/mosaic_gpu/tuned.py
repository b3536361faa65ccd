"""Tile sizes of these kernels that were measured, by device kind; see `pallas_kernels.tuned`."""

from pathlib import Path

import jax

from pallas_kernels.tuned import Config, Table, table_key

TABLE = Table(Path(__file__).with_name("tuned.json"))


def tuned(kernel: str, default: Config, *, head_dim: int, group: int, is_causal: bool) -> Config:
    """The measured config for the device at hand, or `default`."""
    if jax.default_backend() != "gpu":
        return default
    device = jax.devices()[0].device_kind
    return TABLE.lookup(table_key(kernel, head_dim, group, is_causal, device), default)
