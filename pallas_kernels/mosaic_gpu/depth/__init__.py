"""Kernels over the depth slots alone, and the slots' part of the fused kernels."""
