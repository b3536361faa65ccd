"""TPU chips: their peaks, and how to compile for them on a machine that has none.

    pip install -e ".[tpu]"

is all that ahead-of-time compilation needs: libtpu compiles for a named topology without a chip.
"""

import os
from typing import Any, NamedTuple

# Nothing runs here, so JAX need not look for a chip (libtpu is loaded for its compiler alone).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu would otherwise ask the cloud's metadata server which machine this is, and wait for it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Compilation holds no chip, so several processes may do it at a time.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax


class Chip(NamedTuple):
    """Peaks of one chip with all its cores, which is one JAX device.

    FLOP/s, bandwidth and memory: cloud.google.com/tpu/docs/v5e, v5p, v6e. The vector unit's rate is
    an estimate: cores · 8 sublanes · 128 lanes · 4 ALUs · clock, the ALUs as in "How to Scale Your
    Model" (jax-ml.github.io/scaling-book/tpus, appendix A), the clock of v5e and v5p as it follows
    from their matrix peak, v6e's assumed to be v5p's.
    """

    name: str
    topology: str
    """The smallest to compile for, of one host."""
    mxu_flops: float
    """bfloat16 products, FLOP/s."""
    hbm_bandwidth: float
    """Bytes per second."""
    hbm_bytes: float
    vpu_ops: float
    """float32 operations per second, estimated."""
    mxu_size: int
    """Rows and columns of the systolic array: a product's smaller sides are rounded up to it."""
    ici_bandwidth: float
    """Bytes per second over all links, both directions."""
    cores: int = 1
    """Steps of a grid's parallel axes run on all of them."""

    @property
    def exps(self) -> float:
        """Exponentials per second, estimated: they have a unit of their own, as wide as one ALU."""
        return self.vpu_ops / 4


GRID_STEP_SECONDS = 0.35e-6
"""Overhead of one step of a kernel's grid, from the Pallas documentation (TPU pipelining)."""

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5e:2x2", 197e12, 819e9, 16 * 2**30, 1024 * 4 * 1.5e9, 128, 400e9),
        Chip("v5p", "v5p:2x2x1", 459e12, 2765e9, 95 * 2**30, 2 * 1024 * 4 * 1.75e9, 128, 1200e9, 2),
        Chip("v6e", "v6e:2x2", 918e12, 1600e9, 32 * 2**30, 1024 * 4 * 1.75e9, 256, 800e9),
    )
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology's name, "v5e:4x4"; raises ValueError for one without peaks here."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(f"topology: expected one of {', '.join(CHIPS)}:SHAPE, got {topology!r}")
    return CHIPS[name]


def devices(topology: str) -> list[jax.Device]:
    """Devices of a topology, to compile for and not to run on.

    Raises RuntimeError if libtpu is not installed or does not know the topology.
    """
    from jax.experimental import topologies

    try:
        description: Any = topologies.get_topology_desc(topology, platform="tpu")
    except Exception as error:  # of several kinds: ImportError, RuntimeError, JaxRuntimeError
        raise RuntimeError(
            f"cannot compile for {topology}: {error}; pip install -e '.[tpu]' has libtpu"
        ) from error
    return list(description.devices)
