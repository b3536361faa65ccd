"""Relative tolerances by dtype, against float64 on the same (rounded) inputs.

An error is max|got - expected| / max|expected| over an array: the rounding of a sum is relative to
its largest terms, so small entries of a large array carry the error of the large ones.
"""

import math

# float32: 24-bit products and sums over up to about a thousand keys; 2e-6 measured.
# bfloat16: o, dq, dk, dv and the weights p, ds are rounded to 8 bits (2^-9 = 2e-3 each), and a
# gradient sums several of them; 5e-3 measured.
# float16: as bfloat16 with three more bits.
RELATIVE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2.5e-3}

# lse is float32 whatever the inputs are: products of 16-bit numbers are exact in float32.
LSE_RELATIVE = 2e-5


def lse_rounding(lse: float) -> float:
    """Of weights e^(z - lse) with a float32 lse: up to four roundings of numbers like it.

    They are lse itself, its and the score's product with log2(e), and their difference; 1.5 times
    |lse| 2^-24 measured.
    """
    return math.expm1(4 * abs(lse) * 2.0**-24)


# A whole stack's gradients in float32, computed in another order (gathered or added, on a mesh),
# per leaf, relative to its largest entry: the operator's rounding, carried through four layers;
# 4.2e-6 measured.
STACK = 5e-5

# The same gradients in bfloat16 against float32, norm of the difference over the norm: 8 bits of
# mantissa (4e-3 a rounding) through four layers; 4.1e-2 measured.
STACK_BFLOAT16 = 6e-2

# Logits (and loss gradients) of the same model computed in another order: a token at a time, in
# chunks of the loss, documents apart. Relative to the largest; 6.6e-7 measured.
SAME_MODEL = 2e-5

# All positions shifted by 1000: the angles of RoPE are float32 products of up to 1e3, so rotated
# keys move by up to 1e3 * 2^-24 = 6e-5; logits 1.6e-6, attention mass 6e-8 measured.
SHIFTED_POSITIONS = 1e-4

# Optimizer steps in float32 whose sums run in another order (meshes, accumulation): each loss is a
# mean over about 100 terms of size 4, and Adam turns a gradient's last bits into a step of full
# size where it is close to 0. Losses move by less than 1e-6; the gradient norm of the fourth step
# by 2.1e-5 measured.
REORDERED_STEPS = 5e-5

# As REORDERED_STEPS after six steps with a larger learning rate.
REORDERED_RUN = 1e-4

# Running slot gradients in bfloat16 (`slot_gradient_dtype`) against float32, per parameter, norm of
# the difference over the norm: each of a slot's up to 2L additions rounds the sum to 8
# bits (2^-9 = 2e-3), in either direction; 2.0e-3 measured with 5 layers.
RUNNING_BFLOAT16 = 6e-3

# Logits, loss and gradients of three layers in float32 against transformers with float64 weights
# (its norms, angles and softmax are float32), each array relative to its largest entry: the order
# of sums and the rounding of what is kept; 6.4e-6 measured.
GOLDEN = 2e-5

# Logits, loss and gradients of two to four layers against transformers, both in float32.
TRANSFORMERS = 1e-5

# The readable reference in float64 against the NumPy model: rounding alone.
EQUATIONS = 1e-9
EQUATIONS_DERIVATIVE = 1e-7

# The scanned model in float32.
EQUATIONS_FLOAT32 = 2e-5
EQUATIONS_FLOAT32_DERIVATIVE = 1e-3

# The scanned stack in float32 against the reference in float64, logits and gradients of every
# mechanism, each array relative to its largest entry: three layers' rounding.
MECHANISM = 2e-5

# By how much more an array of one number may be off: it is a sum over tokens and channels of
# products of both signs, which cancel (a scale in front of a norm), so its rounding is relative to
# them and not to it. 1.05 times MECHANISM measured.
SINGLE_SUM = 5

# Attention weights of the scanned model in float32, and their means, against a softmax by hand over
# the reference's queries and keys in float64; absolute, weights being at most 1; 4e-7 measured.
ATTENTION_WEIGHTS = 2e-5

# Losses of three steps on a mesh against those on one device: sums in another order, and Adam, as
# REORDERED_STEPS.
MECHANISM_STEPS = 5e-5

# Muon's update in float32 against the same rounds in float64, norm of the difference over the norm:
# five rounds enlarge a rounding by up to 3.4^5 = 480 where singular values are small; 9.1e-6
# measured.
NEWTON_SCHULZ = 3e-5
