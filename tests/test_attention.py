"""The xla implementation: the shared suite, and memory that is linear in T."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import compile_quickly
from attention_suite import AttentionSuite
from tolerances import RELATIVE

from moda_jax import moda_attention


class TestXla(AttentionSuite):
    implementation = "xla"


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_weights_sum_to_one_at_any_finite_score(implementation):
    """Scores that are rounded otherwise where the maximum is subtracted give inf, and o NaN."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    query, key, depth_key = normal(1, 5, 4, 16), normal(1, 5, 2, 16), normal(3, 1, 5, 2, 16)

    def attend(size, query, scale):
        keys = size * key, jnp.ones_like(key), size * depth_key, jnp.ones_like(depth_key)
        out = moda_attention(size * query, *keys, scale=scale, implementation=implementation)
        return out.sum(), out

    run = compile_quickly(jax.value_and_grad(functools.partial(attend, scale=0.3), 1, has_aux=True))
    for size in (1e3, 1e5, 1e12):
        (_, out), gradient = run(size, query)
        np.testing.assert_allclose(out, 1, rtol=RELATIVE["float32"])
        assert jnp.isfinite(gradient).all()
    for scale in (-0.3, 0.0):
        out = compile_quickly(functools.partial(attend, scale=scale))(1e5, query)[1]
        np.testing.assert_allclose(out, 1, rtol=RELATIVE["float32"])


def compile_gradient(length: int, **kwargs):
    """The compiled gradient of a call with T = length; nothing is run."""
    shapes = [(1, length, 2, 16), *[(1, length, 1, 16)] * 2, *[(3, 1, length, 1, 16)] * 2]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(arrays, segments, depth_length):
        out = moda_attention(
            *arrays, depth_length=depth_length, segment_ids=segments, implementation="xla", **kwargs
        )
        return jnp.sum(out.astype(jnp.float32) ** 2)

    count = jax.ShapeDtypeStruct((), jnp.int32)
    return compile_quickly(jax.grad(loss)).lower(arrays, segments, count).compile()


def test_memory_is_linear_in_the_number_of_tokens():
    for kwargs in ({}, {"depth_chunk": 64}):
        short, long = (compile_gradient(length, **kwargs) for length in (32768, 65536))
        temp = [x.memory_analysis().temp_size_in_bytes for x in (short, long)]
        assert temp[1] <= 2.2 * temp[0], temp
        assert temp[1] < 65536**2 / 8, "a bit per pair of tokens would already be more"
        shapes = re.findall(r"\w\d+\[([\d,]+)\]", long.as_text())
        sizes = [sorted(map(int, shape.split(","))) for shape in set(shapes)]
        assert any(size[-1] == 65536 for size in sizes)  # the text is what it is taken for
        assert not [size for size in sizes if len(size) > 1 and size[-2] >= 65536]
