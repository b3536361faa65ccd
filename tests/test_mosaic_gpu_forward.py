"""The fused Mosaic GPU forward against dense float32, in the interpreter or on a Hopper."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import LSE_RELATIVE, RELATIVE

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.fused_forward.attend import attend
from pallas_kernels.mosaic_gpu.row_tiles import ForwardConfig, RowPlan, forward_config, tile_heads
from pallas_kernels.mosaic_gpu.wgmma import Walk
from pallas_kernels.segments import segment_bounds

needs_mosaic = pytest.mark.newer_jax(reason="Pallas Mosaic GPU needs JAX >= 0.11")
SMALL = ForwardConfig(block_kv=64, stages=2, warpgroups=2)  # the ring is reused early


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def make(
    length, keys, group, head_dim, num_slots, slots=(), *, batch=1, dtype=jnp.bfloat16, kv_heads=1
):
    """query, key, value, depth_key, depth_value with NaN in the slots that are not visible."""
    shapes = {"query": (batch, length, kv_heads * group, head_dim)}
    if keys:
        shapes |= dict.fromkeys(("key", "value"), (batch, keys, kv_heads, head_dim))
    if num_slots:
        shape = (num_slots, batch, length, kv_heads, head_dim)
        shapes |= dict.fromkeys(("depth_key", "depth_value"), shape)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("depth_key", "depth_value")[: 2 * bool(num_slots)]:
        arrays[name][~visible(num_slots, slots)] = np.nan
    names = ("query", "key", "value", "depth_key", "depth_value")
    return [jnp.asarray(arrays[n], dtype) if n in arrays else None for n in names]


def visible(num_slots, slots):
    index = np.arange(num_slots)
    return sum((index >= a) & (index < b) for a, b in (slots[:2], slots[2:])) > 0


def reference(query, key, value, depth_key, depth_value, slots, is_causal, segments):
    """o and lse in float32, for one KV head."""
    query, key, value, depth_key, depth_value = (
        None if x is None else np.asarray(x, np.float32)
        for x in (query, key, value, depth_key, depth_value)
    )
    scale, length = query.shape[-1] ** -0.5, query.shape[1]
    scores, values = [], []
    seen = np.ones(query.shape[:2], bool) if segments is None else segments != 0
    if key is not None:
        mask = np.broadcast_to(seen[:, :, None], (*seen.shape, key.shape[1])).copy()
        if is_causal:
            mask &= np.tri(length, key.shape[1], dtype=bool)
        if segments is not None:
            mask &= segments[:, :, None] == segments[:, None]
        products = np.einsum("btgh,bskh->btgs", query, key)
        scores.append(np.where(mask[:, :, None], products, -np.inf))
        values.append(np.broadcast_to(value[:, None, :, 0], (*mask.shape, value.shape[-1])))
    if depth_key is not None:
        shown = visible(depth_key.shape[0], slots)
        products = np.einsum("btgh,sbtkh->btgs", query, depth_key[shown])
        scores.append(np.where(seen[:, :, None, None], products, -np.inf))
        values.append(depth_value[shown][..., 0, :].transpose(1, 2, 0, 3))
    scores, values = scale * np.concatenate(scores, -1), np.concatenate(values, 2)
    largest = scores.max(-1, keepdims=True, initial=-1e30)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    safe = np.where(total > 0, total, 1)
    lse = np.where(total > 0, np.log(safe) + largest, -np.inf)[..., 0]
    return np.einsum("btgs,btsh->btgh", weights / safe, values), lse


def close(got, want, tolerance):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    largest = np.abs(want[finite]).max(initial=1e-30)
    assert np.abs(got[finite] - want[finite]).max(initial=0) <= tolerance * largest


def packed(batch, length, documents):
    """Documents in a row, padding first and last."""
    ids = np.sort(np.random.default_rng(1).integers(0, documents + 1, (batch, length)), 1)
    return np.roll(ids, -3, 1).astype(np.int32)


def run(operands, slots, segments=None, *, is_causal=True, config=None):
    @jax.jit
    def call(operands, slots, segments):
        return attend(
            *operands,
            slots,
            scale=operands[0].shape[-1] ** -0.5,
            is_causal=is_causal,
            query_segments=segments,
            key_segments=segments,
            config=config,
        )

    slots = None if operands[3] is None else jnp.asarray(slots, jnp.int32)
    with common.race_detection():
        return call(operands, slots, segments)


def check(capfd, operands, slots, segments=None, *, is_causal=True, config=None):
    out, lse = run(operands, slots, segments, is_causal=is_causal, config=config)
    kv_heads = next(x for x in operands[1::2] if x is not None).shape[-2]
    heads = zip(
        *([None] * kv_heads if x is None else np.split(x, kv_heads, axis=-2) for x in operands),
        strict=True,
    )
    parts = [reference(*head, slots, is_causal, segments) for head in heads]
    want_out, want_lse = (np.concatenate(x, axis=2) for x in zip(*parts, strict=True))
    close(out, want_out, RELATIVE[operands[0].dtype.name])
    close(lse, want_lse, LSE_RELATIVE)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@needs_mosaic
@pytest.mark.parametrize("group", [1, 2, slow(3), 8, slow(16)])
def test_groups(capfd, group):
    """A tile's rows are heads and tokens; the ring holds both kinds of blocks."""
    slots = (0, 2, 3, 7)
    check(capfd, make(72, 72, group, 64, 8, slots), slots, config=SMALL)


