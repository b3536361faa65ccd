"""Backends of Mixture-of-Depths Attention. Arrays and tiles only; nothing here imports `moda_jax`.

A backend takes one checked call (`operands.Operands`, `operands.Options`) and offers the functions
that `contract` types. `reference` is the specification: short, float32, differentiated by JAX.
`xla` runs everywhere.
"""
