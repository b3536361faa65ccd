"""Backward over chunk-visible slots: each slot is a set of keys, as the sequence is."""

import triton
import triton.language as tl

from pallas_kernels.triton_gpu.blocks import (
    load_matrix,
    load_row_lse,
    load_segments,
    row_offsets,
    row_tokens,
    store_matrix,
    tile_base,
)
from pallas_kernels.triton_gpu.depth_backward import store_gradient
from pallas_kernels.triton_gpu.sequence_backward import dkv_span, dq_span


@triton.jit
def chunk_dkv_kernel(
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
    CHUNK: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (slot and key block, key/value head, batch); see `depth_backward_kernel`."""
    slot, block = tl.program_id(0) % SLOTS, tl.program_id(0) // SLOTS
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    visible = (slot >= tl.load(bounds)) & (slot < tl.load(bounds + 1))
    if RANGES == 2:
        visible |= (slot >= tl.load(bounds + 2)) & (slot < tl.load(bounds + 3))
    first = block * BLOCK_N
    token = first + tl.arange(0, BLOCK_N)
    inside = token < Q_LEN
    key_base = (tl.cast(slot, tl.int64) * BATCH + batch) * (Q_LEN * KV_HEADS) + kv_head
    columns = key_base + token * KV_HEADS
    if visible:
        keys = load_matrix(depth_key, columns, inside, HEAD_DIM, WIDTH)
        values = load_matrix(depth_value, columns, inside, HEAD_DIM, WIDTH)
        segments = query_segments + batch.to(tl.int64) * Q_LEN
        key_segment = load_segments(segments, token, inside, HAS_SEGMENTS)
        base = tile_base(batch, Q_LEN, 0, kv_head, KV_HEADS, GROUP)
        dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
        dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
        end = ((first + BLOCK_N - 1) // CHUNK + 1) * CHUNK
        dk, dv = dkv_span(
            dk,
            dv,
            keys,
            values,
            token,
            key_segment,
            query + base * HEAD_DIM,
            d_out + base * HEAD_DIM,
            lse + base,
            delta + base,
            segments,
            first // BLOCK_T,
            tl.cdiv(tl.minimum(end, Q_LEN), BLOCK_T),
            0,
            0,
            Q_LEN,
            Q_LEN,
            SCALE,
            PRECISION,
            True,
            CHUNK,
            HAS_SEGMENTS,
            True,
            KV_HEADS,
            GROUP,
            GROUP_PAD,
            HEAD_DIM,
            WIDTH,
            BLOCK_T,
        )
        store_gradient(old_dk, d_depth_key, columns, dk * SCALE, inside, ADD, HEAD_DIM, WIDTH)
        store_gradient(old_dv, d_depth_value, columns, dv, inside, ADD, HEAD_DIM, WIDTH)
    elif not ADD:
        zeros = tl.zeros([BLOCK_N, WIDTH], tl.float32)
        store_matrix(d_depth_key, columns, zeros, inside, HEAD_DIM, WIDTH)
        store_matrix(d_depth_value, columns, zeros, inside, HEAD_DIM, WIDTH)


@triton.jit
def chunk_dq_kernel(
    query,
    d_out,
    lse,
    delta,
    depth_key,
    depth_value,
    bounds,
    query_segments,
    d_query,
    Q_LEN: tl.constexpr,
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    RANGES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tile, key/value head, batch); see `chunk_forward_kernel`."""
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tile * BLOCK_T
    row_t, row_g = row_tokens(BLOCK_T, GROUP_PAD)
    rows = row_offsets(row_t, row_g, KV_HEADS, GROUP)
    inside = (first + row_t < Q_LEN) & (row_g < GROUP)
    base = tile_base(batch, Q_LEN, first, kv_head, KV_HEADS, GROUP)
    queries = load_matrix(query + base * HEAD_DIM, rows, inside, HEAD_DIM, WIDTH)
    d_outs = load_matrix(d_out + base * HEAD_DIM, rows, inside, HEAD_DIM, WIDTH)
    row_lse = load_row_lse(lse + base, rows, inside)
    row_delta = tl.load(delta + base + rows, mask=inside, other=0.0)
    segments = query_segments + batch.to(tl.int64) * Q_LEN
    segment = load_segments(segments, first + row_t, inside, HAS_SEGMENTS)
    dq = tl.zeros([BLOCK_T * GROUP_PAD, WIDTH], tl.float32)
    key_base = (batch.to(tl.int64) * Q_LEN * KV_HEADS + kv_head) * HEAD_DIM
    begin = first // CHUNK * CHUNK // BLOCK_N
    end = tl.cdiv(tl.minimum(first + BLOCK_T, Q_LEN), BLOCK_N)
    for i in tl.static_range(RANGES):
        start, stop = tl.load(bounds + 2 * i), tl.load(bounds + 2 * i + 1)
        for slot in range(start, stop):
            offset = key_base + tl.cast(slot, tl.int64) * (BATCH * Q_LEN * KV_HEADS * HEAD_DIM)
            dq = dq_span(
                dq,
                queries,
                d_outs,
                row_lse,
                row_delta,
                first + row_t,
                segment,
                depth_key + offset,
                depth_value + offset,
                segments,
                begin,
                end,
                0,
                0,
                Q_LEN,
                SCALE,
                PRECISION,
                True,
                CHUNK,
                HAS_SEGMENTS,
                True,
                KV_HEADS,
                HEAD_DIM,
                WIDTH,
                BLOCK_N,
            )
    store_matrix(d_query + base * HEAD_DIM, rows, dq * SCALE, inside, HEAD_DIM, WIDTH)
