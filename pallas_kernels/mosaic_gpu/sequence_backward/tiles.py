"""Tile sizes of the sequence backward's two kernels, and the plan of the one for dk and dv."""

import dataclasses
from typing import Any, NamedTuple

from jax import lax

from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.row_tiles import ForwardConfig
from pallas_kernels.mosaic_gpu.wgmma import (
    ROWS,
    cdiv,
    divmod_i32,
    heads_together,
    place,
    spread,
)


@dataclasses.dataclass(frozen=True)
class SequenceBackwardConfig:
    """Tile sizes of the two kernels; every compute warpgroup owns 64 rows."""

    dq_block_kv: int = 128  # keys of a ring stage
    dq_stages: int = 2
    dq_slot_stages: int = 3  # stages with slots, where that is faster and memory allows it
    dq_warpgroups: int = 2
    dkv_block_q: int = 128  # queries of a ring stage
    dkv_stages: int = 2
    dkv_warpgroups: int = 2
    dq_piles: int | None = None  # sorted tiles are dealt from so many piles; None: by the shapes
    depth_warpgroups: bool | None = None
    """For dq's slots, where their gradients are not wanted; None: where keys hide their loads."""
    depth_block_kv: int = 64  # dq_block_kv with depth warpgroups
    depth_stages: int = 3  # dq_stages with depth warpgroups
    depth_piles: int = 2  # dq_piles with depth warpgroups
    slot_stages: int = 3  # blocks of 8 slots that a depth warpgroup has in flight
    fuse_depth: bool = True  # the slots' gradients in the dq kernel, where a tile has all heads

    @property
    def dq_tiles(self) -> ForwardConfig:
        """The dq kernel's tiles, which are those of a forward."""
        return ForwardConfig(
            block_kv=self.dq_block_kv,
            stages=self.dq_stages,
            warpgroups=self.dq_warpgroups,
            persistent=False,
            turns=False,
            depth_parts=1,
            alternate=False,
            piles=self.dq_piles or 1,
            slot_stages=self.slot_stages,
        )

    def shared_memory(self, head_dim: int) -> int:
        """Bytes of shared memory of the dk, dv kernel, barriers rounded up."""
        row = head_dim * 2
        keys = self.dkv_warpgroups * ROWS * 2 * row
        return keys + self.dkv_stages * self.dkv_block_q * (2 * row + 12) + 2048

    def check(self, head_dim: int) -> None:
        """Raises ValueError for a config that the kernels or the chip cannot run."""
        blocks = (self.dq_block_kv, self.depth_block_kv, self.dkv_block_q)
        counts = (self.dq_warpgroups, self.dkv_warpgroups)
        if any(block % ROWS or block > 256 for block in blocks) or not set(counts) <= {1, 2, 3}:
            raise ValueError(
                f"config needs blocks of 64, 128, 192 or 256 and 1 to 3 warpgroups, got {self}"
            )
        stages = (self.dq_stages, self.dq_slot_stages, self.depth_stages, self.dkv_stages)
        if min(*stages, self.slot_stages + 1) < 2:
            raise ValueError(f"config needs at least 2 stages (slot_stages: 1), got {self}")
        if min(self.depth_piles, 1 if self.dq_piles is None else self.dq_piles) < 1:
            raise ValueError(f"config needs depth_piles and dq_piles >= 1 or None, got {self}")
        common.check_smem(self.shared_memory(head_dim), "sequence backward, dk, dv")


def sequence_backward_config(head_dim: int) -> SequenceBackwardConfig:
    """The tile sizes for a head size: those that leave the accumulators in registers."""
    if head_dim == 128:
        return SequenceBackwardConfig(dq_block_kv=64, dq_piles=2, dkv_block_q=64)
    return SequenceBackwardConfig()


class KeyPlan(NamedTuple):
    """Static numbers of a call."""

    config: SequenceBackwardConfig
    batch: int
    q_len: int
    kv_len: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: Any
    scale: float
    causal: bool
    segments: bool

    @property
    def dkv_steps(self) -> int:
        return cdiv(self.kv_len, ROWS * self.config.dkv_warpgroups)

    @property
    def q_rows(self) -> int:
        """Length of the arrays of rows: whole tiles."""
        return cdiv(self.q_len, ROWS) * ROWS

    @property
    def kv_rows(self) -> int:
        return self.dkv_steps * self.config.dkv_warpgroups * ROWS


class KeyRefs(NamedTuple):
    """The global arrays that the kernels see."""

    query: Any
    key: Any
    value: Any
    d_out: Any
    lse: Any
    minus_delta: Any
    query_segments: Any = None
    key_segments: Any = None
    ranges: Any = None


def key_tile(plan: KeyPlan):
    """Batch, KV head and place of this thread block's tile of keys; the first have most work."""
    length = max(plan.q_len * plan.group, plan.kv_len)
    together = heads_together(plan.batch * plan.kv_heads, length, plan.head_dim)
    head, index = place(lax.axis_index("block"), together, plan.dkv_steps)
    return *divmod_i32(head, plan.kv_heads), index


def same_segment(rows, columns, shape):
    """Whether row and column are of one segment; a padding query's equals no key's."""
    return spread(rows, shape, 0) == spread(columns, shape, 1)
