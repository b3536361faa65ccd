"""xla against the float64 reference on combinations drawn at random, by fixed seeds."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    ALL_DTYPES,
    Case,
    compile_quickly,
    differentiate,
    expected_results,
    make_problem,
    poison,
)
from attention_suite import assert_results_close


def draw_case(rng: np.random.Generator, name: str, q_len: int, group: int) -> Case:
    """A call of T = q_len and N/K = group; everything else is drawn, features independently."""
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    kv_heads, batch = pick(1, 2, 3), pick(1, 2, 3)
    kind = pick("self", "self", "decode", "decode", "cross", "depth only", "sequence only")
    slots = None if kind == "sequence only" else pick(0, 1, 2, 5, 8, 17, 33)
    slots = max(slots, 1) if kind == "depth only" else slots
    k_len, depth_tokens, offset, kv_length, options = None, None, None, None, {}
    chunk = pick(None, None, 1, 3, 16, 64, 100) if slots is not None else None
    if kind == "decode":
        k_len = q_len + pick(0, 1, 70)
        offset = rng.integers(0, k_len - q_len + 1, batch)
        kv_length = pick(None, offset + q_len, rng.integers(0, k_len + 1, batch))
        depth_tokens = None if chunk is None else chunk - 1 + q_len + pick(0, 2)
    elif kind == "cross":
        k_len = pick(1, 20, 150)
    if kind in ("self", "cross") and rng.random() < 0.3:
        kv_length = rng.integers(0, (k_len or q_len) + 1, batch)
    depth_lengths: tuple[int, ...] = ()
    if slots is not None:
        options |= {} if chunk is None else {"depth_chunk": chunk}
        if rng.random() < 0.4:
            options |= {"depth_window": pick(1, 2, 4, slots + 1), "depth_reserved": pick(0, 1, 3)}
        how = pick("all", "static", "traced", "traced")
        if how == "static":
            options["depth_length"] = int(rng.integers(0, slots + 1))
        elif how == "traced":
            depth_lengths = tuple({0, slots, int(rng.integers(0, slots + 1))})
    if rng.random() < 0.3:
        options["is_causal"] = False
    if rng.random() < 0.3:
        options["scale"] = pick(0.05, 0.3, 1.0, -0.4)
    same_axis = k_len in (None, q_len) and depth_tokens is None
    segments = pick(None, None, "packed", "pair") if kind != "depth only" else pick(None, "packed")
    segments = "pair" if segments is not None and not same_axis else segments
    as_ints = lambda x: None if x is None else tuple(map(int, x))  # noqa: E731
    return Case(
        name,
        q_len=q_len,
        k_len=k_len,
        batch=batch,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        head_dim=pick(2, 8, 16, 24, 64),
        slots=slots,
        depth_tokens=depth_tokens,
        sequence=kind != "depth only",
        depth_lengths=depth_lengths,
        segments=segments,
        query_offset=as_ints(offset),
        kv_length=as_ints(kv_length),
        options=options,
        dtypes=(pick("float32", *ALL_DTYPES),),
    )


@pytest.mark.slow
@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("q_len", [1, 7, 65, 129])
def test_random_combination(q_len, group):
    name = f"random {q_len} {group}"
    case = draw_case(np.random.default_rng(list(name.encode())), name, q_len, group)
    problem, (dtype,) = make_problem(case), case.dtypes
    run = compile_quickly(differentiate(case, "xla"))
    for length, expected in expected_results(case).items():
        arrays = {key: jnp.asarray(x, dtype) for key, x in poison(case, length).items()}
        got = run(arrays, problem.cotangents, problem.integers, length)
        assert_results_close(got, expected, dtype)
