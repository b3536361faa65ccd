"""Backward over the depth slots of a tile's own tokens; see `depth_forward`."""

import triton
import triton.language as tl

from pallas_kernels.triton_gpu.blocks import (
    LOG2_E,
    load_matrix,
    load_row_lse,
    load_segments,
    row_offsets,
    row_tokens,
    store_matrix,
    tile_base,
)
from pallas_kernels.triton_gpu.depth_forward import slot_columns


@triton.jit
def store_gradient(
    old, new, offset, x, mask, ADD: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """Writes a block of a slot's gradient, added to what `old` holds there if ADD."""
    if ADD:
        x += load_matrix(old, offset, mask, HEAD_DIM, WIDTH)
    store_matrix(new, offset, x, mask, HEAD_DIM, WIDTH)


@triton.jit
def zero_slots(
    d_key,
    d_value,
    start,
    stop,
    first,
    LENGTH: tl.constexpr,
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Writes the gradients of invisible slots."""
    zeros = tl.zeros([BLOCK_T * BLOCK_S, WIDTH], tl.float32)
    for slot in range(start, stop, BLOCK_S):
        offset, _, there = slot_columns(
            slot, stop, first, LENGTH, BATCH, KV_HEADS, BLOCK_T, BLOCK_S
        )
        store_matrix(d_key, offset, zeros, there, HEAD_DIM, WIDTH)
        store_matrix(d_value, offset, zeros, there, HEAD_DIM, WIDTH)


@triton.jit
def depth_backward_kernel(
    query,
    d_out,
    lse,
    delta,
    depth_key,
    depth_value,
    bounds,
    query_segments,
    old_dk,
    old_dv,
    d_query,
    d_depth_key,
    d_depth_value,
    Q_LEN: tl.constexpr,
    BATCH: tl.constexpr,
    SLOTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    RANGES: tl.constexpr,
    ALL_SLOTS: tl.constexpr,
    WANT_DEPTH: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (tile and key/value head, batch): reads each slot once, writes each gradient once.

    ADD: the gradients are added to `old_dk` and `old_dv`, which the outputs alias; else
    invisible slots get zeros, unless ALL_SLOTS are visible. Without WANT_DEPTH neither is written.
    """
    kv_head, tile = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    batch = tl.program_id(1)
    first = tile * BLOCK_T
    row_t, row_g = row_tokens(BLOCK_T, GROUP_PAD)
    rows = row_offsets(row_t, row_g, KV_HEADS, GROUP)
    inside = (first + row_t < Q_LEN) & (row_g < GROUP)
    base = tile_base(batch, Q_LEN, first, kv_head, KV_HEADS, GROUP)
    queries = load_matrix(query + base * HEAD_DIM, rows, inside, HEAD_DIM, WIDTH)
    d_outs = load_matrix(d_out + base * HEAD_DIM, rows, inside, HEAD_DIM, WIDTH)
    row_lse = load_row_lse(lse + base, rows, inside)
    row_delta = tl.load(delta + base + rows, mask=inside, other=0.0)
    sees = inside
    if HAS_SEGMENTS:
        segments = query_segments + batch.to(tl.int64) * Q_LEN
        sees = inside & (load_segments(segments, first + row_t, inside, True) != 0)
    dq = tl.zeros([BLOCK_T * GROUP_PAD, WIDTH], tl.float32)
    token = ((batch.to(tl.int64) * Q_LEN + first) * KV_HEADS + kv_head) * HEAD_DIM
    key, value = depth_key + token, depth_value + token
    old_dk, old_dv = old_dk + token, old_dv + token
    new_dk, new_dv = d_depth_key + token, d_depth_value + token
    for i in tl.static_range(RANGES):
        start, stop = tl.load(bounds + 2 * i), tl.load(bounds + 2 * i + 1)
        for slot in range(start, stop, BLOCK_S):
            offset, column_t, there = slot_columns(
                slot, stop, first, Q_LEN, BATCH, KV_HEADS, BLOCK_T, BLOCK_S
            )
            keys = load_matrix(key, offset, there, HEAD_DIM, WIDTH)
            values = load_matrix(value, offset, there, HEAD_DIM, WIDTH)
            mask = (row_t[:, None] == column_t[None, :]) & there[None, :] & sees[:, None]
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            weights = tl.exp2(scores * (SCALE * LOG2_E) - row_lse[:, None])
            weights = tl.where(mask, weights, 0.0)
            d_weights = tl.dot(d_outs, tl.trans(values), input_precision=PRECISION)
            d_scores = (weights * (d_weights - row_delta[:, None]) * SCALE).to(keys.dtype)
            dq = tl.dot(d_scores, keys, dq, input_precision=PRECISION)
            if WANT_DEPTH:
                dk = tl.dot(tl.trans(d_scores), queries, input_precision=PRECISION)
                store_gradient(old_dk, new_dk, offset, dk, there, ADD, HEAD_DIM, WIDTH)
                weights = weights.to(d_outs.dtype)
                dv = tl.dot(tl.trans(weights), d_outs, input_precision=PRECISION)
                store_gradient(old_dv, new_dv, offset, dv, there, ADD, HEAD_DIM, WIDTH)
    store_matrix(d_query + base * HEAD_DIM, rows, dq, inside, HEAD_DIM, WIDTH)
    if WANT_DEPTH and not ADD and not ALL_SLOTS:
        begin = 0
        for i in tl.static_range(RANGES):
            zero_slots(
                new_dk,
                new_dv,
                begin,
                tl.load(bounds + 2 * i),
                first,
                Q_LEN,
                BATCH,
                KV_HEADS,
                HEAD_DIM,
                WIDTH,
                BLOCK_T,
                BLOCK_S,
            )
            begin = tl.load(bounds + 2 * i + 1)
        zero_slots(
            new_dk,
            new_dv,
            begin,
            SLOTS,
            first,
            Q_LEN,
            BATCH,
            KV_HEADS,
            HEAD_DIM,
            WIDTH,
            BLOCK_T,
            BLOCK_S,
        )
