"""Backends of Mixture-of-Depths Attention. Arrays and tiles only; nothing here imports `moda_jax`.

A backend takes one checked call (`operands.Operands`, `operands.Options`) and offers

    forward(operands, options) -> (o, lse)
    backward(operands, options, o, lse, do, dlse, depth_grads=None) -> operands.Gradients

and, if it can gather the slots' gradients (`moda_jax.ops.backends.Gathering`),

    backward_without_depth_grads(operands, options, o, lse, do, dlse) -> operands.Gradients
    keep_layer(operands, o, lse, do, dlse) -> operands.KeptLayers
    gather_depth_grads(kept, depth_key, depth_value, layers, first, count, ...) -> (gk, gv)
    gather_refusal(operands) -> why not, or None

`reference` is the specification: short, float32, differentiated by JAX. `xla` runs everywhere.
"""
