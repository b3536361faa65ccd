"""The operator against PyTorch in float64, in the official repository's array layout.

`golden/make_torch.py` wrote the numbers; nothing here imports torch.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax import moda_attention
from moda_jax.ops.official_layout import (
    depth_from_official,
    depth_to_official,
    query_from_official,
    query_to_official,
)
from tests.attention_suite import assert_close
from tests.tolerances import LSE_RELATIVE, RELATIVE

FOLDER = Path(__file__).parent / "golden"
INPUTS = ("query", "key", "value", "depth_key", "depth_value")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", ["grouped", "multi_head", "multi_query_full"])
def test_values_and_gradients_are_pytorchs(name, implementation):
    with np.load(FOLDER / f"torch_{name}.npz", allow_pickle=False) as file:
        case = dict(file)
    group, slots = int(case["group"]), int(case["slots"])
    kv_heads = case["key"].shape[2]

    def attend(query, key, value, depth_key, depth_value):
        out, lse = moda_attention(
            query_from_official(query, group), key, value,
            depth_from_official(depth_key, slots), depth_from_official(depth_value, slots),
            is_causal=bool(case["is_causal"]), return_lse=True, implementation=implementation,
        )  # fmt: skip
        return query_to_official(out, kv_heads), query_to_official(lse[..., None], kv_heads)[..., 0]

    @jax.jit
    def all_of_it(inputs, cotangents):
        results, vjp = jax.vjp(attend, *inputs)
        return results, vjp(cotangents)

    inputs = [jnp.asarray(case[x]) for x in INPUTS]
    (out, lse), grads = all_of_it(inputs, (jnp.asarray(case["d_out"]), jnp.asarray(case["d_lse"])))
    assert_close("o", out, case["out"], RELATIVE["float32"])
    assert_close("lse", lse, case["lse"], LSE_RELATIVE)
    for x, grad in zip(INPUTS, grads, strict=True):
        assert_close(f"gradient of {x}", grad, case[f"grad/{x}"], RELATIVE["float32"])


def test_layouts_there_and_back_entry_by_entry():
    query = np.arange(2 * 3 * 6 * 4).reshape(2, 3, 6, 4)  # B, T, N, H with K = 2, G = 3
    official = query_to_official(query, 2)
    assert official.shape == (2, 9, 2, 4)
    depth = np.arange(5 * 2 * 3 * 2 * 4).reshape(5, 2, 3, 2, 4)  # S, B, T, K, H
    official_depth = depth_to_official(depth)
    assert official_depth.shape == (2, 15, 2, 4)
    for t in range(3):
        for head in range(6):
            expected = official[:, t * 3 + head % 3, head // 3]
            np.testing.assert_array_equal(query[:, t, head], expected)
        for slot in range(5):
            np.testing.assert_array_equal(depth[slot, :, t], official_depth[:, t * 5 + slot])
    np.testing.assert_array_equal(query_from_official(official, 3), query)
    np.testing.assert_array_equal(depth_from_official(official_depth, 5), depth)


def test_sizes_that_do_not_divide_are_errors():
    x = np.zeros((1, 6, 4, 2), np.float32)
    with pytest.raises(
        ValueError, match="num_kv_heads: expected a divisor of the 4 query heads, got 3"
    ):
        query_to_official(x, 3)
    with pytest.raises(ValueError, match="group: expected a divisor of the 6 rows, got 4"):
        query_from_official(x, 4)
    with pytest.raises(ValueError, match="num_slots: expected a divisor of the 6 rows, got 5"):
        depth_from_official(x, 5)


def test_the_pages_example_with_pytorchs_tensors():
    torch = pytest.importorskip("torch", reason='pip install -e ".[torch]" brings it')
    page = Path(__file__).parent.parent / "docs" / "pytorch.md"
    (example,) = re.findall(r"```python\n(import jax\n.*?)```", page.read_text("utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(example, str(page), "exec"), names)
    arrays = [jnp.asarray(x.numpy()) for x in (*names["tensors"], *names["depth"])]
    expected = moda_attention(*arrays, implementation="reference")
    assert isinstance(names["out"], torch.Tensor)
    assert_close("o", names["out"].numpy(), expected, RELATIVE["float32"])
