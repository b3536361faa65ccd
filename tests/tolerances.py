"""Relative tolerances by dtype, against float64 on the same (rounded) inputs.

An error is max|got - expected| / max|expected| over an array: the rounding of a sum is relative to
its largest terms, so small entries of a large array carry the error of the large ones.
"""

# float32: 24-bit products and sums over up to about a thousand keys; 2e-6 measured.
# bfloat16: o, dq, dk, dv and the weights p, ds are rounded to 8 bits (2^-9 = 2e-3 each), and a
# gradient sums several of them; 5e-3 measured.
# float16: as bfloat16 with three more bits.
RELATIVE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2.5e-3}

# lse is float32 whatever the inputs are: products of 16-bit numbers are exact in float32.
LSE_RELATIVE = 2e-5

# A running gradient cache in bfloat16 (`depth_grad_dtype`) against one in float32, per parameter,
# norm of the difference over the norm: each of a slot's up to 2L additions rounds the sum to 8
# bits (2^-9 = 2e-3), in either direction; 2.0e-3 measured with 5 layers.
RUNNING_BFLOAT16 = 6e-3
