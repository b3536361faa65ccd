"""MoDA for NVIDIA Hopper GPUs in Pallas Mosaic GPU (compute capability 9.0, JAX >= 0.11).

The forward is one fused kernel, or cuDNN's attention continued by a depth kernel; the backward is a
sequence part (cuDNN's, or kernels that know segments and are deterministic) and a depth part.
"""

from pallas_kernels.mosaic_gpu.operator import (
    add_depth_grads,
    backward,
    backward_without_depth_grads,
    forward,
    refusal,
)

__all__ = ["add_depth_grads", "backward", "backward_without_depth_grads", "forward", "refusal"]
