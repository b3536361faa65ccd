"""Decoding equals the full forward; sampling does what it says; nothing recompiles per token."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax.config import MoDAConfig
from moda_jax.model import generation
from tests.models import MECHANISMS, SMALL, VARIANTS, random_model
from tests.tolerances import SAME_MODEL


def build(**changes):
    return random_model(dataclasses.replace(SMALL, **changes))


@pytest.fixture(scope="module")
def model():
    return build()


READER = {"reader": {"depth": MoDAConfig(window=3, reserved=1, key_norm="reader")}}


@pytest.mark.parametrize(
    "variant", ["residual", "every3-row5", "bounded", "pre-head-bias", "tied", "reader"]
)
def test_decode_equals_the_full_forward_at_every_position(variant):
    model = build(**(VARIANTS | READER)[variant])
    tokens = np.random.default_rng(0).integers(0, 37, (3, 12)).astype(np.int32)
    lengths = jnp.array([1, 5, 3], jnp.int32)  # prompts of unequal length
    full = nnx.jit(lambda m, x: m(x))(model, tokens)
    step = nnx.jit(generation.decode_step)
    logits, cache = nnx.jit(generation.prefill, static_argnums=3)(model, tokens[:, :5], lengths, 16)
    rows = np.arange(3)
    for _ in range(7):
        expected = full[rows, cache.length - 1]
        assert jnp.abs(logits - expected).max() < SAME_MODEL * jnp.abs(expected).max()
        logits, cache = step(model, cache, tokens[rows, cache.length])


@pytest.mark.parametrize("variant", ["residual", "row5", *MECHANISMS])
def test_cache_is_a_plain_transformers(variant):
    """What layers write for later ones lives for one step and is in no cache."""
    model = build(**(VARIANTS | MECHANISMS)[variant])
    tokens, lengths = jnp.zeros((3, 5), jnp.int32), jnp.ones(3, jnp.int32)
    cache = jax.eval_shape(lambda: generation.prefill(model, tokens, lengths, 8)[1])
    keys = jax.ShapeDtypeStruct((4, 3, 8, SMALL.num_kv_heads, SMALL.head_dim), jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        cache, generation.KVCache(keys, keys, jax.ShapeDtypeStruct((3,), jnp.int32))
    )


def test_rows_do_not_depend_on_their_neighbours(model):
    prompts = [[5], [7, 8, 9, 10, 11, 12], [3, 4]]
    together = generation.generate(model, prompts, max_new_tokens=9)
    alone = [generation.generate(model, [prompt], max_new_tokens=9)[0] for prompt in prompts]
    assert together == alone
    assert [len(row) for row in together] == [9, 9, 9]


def test_greedy_is_the_argmax_of_the_forward(model):
    prompt = [4, 9, 2]
    new = generation.generate(model, [prompt], max_new_tokens=5)[0]
    for n, token in enumerate(new):
        logits = model(jnp.asarray([prompt + new[:n]], jnp.int32))
        assert int(logits[0, -1].argmax()) == token


def test_stop_tokens_end_a_row(model):
    free = generation.generate(model, [[1], [2]], max_new_tokens=8)
    stop = free[0][3]
    stopped = generation.generate(model, [[1], [2]], max_new_tokens=8, stop_tokens=[stop])
    for row, whole in zip(stopped, free, strict=True):
        cut = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:cut]


def test_one_trace_for_all_tokens_and_lengths(model, monkeypatch):
    """Of the decode step, whatever the prompts of one bucket and the number of new tokens."""
    generation._generate.clear_cache()
    step = chex.assert_max_traces(generation.decode_step, n=1)
    monkeypatch.setattr(generation, "decode_step", step)
    for count, prompts in ((3, [[1, 2], [3]]), (17, [[4], [5]]), (40, [[1] * 60, [2, 3]])):
        generation.generate(model, prompts, max_new_tokens=count, temperature=0.7, seed=count)


def test_seed_decides_the_sample(model):
    draw = lambda seed: generation.generate(  # noqa: E731
        model, [[1]], max_new_tokens=12, temperature=2.0, seed=seed
    )
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_every_token_is_drawn_anew():
    """Of 37 equally likely tokens 60 draws find 30 on average; one draw for all finds 1."""
    model = build()
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
    (new,) = generation.generate(model, [[1]], max_new_tokens=60, temperature=1.0)
    assert len(set(new)) > 20


def frequencies(logits, **kwargs):
    settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0} | kwargs
    batch = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (4000, len(logits)))
    drawn = generation.sample(batch, jax.random.key(0), **settings)
    return np.bincount(drawn, minlength=len(logits)) / 4000


def test_sampling_follows_the_distribution():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(frequencies(logits), np.exp(logits), atol=0.03)
    hot = np.exp(logits / 2) / np.exp(logits / 2).sum()
    np.testing.assert_allclose(frequencies(logits, temperature=2.0), hot, atol=0.03)
    np.testing.assert_allclose(frequencies(logits, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(logits, top_p=0.6), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(logits, top_p=0.01), [1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(logits, temperature=0.0), [1, 0, 0, 0])


def test_limits_hold_for_equal_logits():
    """Ties go to the smaller id: top_k keeps k tokens and top_p as few as it can."""
    flat = [0.0, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(frequencies(flat), 0.25, atol=0.03)
    np.testing.assert_allclose(frequencies(flat, top_k=1), [1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(flat, top_k=2), [0.5, 0.5, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(flat, top_p=1e-6), [1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(flat, top_p=0.5), [0.5, 0.5, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(flat, top_k=4, top_p=1.0), 0.25, atol=0.03)


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures(temperature):
    expected = [0, 1, 0] if temperature < 1 else [1 / 3] * 3
    got = frequencies([80.0, 90.0, -90.0], temperature=temperature)
    np.testing.assert_allclose(got, expected, atol=0.03)


def test_prompts_and_numbers_as_arrays(model):
    prompts = [[1, 2], [3, 4]]
    settings = {"temperature": 2.0, "top_k": 5, "top_p": 0.5, "seed": 2**32 - 1}
    expected = generation.generate(model, prompts, max_new_tokens=3, **settings)
    for wrap in (np.array, jnp.array):
        wrapped = {
            name: np.uint32(x) if name == "seed" else wrap(x) for name, x in settings.items()
        }
        got = generation.generate(model, wrap(prompts), max_new_tokens=wrap(3), **wrapped)
        assert got == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": [[]]}, r"prompts\[0\]: expected at least one token"),
        ({"prompts": [[1], [37]]}, r"prompts\[1\]: expected ids in 0 … 36, got \[37\]"),
        ({"prompts": [[1.5]]}, r"prompts\[0\]: expected ids in 0 … 36, got \[1.5\]"),
        ({"prompts": [[-1]]}, r"prompts\[0\]: expected ids in 0 … 36, got \[-1\]"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected an int >= 0, got -1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected an int >= 0, got 2.5"),
        ({"temperature": -0.5}, "temperature: expected"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"temperature": float("inf")}, "temperature: expected"),
        ({"top_k": 0}, "top_k: expected None or 1 … 37, got 0"),
        ({"top_k": 38}, "top_k: expected None or 1 … 37, got 38"),
        ({"top_k": 2.0}, "top_k: expected None or 1 … 37, got 2.0"),
        ({"top_p": 1.5}, "top_p: expected"),
        ({"top_p": 0.0}, "top_p: expected"),
        ({"seed": 2**32}, r"seed: expected an int in 0 … 2\^32 - 1, got 4294967296"),
        ({"seed": -1}, r"seed: expected an int in 0 … 2\^32 - 1, got -1"),
        ({"stop_tokens": [37]}, r"stop_tokens: expected ids in 0 … 36, got \[37\]"),
    ],
)
def test_bad_input(model, kwargs, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 1} | kwargs
    with pytest.raises(ValueError, match=message):
        generation.generate(model, **arguments)


def test_nothing_to_do(model):
    assert generation.generate(model, [], max_new_tokens=3) == []
    assert generation.generate(model, [[1]], max_new_tokens=0) == [[]]


def test_prompt_longer_than_the_cache(model):
    with pytest.raises(ValueError, match="capacity: expected at least the 5 prompt tokens, got 4"):
        generation.prefill(model, jnp.zeros((1, 5), jnp.int32), jnp.array([5]), 4)
