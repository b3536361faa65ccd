"""MoDA in plain XLA: every device, every call; memory linear in T."""

from pallas_kernels.contract import GatheringKernels
from pallas_kernels.xla.backward import backward
from pallas_kernels.xla.depth_gather import (
    gather_depth_grads,
    gather_unsupported_reason,
    keep_layer,
)
from pallas_kernels.xla.forward import forward, unsupported_reason

GATHERING = GatheringKernels(keep_layer, gather_depth_grads, gather_unsupported_reason)

__all__ = ["GATHERING", "backward", "forward", "unsupported_reason"]
