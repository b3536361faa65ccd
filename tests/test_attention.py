"""The xla implementation: the shared suite, and memory that is linear in T."""

import re

import jax
import jax.numpy as jnp
from attention_cases import compile_quickly
from attention_suite import AttentionSuite

from moda_jax import moda_attention


class TestXla(AttentionSuite):
    implementation = "xla"


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
