"""The Mosaic GPU backward of the sequence part against dense float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mosaic_gpu_forward import close, needs_mosaic, packed, slow
from tolerances import RELATIVE

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.sequence_backward.backward import DepthPart, fuses, sequence_backward
from pallas_kernels.mosaic_gpu.sequence_backward.tiles import (
    SequenceBackwardConfig,
    sequence_backward_config,
)

SMALL = SequenceBackwardConfig(dq_block_kv=64, dkv_block_q=64)  # the rings are reused early
THREE = SequenceBackwardConfig(
    dq_block_kv=64, dkv_block_q=64, dq_warpgroups=3, dkv_warpgroups=3, dkv_stages=3
)


def visible(length, keys, is_causal, segments):
    mask = np.tri(length, keys, dtype=bool) if is_causal else np.ones((length, keys), bool)
    mask = mask[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] != 0)
    return mask[:, :, None]


def make(length, keys, group, head_dim, *, batch=1, dtype=jnp.bfloat16, seed=0):
    """query, key, value, d_out and delta: random, as no real output is needed for the formulas."""
    rng = np.random.default_rng(seed)
    rows, columns = (batch, length, group, head_dim), (batch, keys, 1, head_dim)
    operands = [jnp.asarray(rng.normal(size=s), dtype) for s in (rows, columns, columns, rows)]
    return operands, jnp.asarray(rng.normal(size=rows[:3]), jnp.float32)


def reference(operands, delta, mask, extra):
    """lse with `extra` of depth slots in it, and dq, dk, dv; for one KV head."""
    query, key, value, d_out = (np.asarray(x, np.float32) for x in operands)
    delta, scale = np.asarray(delta)[..., None], query.shape[-1] ** -0.5
    scores = scale * np.einsum("btgh,bskh->btgs", query, key)
    total = np.where(mask, np.exp(scores), 0).sum(-1)
    seen = total > 0
    lse = np.where(seen, np.log(np.where(seen, total, 1)) + extra, -np.inf)
    weights = np.where(mask, np.exp(scores - np.where(seen, lse, 0)[..., None]), 0)
    ds = weights * (np.einsum("btgh,bskh->btgs", d_out, value) - delta)
    dq = scale * np.einsum("btgs,bskh->btgh", ds, key)
    dk = scale * np.einsum("btgs,btgh->bsh", ds, query)[:, :, None]
    dv = np.einsum("btgs,btgh->bsh", weights, d_out)[:, :, None]
    return jnp.asarray(lse, jnp.float32), (dq, dk, dv)


def run(operands, lse, delta, segments, is_causal, config, **settings):
    @jax.jit
    def call(operands, lse, delta, segments):
        return sequence_backward(
            *operands,
            lse,
            delta,
            scale=operands[0].shape[-1] ** -0.5,
            is_causal=is_causal,
            query_segments=segments,
            key_segments=segments,
            config=config,
            **settings,
        )

    with common.race_detection():
        return call(operands, lse, delta, segments)


def check(capfd, made, segments=None, *, is_causal=True, config=None):
    operands, delta = made
    mask = visible(operands[0].shape[1], operands[1].shape[1], is_causal, segments)
    lse, wanted = reference(operands, delta, mask, 0.5)
    *got, slots = run(operands, lse, delta, segments, is_causal, config)
    assert slots is None
    assert [x.dtype for x in got] == [jnp.float32, *[operands[0].dtype] * 2]
    for gradient, want in zip(got, wanted, strict=True):
        close(gradient, want, RELATIVE[operands[0].dtype.name])
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@needs_mosaic
@pytest.mark.parametrize(
    ("group", "config"), [(2, None), (3, THREE), slow(1, SMALL), slow(8, SMALL)]
)
def test_groups(capfd, group, config):
    """Gradients of keys and values sum over the heads of the group."""
    check(capfd, make(136, 136, group, 64), config=config)


@needs_mosaic
@pytest.mark.parametrize(
    ("q_len", "kv_len", "head_dim", "is_causal"),
    [
        (75, 37, 64, True),
        (37, 75, 64, False),
        (37, 75, 128, True),
        slow(75, 37, 128, False),
        slow(37, 75, 64, True),
        slow(75, 37, 64, False),
    ],
)
def test_odd_lengths(capfd, q_len, kv_len, head_dim, is_causal):
    check(capfd, make(q_len, kv_len, 2, head_dim), is_causal=is_causal)


@needs_mosaic
def test_packed_documents(capfd):
    """Queries of padding have lse = -inf: their gradients are zero and reach no key."""
    segments = packed(2, 136, 4)
    made = make(136, 136, 2, 64, batch=2)
    check(capfd, made, segments, config=SMALL)
    operands, delta = made
    lse, _ = reference(operands, delta, visible(136, 136, True, segments), 0.5)
    dq, dk, dv, _ = run(operands, lse, delta, segments, True, SMALL)
    for gradient in (dq, dk, dv):
        assert not np.asarray(gradient, np.float32)[segments == 0].any()


@needs_mosaic
def test_float16_and_the_querys_dtype():
    operands, delta = make(40, 40, 2, 64, dtype=jnp.float16)
    lse, wanted = reference(operands, delta, visible(40, 40, True, None), 0.5)
    *got, _ = run(operands, lse, delta, None, True, None, dq_dtype=jnp.float16)
    assert [x.dtype for x in got] == [jnp.float16] * 3
    for gradient, want in zip(got, wanted, strict=True):
        close(gradient, want, RELATIVE["float16"])


def with_depth(made, num_slots, slots, running, segments=None):
    """Reference of dq, dkd and dvd with slots; lse covers the slots alone, whatever it does."""
    (query, key, value, d_out), delta = made
    rng = np.random.default_rng(1)
    shape = (num_slots, *query.shape[:2], 1, query.shape[-1])
    arrays = [rng.normal(size=shape).astype(np.float32) for _ in range(2)]
    index = np.arange(num_slots)
    shown = sum((index >= a) & (index < b) for a, b in (slots[:2], slots[2:])) > 0
    kd, vd = (
        jnp.asarray(np.where(shown[:, None, None, None, None], x, np.nan), query.dtype)
        for x in arrays
    )
    q, do, k, v = (
        np.asarray(x, np.float32)[shown, :, :, 0] if x.ndim == 5 else np.asarray(x, np.float32)
        for x in (query, d_out, kd, vd)
    )
    mask = visible(query.shape[1], key.shape[1], True, segments)
    lse, (dq, dk, dv) = reference((query, key, value, d_out), delta, mask, 0.5)
    scale = query.shape[-1] ** -0.5
    weights = np.exp(scale * np.einsum("btgh,sbth->btgs", q, k) - np.asarray(lse)[..., None])
    weights = np.where(np.isneginf(np.asarray(lse))[..., None], 0, weights)
    ds = weights * (np.einsum("btgh,sbth->btgs", do, v) - np.asarray(delta)[..., None])
    new = np.zeros((2, *shape), np.float32)
    new[0, shown] = scale * np.einsum("btgs,btgh->sbth", ds, q)[..., None, :]
    new[1, shown] = np.einsum("btgs,btgh->sbth", weights, do)[..., None, :]
    if running is not None:
        running = tuple(jnp.asarray(rng.normal(size=shape), running) for _ in range(2))
        new += np.stack([np.asarray(x, np.float32) for x in running])
    dq = dq + scale * np.einsum("btgs,sbth->btgh", ds, k)
    return DepthPart(kd, vd, jnp.asarray(slots, jnp.int32), running), lse, (dq, dk, dv, *new)


@needs_mosaic
@pytest.mark.parametrize(
    ("group", "num_slots", "slots", "running", "documents"),
    [
        (8, 11, (0, 9, 9, 9), None, 0),  # nine slots: a whole block and one slot of another
        (2, 7, (0, 2, 4, 7), "float32", 3),
        slow(1, 3, (0, 3, 3, 3), "bfloat16", 0),
        slow(4, 9, (0, 1, 6, 9), None, 4),
        slow(2, 5, (0, 0, 0, 0), "float32", 0),
    ],
)
def test_slots_go_along(capfd, group, num_slots, slots, running, documents):
    """The slots' gradients and their part of dq; nothing else of the cache is touched."""
    length = 136 if documents == 0 and slots[1] else 75  # several blocks of keys, too
    made = make(length, length, group, 64, batch=1 + (group == 2))
    segments = packed(len(made[1]), length, documents) if documents else None
    depth, lse, wanted = with_depth(made, num_slots, slots, running, segments)
    *got, grads = run(*made[:1], lse, made[1], segments, True, None, depth=depth)
    tolerance = RELATIVE["bfloat16"]
    for gradient, want in zip((*got, *grads), wanted, strict=True):
        close(gradient, want, tolerance)
    index = np.arange(num_slots)
    hidden = ~(
        ((index >= slots[0]) & (index < slots[1])) | ((index >= slots[2]) & (index < slots[3]))
    )
    for gradient, before in zip(grads, (running and depth.running) or (0, 0), strict=True):
        assert gradient.dtype == (running or "bfloat16")
        untouched = np.asarray(before)[hidden] if running else 0
        np.testing.assert_array_equal(np.asarray(gradient)[hidden], untouched)
    split = group != 4  # slots and keys of dq are summed in turn, or by two warpgroups each
    *alone, nothing = run(
        *made[:1],
        lse,
        made[1],
        segments,
        True,
        SequenceBackwardConfig(depth_warpgroups=split),
        depth=depth._replace(want_slots=False),
    )
    assert nothing is None
    if split:
        close(alone[0], wanted[0], tolerance)
    else:
        np.testing.assert_array_equal(alone[0], got[0])
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@needs_mosaic
@pytest.mark.parametrize(
    ("want_slots", "depth_warpgroups"), [(True, None), slow(False, False), (False, True)]
)
def test_tiles_with_rows_for_more_heads_than_a_group_has(capfd, want_slots, depth_warpgroups):
    """Two groups of three: their gradients are those of either alone."""
    length, slots, segments = 40, (0, 2, 3, 8), packed(1, 40, 3)
    mades = [make(length, length, 3, 64, seed=seed) for seed in (0, 1)]
    alone = [with_depth(made, 8, slots, None, segments) for made in mades]

    def join(arrays, axis=-2):
        return jnp.concatenate([*arrays], axis)

    operands = [join(x) for x in zip(*(made[0] for made in mades), strict=True)]
    delta, lse = join((made[1] for made in mades), 2), join((lse for _, lse, _ in alone), 2)
    key, value = (join(part[i] for part, *_ in alone) for i in (0, 1))
    depth = DepthPart(key, value, alone[0][0].slots, None, want_slots)
    wanted = [join(x) for x in zip(*(want for *_, want in alone), strict=True)]
    config = SequenceBackwardConfig(depth_warpgroups=depth_warpgroups)
    *got, grads = run(operands, lse, delta, segments, True, config, depth=depth)
    for gradient, want in zip((*got, *(grads or ())), wanted, strict=want_slots):
        close(gradient, want, RELATIVE["bfloat16"])
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@needs_mosaic
def test_which_calls_are_fused():
    def fused(group, head_dim=64, want=True, running=None, kv_heads=1):
        query, key = (
            jax.ShapeDtypeStruct((1, 64, n, head_dim), jnp.bfloat16)
            for n in (kv_heads * group, kv_heads)
        )
        slots = jax.ShapeDtypeStruct((4, 1, 64, kv_heads, head_dim), jnp.bfloat16)
        if running is not None:
            running = (jax.ShapeDtypeStruct(slots.shape, running),) * 2
        return fuses(query, key, DepthPart(slots, slots, None, running, want), is_causal=True)

    assert [g for g in (1, 2, 3, 4, 6, 8, 16) if fused(g)] == [1, 2, 4, 8]
    assert fused(3, kv_heads=2)
    assert fused(16, want=False)
    assert fused(8, running=jnp.float32)
    assert not fused(8, head_dim=128, running=jnp.float32)  # no memory is left for its gradients


@needs_mosaic
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lowers_for_gpus(head_dim):
    query, rows = (1, 4096, 64, head_dim), (1, 4096, 64)
    shapes = [query, *[(1, 4096, 8, head_dim)] * 2, query]
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    operands += [jax.ShapeDtypeStruct(rows, jnp.float32)] * 2
    call = jax.jit(lambda *args: sequence_backward(*args, scale=0.1, is_causal=True))
    with platforms.compiling_for("gpu"):
        text = call.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 2


def test_config_is_checked():
    with pytest.raises(ValueError, match="dk, dv: the tile needs"):
        SequenceBackwardConfig(dq_block_kv=64, dkv_stages=4).check(128)
    with pytest.raises(ValueError, match="blocks of 64"):
        SequenceBackwardConfig(dq_block_kv=96).check(64)
    with pytest.raises(ValueError, match="2 stages"):
        SequenceBackwardConfig(dq_stages=1).check(64)
    for head_dim in (64, 128):
        sequence_backward_config(head_dim).check(head_dim)
