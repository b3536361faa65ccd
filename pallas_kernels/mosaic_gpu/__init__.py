"""MoDA for NVIDIA Hopper GPUs in Pallas Mosaic GPU (compute capability 9.0, JAX >= 0.11).

The forward is one fused kernel. The backward is a kernel for dk and dv and one for dq, which takes
the depth part along where it can; elsewhere, and for several layers' slots at once, the depth part
is a kernel of its own, as it is in a call without a sequence. For the layer stack, another gathers
a few slots' gradients from all layers that read them. All are deterministic.
"""

from pallas_kernels.mosaic_gpu.depth_gather import gather_depth_grads, keep_layer
from pallas_kernels.mosaic_gpu.operator import (
    backward,
    backward_without_depth_grads,
    forward,
    gather_refusal,
    refusal,
)

__all__ = [
    "backward",
    "backward_without_depth_grads",
    "forward",
    "gather_depth_grads",
    "gather_refusal",
    "keep_layer",
    "refusal",
]
