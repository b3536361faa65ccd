"""Text generation: prefill, then decode steps, in one compiled loop or one by one.

A token's depth keys are its own: they are computed anew in each step and kept by nobody. What stays
between steps is the sequence cache alone, the same bytes per token as a plain transformer's.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from moda_jax.model.stack import TokenInfo, implementation, scan_layers
from moda_jax.model.transformer import Transformer
from moda_jax.ops.checks import check_int, fail, plain
from moda_jax.ops.explicit import left_to_the_compiler
from moda_jax.ops.sharded_attention import ShardedAttention

BUCKET = 64
"""Prompts and caches are padded to a multiple of this, so that few sizes are compiled."""


class KVCache(NamedTuple):
    """All that is kept between decode steps, whatever the depth stream."""

    key: jax.Array  # [L, B, C, K, H], C: capacity in tokens
    value: jax.Array  # [L, B, C, K, H]
    length: jax.Array  # [B] int32: tokens written per row


def prefill(
    model: Transformer, tokens: jax.Array, lengths: jax.Array, capacity: int
) -> tuple[jax.Array, KVCache]:
    """Reads prompts: tokens [B, P] int32, of which row b's first lengths[b] count.

    Returns the logits [B, V], float32, after each row's last token, and a cache for `capacity`
    tokens per row. Raises ValueError if the capacity is below P.
    """
    batch, padded = tokens.shape
    if capacity < padded:
        raise ValueError(f"capacity: expected at least the {padded} prompt tokens, got {capacity}")
    positions = jnp.broadcast_to(jnp.arange(padded, dtype=jnp.int32), tokens.shape)
    segment_ids = jnp.where(positions < lengths[:, None], 1, 0)

    spec, params = model.stack(tokens.shape)

    def attend(layer, query, key, value, depth, state):
        out, _ = ShardedAttention.of(
            query,
            key,
            value,
            **depth,
            segment_ids=segment_ids,
            implementation=implementation(spec),
        ).forward()
        return out, state, (key, value)

    x, _, (key, value) = scan_layers(
        spec,
        params,
        model.embed(jnp.where(segment_ids != 0, tokens, 0)),
        TokenInfo(positions, segment_ids),
        attend,
    )
    last = x[jnp.arange(batch), jnp.maximum(lengths - 1, 0)]
    room = ((0, 0), (0, 0), (0, capacity - padded), (0, 0), (0, 0))
    cache = KVCache(jnp.pad(key, room), jnp.pad(value, room), lengths.astype(jnp.int32))
    return model.logits(model.final_norm(last[:, None]))[:, 0], cache


def decode_step(model: Transformer, cache: KVCache, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
    """Appends one token per row (tokens [B] int32); logits [B, V] after it and the new cache."""
    rows, position = jnp.arange(tokens.shape[0]), cache.length

    spec, params = model.stack((tokens.shape[0], 1))

    def attend(layer, query, new_key, new_value, depth, state):
        key, value = (
            x.at[layer, rows, position].set(new[:, 0])
            for x, new in zip(state, (new_key, new_value), strict=True)
        )
        out, _ = ShardedAttention.of(
            query,
            key[layer],
            value[layer],
            **depth,
            query_offset=position,
            kv_length=position + 1,
            implementation=implementation(spec),
        ).forward()
        return out, (key, value), None

    x, (key, value), _ = scan_layers(
        spec, params, model.embed(tokens[:, None]), TokenInfo(position[:, None], None), attend,
        (cache.key, cache.value),
    )  # fmt: skip
    return model.logits(model.final_norm(x))[:, 0], KVCache(key, value, position + 1)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Continues each prompt; returns the new tokens only, a stop token included as the last.

    Args:
      prompts: token ids, each at least one, of any lengths.
      max_new_tokens: most tokens per prompt.
      temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
      top_k: sample among the k likeliest tokens only.
      top_p: sample among the likeliest tokens that together reach this probability only.
      stop_tokens: a row ends with the first of these.
      seed: of the sampling, 0 … 2^32 - 1.

    Numbers may be scalars, prompts arrays of NumPy or JAX. Raises ValueError on bad values, on an
    empty prompt, on ids outside the vocabulary.
    """
    prompts, settings = _checked(
        model, prompts, max_new_tokens, temperature, top_k, top_p, stop_tokens, seed
    )
    if len(prompts) == 0 or settings.max_new_tokens == 0:
        return [[] for _ in prompts]
    tokens, lengths = _padded(prompts)
    graph, state = nnx.split(model)
    new, counts = _generate(
        graph, _bucket(settings.max_new_tokens), settings.top_k, state, tokens, lengths,
        np.int32(settings.max_new_tokens), settings.temperature, settings.top_p,
        np.asarray(settings.stop_tokens, np.int32), jax.random.key(settings.seed),
    )  # fmt: skip
    rows = zip(np.asarray(new).tolist(), np.asarray(counts).tolist(), strict=True)
    return [row[:count] for row, count in rows]


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """The tokens of `generate(model, [prompt], ...)[0]`, each as soon as it is drawn.

    Arguments and errors are `generate`'s, whose loop is one program: this one returns to Python
    after each token.
    """
    (prompt,), settings = _checked(
        model, [prompt], max_new_tokens, temperature, top_k, top_p, stop_tokens, seed
    )
    return _stream(model, prompt, settings)


