"""What the public API takes: arrays and scalars of NumPy, wide integers, layouts."""

import warnings

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moda_jax import HeadsBeforeTokensWarning, explain_attention, moda_attention

B, T, N, K, H, S = 1, 6, 2, 1, 8, 3
SHAPES = {
    "query": (B, T, N, H),
    "key": (B, T, K, H),
    "value": (B, T, K, H),
    "depth_key": (S, B, T, K, H),
    "depth_value": (S, B, T, K, H),
}


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("implementation", "dtype", "chunk"),
    [
        ("xla", np.float32, None),
        ("xla", ml_dtypes.bfloat16, 2),
        ("reference", ml_dtypes.bfloat16, None),
    ],
)
def test_numpy_arrays_are_converted(implementation, dtype, chunk):
    kwargs = {"depth_chunk": chunk, "implementation": implementation}
    segments, offset = np.ones((B, T), np.int64), np.zeros(B, np.int16)
    kwargs |= {"segment_ids": segments, "kv_length": np.full(B, T), "query_offset": offset}
    got = moda_attention(**arrays(dtype), **kwargs)
    assert isinstance(got, jax.Array)
    expected = moda_attention(**jax.tree.map(jnp.asarray, arrays(dtype)), **kwargs)
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize("wrap", [np.asarray, jnp.asarray, lambda x: np.asarray(x)[()]])
def test_numbers_may_be_scalars(wrap):
    settings = {
        "depth_length": 2,
        "depth_window": 1,
        "depth_reserved": 1,
        "depth_chunk": 2,
        "scale": 0.5,
        "is_causal": True,
    }
    got, expected = (
        moda_attention(**arrays(), **{name: f(x) for name, x in settings.items()})
        for f in (wrap, lambda x: x)
    )
    chex.assert_trees_all_equal(got, expected)


def test_scale_of_16_bits():
    for scale in (ml_dtypes.bfloat16(0.5), jnp.bfloat16(0.5)):
        assert explain_attention(**arrays(), scale=scale).name == "xla"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("segment_ids", np.full((B, T), 2**32)),
        ("segment_ids", np.full((B, T), 2**31, np.uint32)),
        ("segment_ids", np.full((B, T), -(2**31) - 1)),
        ("query_offset", np.full(B, 2**32)),
        ("kv_length", np.full(B, 2**40)),
        ("depth_length", np.int64(2**32 + 1)),
    ],
)
def test_integers_that_do_not_fit_are_an_error(name, value):
    message = rf"^{name}.*: expected values in -2147483648 … 2147483647, got {value.flat[0]}$"
    with pytest.raises(ValueError, match=message):
        moda_attention(**arrays(), **{name: value})


def test_integers_that_fit_keep_their_values():
    ids = np.array([[1, 1, 2**31 - 1, 2**31 - 1, -5, -5]])
    small = np.array([[1, 1, 2, 2, 3, 3]], np.int32)
    got, expected = (moda_attention(**arrays(), segment_ids=x) for x in (ids, small))
    chex.assert_trees_all_equal(got, expected)


def trace(query, key):
    """Checks and warns as a call does, and computes nothing."""
    return jax.eval_shape(moda_attention, jnp.ones(query), jnp.ones(key), jnp.ones(key))


def test_heads_before_tokens_are_warned_of():
    with pytest.warns(HeadsBeforeTokensWarning, match="8 tokens and 64 heads.*swap axes 1 and 2"):
        trace((2, 8, 64, 16), (2, 4, 64, 16))


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ((2, 64, 8, 16), (2, 64, 4, 16)),
        ((2, 1, 8, 16), (2, 64, 8, 16)),  # decoding
        ((2, 1, 8, 16), (2, 1, 8, 16)),  # the first token
        ((2, 4, 8, 16), (2, 64, 8, 16)),  # a few tokens at a time
        ((2, 4, 8, 16), (2, 4, 2, 16)),  # a short prompt
    ],
)
def test_the_right_layout_is_not(query, key):
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadsBeforeTokensWarning)
        trace(query, key)
