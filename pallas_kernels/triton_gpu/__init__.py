"""MoDA for NVIDIA GPUs since Ampere, and for AMD's, in Triton, called through jax-triton.

An optional extra: without the packages this one imports, and `refusal` says what to install.
"""

from pallas_kernels.triton_gpu.operator import (
    backward,
    backward_without_depth_grads,
    forward,
    refusal,
)

__all__ = ["backward", "backward_without_depth_grads", "forward", "refusal"]