@needs_mosaic
@pytest.mark.parametrize(("group", "length"), [(3, 40), slow(6, 24)])
def test_tiles_with_rows_for_more_heads_than_a_group_has(capfd, group, length):
    """The rows after a group's hold another's heads; the last group's, nothing of use."""
    slots, segments = (0, 2, 3, 8), packed(1, length, 3)
    operands = make(length, length, group, 64, 8, slots, kv_heads=2)
    check(capfd, operands, slots, segments, config=SMALL)


@needs_mosaic
@pytest.mark.parametrize("group", [8, 2])
def test_blocks_of_slots_and_keys(capfd, group):
    """Several of both kinds, more than the ring has stages."""
    slots = (1, 11, 14, 20)
    config = ForwardConfig(
        block_kv=64, stages=2, depth_parts=1 + group % 4, alternate=group == 2, piles=2
    )
    check(capfd, make(200, 200, group, 64, 20, slots), slots, config=config)


@needs_mosaic
@pytest.mark.parametrize(
    ("head_dim", "is_causal"), [(64, False), (128, True), slow(64, True), slow(128, False)]
)
def test_odd_lengths(capfd, head_dim, is_causal):
    slots = (0, 3, 3, 3)
    check(capfd, make(37, 75, 2, head_dim, 3, slots), slots, is_causal=is_causal)


@needs_mosaic
@pytest.mark.parametrize(("group", "length"), [(2, 200), (1, 72), (4, 72)])
def test_packed_documents(capfd, group, length):
    """Blocks outside the documents of a tile are skipped, padding sees nothing.

    A row's token is in one of 4, 8 or 2 octets of its tile.
    """
    slots, segments = (0, 3, 4, 9), packed(2, length, 4)
    check(capfd, make(length, length, group, 64, 9, slots, batch=2), slots, segments, config=SMALL)


@needs_mosaic
def test_depth_only_float16(capfd):
    slots = (1, 2, 4, 4)
    check(capfd, make(40, 0, 4, 64, 5, slots, dtype=jnp.float16), slots)


@needs_mosaic
def test_sequence_only(capfd):
    check(capfd, make(200, 200, 4, 64, 0), (), config=SMALL)


@needs_mosaic
def test_nothing_visible(capfd):
    """No slot and no key: o = 0 and lse = -inf, and the NaN of every slot stays out."""
    out, lse = run(make(24, 0, 2, 64, 3, (0, 0, 2, 2)), (0, 0, 2, 2))
    assert not np.asarray(out, np.float32).any()
    assert np.isneginf(lse).all()


@needs_mosaic
def test_more_tiles_than_thread_blocks(capfd, monkeypatch):
    """A persistent thread block takes tile after tile, its barriers running on."""
    monkeypatch.setattr(sys.modules[attend.__module__], "_multiprocessors", lambda: 2)
    slots = (0, 9, 9, 9)
    check(capfd, make(104, 104, 8, 64, 9, slots), slots, config=SMALL)


