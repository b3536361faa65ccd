"""Tile sizes of the kernels: measured ones, keyed by architecture, and for the rest a heuristic."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.triton_gpu.tuned import Table, table_key

TABLE = Table(Path(__file__).with_name("tuned.json"))


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Sizes of one kernel's program."""

    rows: int
    """Query rows: tokens times the group's heads, these padded to a power of two."""
    keys: int
    """Keys; of the depth kernels the (slot, token) columns of a block."""
    num_warps: int
    num_stages: int


_HALF = {
    ("sequence_forward", 64): TileConfig(128, 64, 4, 3),
    ("sequence_forward", 128): TileConfig(128, 64, 8, 3),
    ("sequence_dkv", 64): TileConfig(64, 128, 8, 3),
    ("sequence_dkv", 128): TileConfig(64, 128, 8, 2),
    ("sequence_dq", 64): TileConfig(128, 64, 8, 3),
    ("sequence_dq", 128): TileConfig(128, 64, 8, 2),
    ("depth_forward", 64): TileConfig(16, 64, 1, 3),
    ("depth_forward", 128): TileConfig(16, 64, 2, 2),
    ("depth_backward", 64): TileConfig(16, 64, 2, 2),
    ("depth_backward", 128): TileConfig(16, 64, 4, 2),
    ("chunk_forward", 64): TileConfig(64, 64, 4, 2),
    ("chunk_forward", 128): TileConfig(64, 64, 4, 2),
    ("chunk_dkv", 64): TileConfig(64, 64, 4, 2),
    ("chunk_dkv", 128): TileConfig(64, 64, 8, 2),
    ("chunk_dq", 64): TileConfig(64, 64, 4, 2),
    ("chunk_dq", 128): TileConfig(64, 64, 8, 2),
}
"""By kernel and padded head size (64: and smaller), for 16-bit types."""


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def heuristic(
    kernel: str, *, head_dim: int, group: int, dtype: jnp.dtype, architecture: str
) -> TileConfig:
    """What runs on every GPU of a make: NVIDIA's have 99 KiB of shared memory for a block and 255
    registers a thread, AMD's 64 KiB, and 256 registers if a block has more than 256 threads.
    """
    is_amd, is_wide = architecture.startswith("gfx"), head_dim > 64
    config = _HALF[kernel, 128 if is_wide else 64]
    if jnp.dtype(dtype).itemsize == 4:  # products without tensor cores keep operands in registers
        config = TileConfig(min(config.rows, 32), 32, 8 if is_wide and not is_amd else 4, 1)
    elif is_amd:
        rows = 32 if is_wide and kernel == "sequence_dkv" else 64
        config = TileConfig(
            min(config.rows, rows), min(config.keys, 64), min(config.num_warps, 4), 2
        )
    return dataclasses.replace(config, rows=max(config.rows, padded(group)))


def choose(
    kernel: str, *, head_dim: int, group: int, is_causal: bool, dtype: jnp.dtype
) -> TileConfig:
    """The table's config for the GPU at hand, or the heuristic's."""
    config = heuristic(
        kernel, head_dim=head_dim, group=group, dtype=dtype, architecture=architecture()
    )
    if platforms.current() != "gpu" or jnp.dtype(dtype).itemsize == 4:
        return config
    for similar in _similar_groups(kernel, group):
        for causal in (True, is_causal):  # the nearest thing to an entry that is not there
            key = table_key(kernel, head_dim, similar, causal, architecture())
            config = TABLE.lookup(key, config)
    return dataclasses.replace(config, rows=max(config.rows, padded(group)))


def _similar_groups(kernel: str, group: int) -> list[int]:
    """The groups whose entries do for `group`, the best one last.

    To a sequence kernel a row is a row, whether a tile has few tokens with many heads each or many
    with few, so the nearest group that was measured stands in. A depth kernel's tile is about its
    tokens, each of which has slots of its own.
    """
    if not kernel.startswith("sequence"):
        return [group]
    groups = sorted({1, 2, 4, 8, 16, 32, 64, group})
    return sorted(groups, key=lambda other: abs(math.log2(other / group)), reverse=True)


def architecture() -> str:
    """Of the first device, "sm_90" or "gfx942"; all devices of a mesh are of one kind.

    Compiled for a GPU that is not here: sm_80, whose code later ones run, too.
    """
    if platforms.current() == "gpu" and jax.default_backend() in ("gpu", "cuda", "rocm"):
        capability = str(getattr(jax.devices()[0], "compute_capability", "8.0"))
        return capability.split(":")[0] if "gfx" in capability else sm_name(capability)
    return "sm_80"


def sm_name(capability: str) -> str:
    return "sm_" + capability.replace(".", "")
