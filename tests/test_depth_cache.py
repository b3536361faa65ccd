"""DepthCache: append, visible range, eviction; what attention sees of each kind."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax import moda_attention
from moda_jax.ops.depth_cache import DepthCache

SHAPE = (2, 3, 1, 4)  # B, T, K, H


def slot(i: int) -> tuple[jax.Array, jax.Array]:
    return jnp.full(SHAPE, i + 1.0), jnp.full(SHAPE, -(i + 1.0))


def filled(num_appends: int, num_slots: int, **kwargs) -> DepthCache:
    cache = DepthCache.empty(num_slots, *SHAPE, jnp.float32, **kwargs)
    for i in range(num_appends):
        cache = cache.append(*slot(i))
    return cache


def written(cache: DepthCache) -> list[int]:
    """Which append each buffer slot holds; -1: none."""
    ids = np.asarray(cache.key)[:, 0, 0, 0, 0] - 1
    np.testing.assert_array_equal(cache.value, -np.asarray(cache.key))
    np.testing.assert_array_equal(
        cache.key, np.broadcast_to(np.reshape(ids + 1, (-1, 1, 1, 1, 1)), cache.key.shape)
    )
    return ids.astype(int).tolist()


def test_append_fills_slot_after_slot_and_leaves_the_old_cache_alone():
    before = filled(2, 4)
    after = before.append(*slot(2))
    assert written(before) == [0, 1, -1, -1]
    assert written(after) == [0, 1, 2, -1]
    assert (int(before.length), int(after.length), after.capacity) == (2, 3, 4)
    assert after.key.dtype == jnp.float32
    assert DepthCache.empty(1, *SHAPE).key.dtype == jnp.bfloat16


def test_an_append_that_fits_does_not_read_the_cache():
    def program(**settings):
        return str(jax.make_jaxpr(lambda cache: cache.append(*slot(2), **settings))(filled(2, 4)))

    assert "dynamic_slice" in program()
    assert "dynamic_slice" not in program(fits=True)
    after = jax.jit(lambda cache: cache.append(*slot(2), fits=True))(filled(2, 4))
    assert written(after) == [0, 1, 2, -1]
    assert int(after.length) == 3
    with pytest.raises(ValueError, match="append: expected at most 2 slots in all, got 1 more"):
        filled(2, 2).append(*slot(2), fits=True)


def test_bounded_cache_keeps_every_slot_and_evicts_none():
    cache = filled(4, 6, window=2, reserved=1)
    assert written(cache) == [0, 1, 2, 3, -1, -1]
    assert int(cache.evicts()) == -1
    kwargs = cache.attention_kwargs()
    assert (kwargs["depth_window"], kwargs["depth_reserved"]) == (2, 1)
    assert int(kwargs["depth_length"]) == 4
    np.testing.assert_array_equal(np.flatnonzero(cache.visible()), [0, 2, 3])


@pytest.mark.parametrize(("window", "reserved"), [(2, 1), (3, 0), (1, 2)])
def test_ring_overwrites_the_oldest_slot_that_is_not_reserved(window, reserved):
    cache = DepthCache.empty(9, *SHAPE, jnp.float32, window=window, reserved=reserved, ring=True)
    assert cache.capacity == window + reserved
    held: list[int] = []
    for i in range(9):
        evicted = None
        if len(held) == cache.capacity:
            evicted = held.pop(reserved)  # the oldest behind the reserved ones
        index = int(cache.evicts())
        assert (written(cache)[index] if index >= 0 else None) == evicted
        cache = cache.append(*slot(i))
        held.append(i)
        assert sorted(written(cache)) == sorted(held + [-1] * (cache.capacity - len(held)))
        assert int(cache.length) == i + 1
        assert (
            written(cache)[:reserved] == [*range(min(i + 1, reserved)), *[-1] * reserved][:reserved]
        )


@pytest.mark.parametrize(("window", "reserved", "slots"), [(2, 1, 9), (2, 4, 3), (5, 0, 3)])
def test_ring_and_bounded_cache_show_attention_the_same(window, reserved, slots):
    """Also where the ring would be larger than the number of appends, which then never evicts."""
    rng = np.random.default_rng(0)
    appends = rng.normal(size=(slots, 2, *SHAPE)).astype(np.float32)
    query = jnp.asarray(rng.normal(size=(2, 3, 2, 4)), jnp.float32)

    @jax.jit
    def run(ring_cache, bounded_cache, append):
        caches = [cache.append(*append) for cache in (ring_cache, bounded_cache)]
        outs = [
            moda_attention(query, None, None, **x.attention_kwargs(), implementation="reference")
            for x in caches
        ]
        return caches, outs

    caches = [
        DepthCache.empty(slots, *SHAPE, jnp.float32, window=window, reserved=reserved, ring=ring)
        for ring in (True, False)
    ]
    for append in appends:
        caches, outs = run(*caches, append)
        np.testing.assert_allclose(outs[0], outs[1], rtol=1e-5, atol=1e-6)
        assert np.abs(outs[0]).max() > 0.1


def test_append_under_scan_with_a_condition():
    """Every third append counts; an append to a full cache is dropped."""
    cache = DepthCache.empty(3, *SHAPE, jnp.float32)

    def step(cache, i):
        key = jnp.full(SHAPE, i + 1.0)
        return cache.append(key, -key, where=i % 3 == 0), cache.length

    assert not cache.visible().any()
    cache, lengths = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(13)))(cache)
    assert written(cache) == [0, 3, 6]
    assert int(cache.length) == 3
    assert lengths.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]


def test_conditional_append_to_a_turning_ring():
    cache = filled(4, 9, window=2, reserved=1, ring=True)
    assert written(cache) == [0, 3, 2]
    assert cache.visible().all()
    assert written(cache.append(*slot(7), where=False)) == [0, 3, 2]
    assert written(cache.append(*slot(7), where=jnp.bool_(True))) == [0, 3, 7]


def test_full_cache():
    cache = filled(2, 2)
    with pytest.raises(
        ValueError, match="append: expected at most 2 slots in all, got 1 more after 2"
    ):
        cache.append(*slot(2))
    assert written(cache.append(*slot(2), where=False)) == [0, 1]


@pytest.mark.parametrize("kind", [{}, {"window": 2, "reserved": 1, "ring": True}])
def test_several_slots_at_once(kind):
    """As one after the other, round the corner of a ring too."""
    one = two = DepthCache.empty(6, *SHAPE, jnp.float32, **kind)
    for i in range(0, 6, 2):
        one = one.append(*slot(i)).append(*slot(i + 1))
        pair = (jnp.stack(both) for both in zip(slot(i), slot(i + 1), strict=True))
        two = two.append(*pair)
    chex.assert_trees_all_equal(one, two)
    if not kind:
        with pytest.raises(ValueError, match="got 2 more after 6"):
            two.append(*(jnp.stack([x, x]) for x in slot(0)))


def test_gradient_reaches_every_append():
    def loss(keys):
        cache = DepthCache.empty(3, *SHAPE, jnp.float32)
        for i in range(3):
            cache = cache.append(keys[i], keys[i])
        return jnp.sum(cache.key * jnp.arange(1.0, 4.0).reshape(-1, 1, 1, 1, 1))

    grads = jax.jit(jax.grad(loss))(jnp.ones((3, *SHAPE)))
    np.testing.assert_array_equal(grads[:, 0, 0, 0, 0], [1.0, 2.0, 3.0])


def test_cache_can_be_donated():
    """Key and value were once the same buffer, which cannot be donated twice."""
    cache = filled(0, 2)
    key, value = slot(0)
    after = jax.jit(lambda c: c.append(key, value), donate_argnums=0)(cache)
    assert written(after) == [0, -1]
    assert cache.key.is_deleted()
    assert cache.value.is_deleted()


def test_cache_without_slots_gives_plain_attention():
    query = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
    key = value = query[:, :, :1]
    cache = DepthCache.empty(0, *SHAPE, jnp.float32)
    depth = cache.attention_kwargs()
    with_cache, without = jax.jit(
        lambda q, k, v: (moda_attention(q, k, v, **depth), moda_attention(q, k, v))
    )(query, key, value)
    np.testing.assert_array_equal(with_cache, without)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_slots": -1}, "num_slots: expected a number >= 0, got -1"),
        ({"reserved": -2, "window": 1}, "reserved: expected a number >= 0, got -2"),
        ({"window": 0}, "window: expected None or a positive number of slots, got 0"),
        ({"reserved": 2}, "window: expected slots, since reserved=2 and ring=False, got None"),
        ({"ring": True}, "window: expected slots, since reserved=0 and ring=True, got None"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        DepthCache.empty(sizes.pop("num_slots", 4), *SHAPE, **sizes)


@pytest.mark.parametrize("name", ["key", "value"])
def test_append_of_a_wrong_shape(name):
    arrays = {"key": jnp.ones(SHAPE), "value": jnp.ones(SHAPE)} | {name: jnp.ones((2, 3, 1, 5))}
    with pytest.raises(ValueError, match=rf"{name}: expected \(2, 3, 1, 4\) .*, got "):
        filled(0, 2).append(**arrays)
