"""MoDA for NVIDIA GPUs since Ampere, and for AMD's, in Triton, called through jax-triton.

An optional extra: this package imports without the others, and `unsupported_reason` says what to
install.
"""

from pallas_kernels.triton_gpu.operator import backward, forward, unsupported_reason

__all__ = ["backward", "forward", "unsupported_reason"]
