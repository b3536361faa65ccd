"""MoDA in plain XLA: every device, every call; memory linear in T."""

from pallas_kernels.xla.backward import backward
from pallas_kernels.xla.forward import forward

__all__ = ["backward", "forward"]