def _stream(model: Transformer, prompt: list[int], settings: "_Settings") -> Iterator[int]:
    if settings.max_new_tokens == 0:
        return
    tokens, lengths = _padded([prompt])
    graph, state = nnx.split(model)
    sampling = settings.temperature, settings.top_p, jax.random.key(settings.seed)
    capacity = tokens.shape[1] + _bucket(settings.max_new_tokens)
    token, cache = _first_token(graph, capacity, settings.top_k, state, tokens, lengths, *sampling)
    for step in range(1, settings.max_new_tokens + 1):
        following = None
        if step < settings.max_new_tokens:
            # The device draws the next token while the caller has this one.
            following = _next_token(
                graph, settings.top_k, state, cache, token, np.int32(step), *sampling
            )
        new = int(token[0])
        yield new
        if following is None or new in settings.stop_tokens:
            return
        token, cache = following


class _Settings(NamedTuple):
    """The arguments of `generate` as the compiled functions take them."""

    max_new_tokens: int
    temperature: np.float32
    top_k: int | None
    top_p: np.float32
    stop_tokens: list[int]
    seed: int


def _checked(
    model, prompts, max_new_tokens, temperature, top_k, top_p, stop_tokens, seed
) -> tuple[list[list[int]], _Settings]:
    prompts = [[plain(x) for x in prompt] for prompt in prompts]
    stop_tokens, top_k, top_p = [plain(x) for x in stop_tokens], plain(top_k), plain(top_p)
    max_new_tokens, seed = check_int("max_new_tokens", max_new_tokens, 0), plain(seed)
    _check(prompts, temperature, top_k, top_p, stop_tokens, seed, model.config.vocab_size)
    most = 2**31 - BUCKET - _bucket(max(map(len, prompts), default=0))
    if max_new_tokens > most:  # positions are int32
        fail("max_new_tokens", f"at most {most} after these prompts", max_new_tokens)
    top_p = np.float32(1.0 if top_p is None else top_p)
    return prompts, _Settings(
        max_new_tokens, np.float32(temperature), top_k, top_p, stop_tokens, seed
    )


def _bucket(count: int) -> int:
    return -(-count // BUCKET) * BUCKET


def _padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, P] and lengths [B], int32; P is a multiple of BUCKET."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), _bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _check(prompts, temperature, top_k, top_p, stop_tokens, seed, vocab_size: int) -> None:
    def require(name: str, ok: bool, expected: str, got: Any) -> None:
        if not ok:
            fail(name, expected, got)

    def is_int_in(x: Any, start: int, stop: int) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and start <= x < stop

    def require_ids(name: str, ids: Sequence[Any]) -> None:
        outside = [x for x in ids if not is_int_in(x, 0, vocab_size)]
        require(name, not outside, f"ids in 0 … {vocab_size - 1}", outside[:1])

    in_float32 = 0 <= temperature <= float(np.finfo(np.float32).max)
    require("temperature", in_float32, "a number >= 0 that float32 can hold", temperature)
    top_k_ok = top_k is None or is_int_in(top_k, 1, vocab_size + 1)
    require("top_k", top_k_ok, f"None or 1 … {vocab_size}", top_k)
    require("top_p", top_p is None or 0 < top_p <= 1, "None or 0 < top_p <= 1", top_p)
    # JAX keeps the lower 32 bits: 2^32 would draw what 0 draws.
    require("seed", is_int_in(seed, 0, 2**32), "an int in 0 … 2^32 - 1", seed)
    require_ids("stop_tokens", stop_tokens)
    for n, prompt in enumerate(prompts):
        require(f"prompts[{n}]", len(prompt) > 0, "at least one token", "none")
        require_ids(f"prompts[{n}]", prompt)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    graph, room, top_k, state, tokens, lengths, limit, temperature, top_p, stop_tokens, key
):
    """(new tokens [B, room], how many count [B]); the loop ends when every row has."""
    run = functools.partial(_decode, graph, room, top_k)
    whole = PartitionSpec(), PartitionSpec()
    return left_to_the_compiler(run, whole)(
        state, tokens, lengths, limit, temperature, top_p, stop_tokens, key
    )


