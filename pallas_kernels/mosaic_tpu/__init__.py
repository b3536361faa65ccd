"""MoDA for TPU v4 and later, in Pallas Mosaic TPU."""

from pallas_kernels.mosaic_tpu.operator import (
    add_depth_grads,
    backward,
    backward_without_depth_grads,
    forward,
    refusal,
)

__all__ = ["add_depth_grads", "backward", "backward_without_depth_grads", "forward", "refusal"]
