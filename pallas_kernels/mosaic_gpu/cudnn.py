"""cuDNN's backward as the sequence part's: the one place that touches JAX's private entry points.

It takes (o, lse) from outside, so that with those of the whole softmax, depth included,
it computes the sequence part's gradients exactly. JAX offers no public function for that.
"""

import functools
from typing import Any

import jax


@functools.cache
def _private() -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def missing_names() -> list[str]:
    """Private names that this JAX does not have; empty: everything is where it was."""
    try:
        module = _private()
    except ImportError:
        return ["jax._src.cudnn.fused_attention_stablehlo"]
    names = ("_dot_product_attention_bwd_p_wrapper", "MaskType", "AttentionLayout")
    return [name for name in names if not hasattr(module, name)]


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    scale: float,
    is_causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) of the sequence part, given o and lse [B, Tq, N] of the whole softmax.

    There is no dlse: cuDNN computes rowsum(do · o) itself.
    """
    masks = _private().MaskType
    unused = jax.numpy.zeros(0, query.dtype)
    return tuple(
        _private()._dot_product_attention_bwd_p_wrapper.bind(
            query, key, value, *[unused] * 7, lse.swapaxes(1, 2), out, d_out,
            scale=scale, seed=42, dropout_rate=0.0, variadic_args=(False, False),
            mask_type=masks.CAUSAL if is_causal else masks.NO_MASK,
            layout=_private().AttentionLayout.BTNH.value, sliding_window_length=None,
        )
    )  # fmt: skip
