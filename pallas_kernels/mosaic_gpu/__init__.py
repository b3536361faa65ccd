"""MoDA for NVIDIA Hopper GPUs in Pallas Mosaic GPU (compute capability 9.0, JAX >= 0.11).

The forward is one fused kernel. The backward is a kernel for dk and dv and one for dq, which takes
the depth part along where it can; elsewhere, and in a call without a sequence, the depth part is a
kernel of its own. For the layer stack, another kernel gathers a few slots' gradients from all
layers whose queries read them. All are deterministic.
"""

from pallas_kernels.contract import GatheringKernels
from pallas_kernels.mosaic_gpu.depth.gather import gather_depth_grads, keep_layer
from pallas_kernels.mosaic_gpu.operator import (
    backward,
    forward,
    gather_unsupported_reason,
    unsupported_reason,
)

GATHERING = GatheringKernels(keep_layer, gather_depth_grads, gather_unsupported_reason)

__all__ = ["GATHERING", "backward", "forward", "unsupported_reason"]