def _decode(
    graph, room, top_k, state, tokens, lengths, limit, temperature, top_p, stop_tokens, key
):
    model = nnx.merge(graph, state)
    batch, padded = tokens.shape
    logits, cache = prefill(model, tokens, lengths, padded + room)

    def unfinished(carry):
        step, _, _, _, _, done = carry
        return (step < limit) & ~jnp.all(done)

    def body(carry):
        step, logits, cache, new, counts, done = carry
        chosen = _draw_step(logits, key, step, temperature, top_k, top_p)
        new = new.at[:, step].set(chosen)
        counts += ~done
        done |= jnp.any(chosen[:, None] == stop_tokens, axis=-1)
        logits, cache = decode_step(model, cache, chosen)
        return step + 1, logits, cache, new, counts, done

    init = (
        jnp.int32(0), logits, cache, jnp.zeros((batch, room), jnp.int32),
        jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool),
    )  # fmt: skip
    *_, new, counts, _ = lax.while_loop(unfinished, body, init)
    return new, counts


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _first_token(graph, capacity, top_k, state, tokens, lengths, temperature, top_p, key):
    """(the first new token of each row [B], cache) after the prompts."""

    def run(state, tokens, lengths, temperature, top_p, key):
        logits, cache = prefill(nnx.merge(graph, state), tokens, lengths, capacity)
        return _draw_step(logits, key, 0, temperature, top_k, top_p), cache

    whole = PartitionSpec(), PartitionSpec()
    return left_to_the_compiler(run, whole)(state, tokens, lengths, temperature, top_p, key)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _next_token(graph, top_k, state, cache, tokens, step, temperature, top_p, key):
    """(token number `step` of each row [B], cache) after `tokens` [B], the ones before."""

    def run(state, cache, tokens, step, temperature, top_p, key):
        logits, cache = decode_step(nnx.merge(graph, state), cache, tokens)
        return _draw_step(logits, key, step, temperature, top_k, top_p), cache

    whole = PartitionSpec(), PartitionSpec()
    return left_to_the_compiler(run, whole)(state, cache, tokens, step, temperature, top_p, key)


def _draw_step(logits, key, step, temperature, top_k, top_p) -> jax.Array:
    """Token number `step`; each has a random key of its own."""
    return sample(
        logits, jax.random.fold_in(key, step), temperature=temperature, top_k=top_k, top_p=top_p
    )


def sample(
    logits_BxV: jax.Array,
    key: jax.Array,
    *,
    temperature: jax.Array | float,
    top_k: int | None,
    top_p: jax.Array | float,
) -> jax.Array:
    """Token ids [B] int32, drawn after `top_k`, then temperature, then `top_p` (1: all).

    Of equally likely tokens the one with the smaller id comes first.
    """
    return lax.cond(
        jnp.asarray(temperature) > 0,
        lambda: _draw(logits_BxV, key, temperature, top_k, top_p),
        lambda: logits_BxV.argmax(axis=-1).astype(jnp.int32),
    )


def _draw(logits_BxV, key, temperature, top_k, top_p) -> jax.Array:
    # Ranked once, so that equal logits cannot let more than top_k tokens through.
    order = jnp.argsort(logits_BxV, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits_BxV, order, axis=-1)
    # The likeliest at 0 before the division: no temperature is too low for float32.
    ranked = (ranked - ranked[:, :1]) / temperature
    if top_k is not None:
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The likeliest token is always kept, and a token while those before it are below top_p.
    allowed = (before < top_p).at[:, 0].set(True)
    rank = jax.random.categorical(key, jnp.where(allowed, ranked, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
