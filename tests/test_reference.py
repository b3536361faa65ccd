"""The reference against a float64 loop over queries, keys and slots, with complex-step gradients.

The loop is written from the operator's definition alone and shares no code with the library.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    LARGE_SCORES,
    Case,
    compile_quickly,
    differentiate,
    expected_of,
    large_scores,
    make_problem,
)
from attention_suite import assert_results_close

from moda_jax.ops import backends
from pallas_kernels.operands import Operands, Options

NAMES = ("query", "key", "value", "depth_key", "depth_value")

LOOPED = (
    Case("loop_basic", q_len=5),
    Case("loop_sequence_only", q_len=4, slots=None, heads=6),
    Case("loop_depth_only", q_len=4, sequence=False, options={"depth_length": 3}),
    Case("loop_full", q_len=4, k_len=6, options={"is_causal": False, "scale": 0.7}),
    Case("loop_packed", q_len=12, segments="packed", slots=2),
    Case("loop_pair", q_len=5, k_len=11, segments="pair", slots=1),
    Case(
        "loop_window",
        q_len=3,
        slots=9,
        depth_lengths=(0, 1, 2, 4, 9),
        options={"depth_window": 3, "depth_reserved": 1},
    ),
    Case("loop_chunk", q_len=10, slots=3, depth_lengths=(0, 2), options={"depth_chunk": 4}),
    Case("loop_chunk_packed", q_len=12, slots=2, segments="packed", options={"depth_chunk": 5}),
    Case("loop_decode", q_len=2, k_len=8, query_offset=(0, 5), kv_length=(2, 7)),
    Case(
        "loop_decode_chunk",
        q_len=3,
        k_len=12,
        depth_tokens=7,
        slots=2,
        query_offset=(2, 7),
        kv_length=(5, 10),
        segments="pair",
        options={"depth_chunk": 4},
    ),
    Case("loop_sees_nothing", q_len=3, slots=None, kv_length=(0, 1)),
)


def sees_token(case, integers, b, i, j):
    """Whether the query at index i of row b sees sequence key j."""
    position = i + (case.query_offset[b] if case.query_offset else 0)
    if case.kv_length and j >= case.kv_length[b]:
        return False
    if case.options.get("is_causal", True) and j > position:
        return False
    return same_document(integers, b, i, j)


def same_document(integers, b, i, j):
    ids = integers.get("segment_ids")
    if ids is None:
        return True
    of_query, of_key = ids if isinstance(ids, tuple) else (ids, ids)
    return of_query[b, i] == of_key[b, j] and of_query[b, i] != 0


def slot_is_visible(case, length, s):
    window = case.options.get("depth_window")
    in_window = window is None or s >= length - window
    return s < length and (in_window or s < case.options.get("depth_reserved", 0))


def depth_tokens_seen(case, integers, b, i):
    """Indices on the depth token axis whose slots the query sees."""
    ids = integers.get("segment_ids")
    of_query = ids[0] if isinstance(ids, tuple) else ids
    if of_query is not None and of_query[b, i] == 0:
        return []
    chunk = case.options.get("depth_chunk")
    if chunk is None:
        return [i]
    offset = case.query_offset[b] if case.query_offset else 0
    axis_start, position = offset // chunk * chunk, offset + i
    tokens = range(position // chunk * chunk, position + 1)
    return [u - axis_start for u in tokens if same_document(integers, b, i, u)]


def literal_attention(case, problem, arrays, length):
    """o and lse, one query and one key at a time; accepts complex arrays."""
    query = arrays["query"]
    dtype = np.result_type(*arrays.values())
    out, lse = np.zeros(query.shape, dtype), np.full(query.shape[:3], -np.inf, dtype)
    scale = case.options.get("scale", case.head_dim**-0.5)
    for b, i, n in np.ndindex(query.shape[:3]):
        head, keys = n // (case.heads // case.kv_heads), []
        if case.sequence:
            keys += [
                (arrays["key"][b, j, head], arrays["value"][b, j, head])
                for j in range(arrays["key"].shape[1])
                if sees_token(case, problem.integers, b, i, j)
            ]
        if case.slots:
            keys += [
                (arrays["depth_key"][s, b, u, head], arrays["depth_value"][s, b, u, head])
                for u in depth_tokens_seen(case, problem.integers, b, i)
                for s in range(case.slots)
                if slot_is_visible(case, length, s)
            ]
        if keys:
            weights = [np.exp(scale * np.sum(query[b, i, n] * k)) for k, _ in keys]
            lse[b, i, n] = np.log(sum(weights))
            out[b, i, n] = sum(w * v for w, (_, v) in zip(weights, keys, strict=True)) / sum(
                weights
            )
    return out, lse


def complex_step(case, problem, name, direction, length):
    """d/de of sum(do o) + sum(dlse lse) at name + e direction; exact to rounding."""
    step = 1e-30
    arrays = {key: x.astype(np.complex128) for key, x in problem.arrays.items()}
    arrays[name] += 1j * step * direction
    out, lse = literal_attention(case, problem, arrays, length)
    d_out, d_lse = problem.cotangents
    return (np.sum(d_out * out.imag) + np.sum(d_lse * lse.imag)) / step


@pytest.mark.parametrize("case", LOOPED, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_the_loop(case):
    problem, rng = make_problem(case), np.random.default_rng(1)
    arrays = {name: x.astype(np.float64) for name, x in problem.arrays.items()}
    run = compile_quickly(differentiate(case, "reference"))
    for length in case.depth_lengths or (None,):
        with jax.enable_x64(True):
            out, lse, grads = run(arrays, problem.cotangents, problem.integers, length)
        static = case.options.get("depth_length", case.slots)
        seen = static if length is None else length
        expected_out, expected_lse = literal_attention(case, problem, arrays, seen)
        np.testing.assert_allclose(out, expected_out, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-12, atol=1e-12)
        for name, grad in grads.items():
            direction = rng.normal(size=grad.shape)
            got = np.sum(np.asarray(grad) * direction)
            wanted = complex_step(case, problem, name, direction, seen)
            np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12, err_msg=name)


def test_the_loop_by_hand():
    """Two keys and one slot with scores log 1, log 2, log 3: weights 1/6, 2/6, 3/6."""
    case = Case("by_hand", q_len=2, batch=1, heads=1, kv_heads=1, head_dim=1, slots=1)
    arrays = {
        "query": np.array([[[[0.0]], [[1.0]]]]),
        "key": np.log([1.0, 2.0]).reshape(1, 2, 1, 1),
        "value": np.array([6.0, 60.0]).reshape(1, 2, 1, 1),
        "depth_key": np.log([9.0, 3.0]).reshape(1, 1, 2, 1, 1),
        "depth_value": np.array([8.0, 600.0]).reshape(1, 1, 2, 1, 1),
    }
    out, lse = literal_attention(case, make_problem(case), arrays, 1)
    np.testing.assert_allclose(out.ravel(), [7.0, 1 + 20 + 300])
    np.testing.assert_allclose(lse.ravel(), np.log([2.0, 6.0]))


@pytest.mark.parametrize("offset", [2.0**21, -(2.0**83)])
def test_large_scores_in_float32(offset):
    """The weights are e^(z - max) over their sum: with e^(z - lse) they would sum to up to 9."""
    problem = large_scores(offset, 0)
    run = compile_quickly(differentiate(LARGE_SCORES, "reference"))
    for length, expected in expected_of(LARGE_SCORES, problem).items():
        got = run(problem.arrays, problem.cotangents, {}, length)
        assert_results_close(got, expected, "float32", exact_zeros=False)


def test_gradients_are_added_in_the_running_dtype():
    """The reference has no backward of its own, but offers the stack the same interface."""
    problem = make_problem(Case("running", q_len=3, slots=4))
    operands = Operands(**problem.arrays, depth_length=jnp.int32(2))
    start = tuple(jnp.full(problem.arrays["depth_key"].shape, x, jnp.bfloat16) for x in (1.0, 2.0))

    @compile_quickly
    def run(operands):
        backend = backends.BACKENDS["reference"]
        out, lse = backend.forward(operands, Options(0.25))
        args = operands, Options(0.25), out, lse, problem.cotangents[0], problem.cotangents[1]
        return backend.gradients(*args, None), backend.gradients(*args, start)

    alone, added = run(operands)
    for before, gradient, after in zip(start, alone[3:], added[3:], strict=True):
        assert after.dtype == jnp.bfloat16
        np.testing.assert_array_equal(after, (before + gradient).astype(jnp.bfloat16))
        np.testing.assert_array_equal(after[2:], before[2:])
        assert np.abs(gradient[:2]).max() > 0.1
