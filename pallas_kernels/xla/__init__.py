"""MoDA in plain XLA: every device, every call; memory linear in T."""

from pallas_kernels.xla.backward import backward, backward_without_depth_grads
from pallas_kernels.xla.depth_gather import gather_depth_grads, gather_refusal, keep_layer
from pallas_kernels.xla.forward import forward

__all__ = [
    "backward",
    "backward_without_depth_grads",
    "forward",
    "gather_depth_grads",
    "gather_refusal",
    "keep_layer",
]