@needs_mosaic
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scale_of_any_sign(scale):
    query, key, value, *_ = make(24, 24, 1, 64, 0)
    out, _ = attend(query, key, value, None, None, None, scale=scale, is_causal=False)
    logits = scale * np.einsum(
        "btgh,bskh->btgs", np.asarray(query, np.float32), np.asarray(key, np.float32)
    )
    weights = np.asarray(jax.nn.softmax(logits))
    want = np.einsum("btgs,bskh->btgh", weights, np.asarray(value, np.float32))
    close(out, want, RELATIVE["bfloat16"])


@needs_mosaic
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lowers_for_gpus(head_dim):
    """Shapes too large for the interpreter pass Mosaic's layout inference."""
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in [(1, 4096, 64, head_dim), *[(1, 4096, 8, head_dim)] * 2]
        + [(64, 1, 4096, 8, head_dim)] * 2
    ]
    slots = jax.ShapeDtypeStruct((4,), jnp.int32)
    call = jax.jit(lambda *args: attend(*args, scale=0.1, is_causal=True))
    with platforms.compiling_for("gpu"):
        text = call.trace(*operands, slots).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_config_is_checked():
    with pytest.raises(ValueError, match="bytes of shared memory"):
        ForwardConfig(stages=4).check(128)
    with pytest.raises(ValueError, match="block_kv"):
        ForwardConfig(block_kv=100).check(64)
    with pytest.raises(ValueError, match="warpgroups"):
        ForwardConfig(warpgroups=4).check(64)
    for head_dim in (64, 128):
        forward_config(head_dim).check(head_dim)


def test_tile_heads():
    assert [tile_heads(g) for g in (1, 2, 3, 4, 6, 8, 12, 32)] == [1, 2, 1, 4, 2, 8, 4, 8]


def test_which_tiles_have_all_heads_of_a_group():
    def heads(group, *, kv_heads=2, length=512, slots=46):
        plan = RowPlan(
            SMALL, 1, length, length, kv_heads, group, 64, jnp.bfloat16, 1.0, True, True, slots
        )
        assert plan.heads * plan.tokens == 64
        return plan.heads

    assert [heads(g) for g in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 8, 8, 1, 4]
    assert heads(3, slots=0) == 1  # nothing is read again
    assert heads(3, length=32768) == 1  # products with the keys cost more
    assert heads(3, kv_heads=1) == 1


def test_segment_bounds_are_never_too_narrow():
    """Any ids, sorted or not: every pair that may meet is within the bounds; no other is whole."""
    rng = np.random.default_rng(0)
    tiles, others = rng.integers(0, 3, (2, 12, 2)), rng.integers(0, 3, (2, 30))
    others[:, 8:16], others[0, 20:24] = 2, 1
    bounds = np.asarray(segment_bounds(jnp.asarray(tiles), jnp.asarray(others), 4))
    wholes = 0
    for batch, tile in np.ndindex(2, 12):
        ids = tiles[batch, tile]
        meets = np.isin(others[batch], ids[ids != 0])
        blocks = np.nonzero(meets)[0] // 4
        first, stop, whole_first, whole_stop = bounds[batch, tile]
        assert all(first <= block < stop for block in blocks)
        whole = others[batch, 4 * whole_first : 4 * whole_stop]
        assert (whole[:, None] == ids).all()
        assert (whole != 0).all()
        wholes += len(whole)
    assert wholes
    alone = segment_bounds(jnp.array([[[7]], [[0]]]), jnp.array([[1, 7, 7, 7, 7, 9]] * 2), 2)
    assert alone.tolist() == [[[0, 3, 1, 2]], [[0, 0, 0, 0]]]


def test_walk_meets_every_block_once():
    for start, stop, first, last in [(0, 5, 0, 5), (0, 5, 2, 4), (1, 7, 0, 3), (2, 4, 7, 9)]:
        for bounds in (None, (2, 4, 2, 3), (0, 9, 3, 9), (5, 5, 0, 0)):
            walk = Walk.of(start, stop, first, last, bounds)
            blocks = [int(walk.nth(i)) for i in range(int(walk.count))]
            low, high = (start, stop) if bounds is None else bounds[:2]
            assert sorted(blocks) == list(range(max(start, low), min(stop, high)))
            plain = blocks[: int(walk.plain)]
            assert all(first <= block < last for block in plain)
            assert bounds is None or all(bounds[2] <= block < bounds[3] for block in plain)
