"""Backward over tokens: dk and dv key block by key block, dq tile by tile; nothing is atomic.

With the unified o and lse of the whole call, whatever else its softmax saw.
"""

import triton
import triton.language as tl

from pallas_kernels.triton_gpu.blocks import (
    LOG2_E,
    beyond_gap,
    load_matrix,
    load_row_lse,
    load_segments,
    row_offsets,
    row_tokens,
    store_matrix,
    tile_base,
    token_mask,
    walk,
)


@triton.jit
def dkv_span(
    d_key,
    d_value,
    keys,
    values,
    key_token,
    key_segment,
    query,
    d_out,
    lse,
    delta,
    query_segments,
    begin,
    end,
    gap_begin,
    gap_end,
    length,
    key_len,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Adds what the query tiles begin ... end - 1, without those of the gap, contribute to a block
    of keys. Without MASKED, every row of the tiles sees all of these keys.

    `query`, `d_out`, `lse`, `delta` and `query_segments` point at token 0 of a batch's group. Rows
    that do not exist have lse = +inf, so all their weights are 0.
    """
    row_t, row_g = row_tokens(BLOCK_T, GROUP_PAD)
    rows = row_offsets(row_t, row_g, KV_HEADS, GROUP)
    for i in range(begin, end - (gap_end - gap_begin)):
        first = i * BLOCK_T
        if MASKED:
            first = beyond_gap(i, gap_begin, gap_end) * BLOCK_T
        base = tl.cast(first, tl.int64) * (KV_HEADS * GROUP)
        inside = (first + row_t < length) & (row_g < GROUP)
        queries = load_matrix(query + base * HEAD_DIM, rows, inside, HEAD_DIM, WIDTH)
        row_lse = load_row_lse(lse + base, rows, inside)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        weights = tl.exp2(scores * (SCALE * LOG2_E) - row_lse[None, :])
        if MASKED:
            segment = load_segments(query_segments, first + row_t, inside, HAS_SEGMENTS)
            mask = token_mask(
                first + row_t, key_token, segment, key_segment, key_len, CAUSAL, CHUNK, HAS_SEGMENTS
            )
            weights = tl.where(tl.trans(mask), weights, 0.0)
        d_outs = load_matrix(d_out + base * HEAD_DIM, rows, inside, HEAD_DIM, WIDTH)
        d_value = tl.dot(weights.to(d_outs.dtype), d_outs, d_value, input_precision=PRECISION)
        d_weights = tl.dot(values, tl.trans(d_outs), input_precision=PRECISION)
        row_delta = tl.load(delta + base + rows, mask=inside, other=0.0)
        d_scores = weights * (d_weights - row_delta[None, :])
        d_key = tl.dot(d_scores.to(queries.dtype), queries, d_key, input_precision=PRECISION)
    return d_key, d_value


@triton.jit
def dq_span(
    d_query,
    query,
    d_out,
    row_lse,
    row_delta,
    row_token,
    row_segment,
    key,
    value,
    key_segments,
    begin,
    end,
    gap_begin,
    gap_end,
    key_len,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds dq / scale of some key blocks to a tile; see `attend_span`."""
    column = tl.arange(0, BLOCK_N)
    for i in range(begin, end - (gap_end - gap_begin)):
        first = i * BLOCK_N
        if MASKED:
            first = beyond_gap(i, gap_begin, gap_end) * BLOCK_N
        base = tl.cast(first, tl.int64) * (KV_HEADS * HEAD_DIM)
        inside = None
        if MASKED:
            inside = first + column < key_len
        keys = load_matrix(key + base, column * KV_HEADS, inside, HEAD_DIM, WIDTH)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        weights = tl.exp2(scores * (SCALE * LOG2_E) - row_lse[:, None])
        if MASKED:
            segment = load_segments(key_segments, first + column, inside, HAS_SEGMENTS)
            mask = token_mask(
                row_token,
                first + column,
                row_segment,
                segment,
                key_len,
                CAUSAL,
                CHUNK,
                HAS_SEGMENTS,
            )
            weights = tl.where(mask, weights, 0.0)
        values = load_matrix(value + base, column * KV_HEADS, inside, HEAD_DIM, WIDTH)
        d_weights = tl.dot(d_out, tl.trans(values), input_precision=PRECISION)
        d_scores = weights * (d_weights - row_delta[:, None])
        d_query = tl.dot(d_scores.to(keys.dtype), keys, d_query, input_precision=PRECISION)
    return d_query


@triton.jit
def sequence_dkv_kernel(
    query,
    key,
    value,
    d_out,
    lse,
    delta,
    query_segments,
    key_segments,
    met_tiles,
    d_key,
    d_value,
    Q_LEN: tl.constexpr,
    K_LEN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (key block, key/value head, batch): a group's heads are added up in registers."""
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = block * BLOCK_N
    token = first + tl.arange(0, BLOCK_N)
    inside = token < K_LEN
    key_base = (batch.to(tl.int64) * K_LEN * KV_HEADS + kv_head) * HEAD_DIM
    columns = token.to(tl.int64) * KV_HEADS
    keys = load_matrix(key + key_base, columns, inside, HEAD_DIM, WIDTH)
    values = load_matrix(value + key_base, columns, inside, HEAD_DIM, WIDTH)
    key_segment = load_segments(
        key_segments + batch.to(tl.int64) * K_LEN, token, inside, HAS_SEGMENTS
    )
    base = tile_base(batch, Q_LEN, 0, kv_head, KV_HEADS, GROUP)
    query, d_out = query + base * HEAD_DIM, d_out + base * HEAD_DIM
    lse, delta = lse + base, delta + base
    segments = query_segments + batch.to(tl.int64) * Q_LEN
    dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    begin = 0
    clear = 0  # tiles from here on see every key of the block
    if CAUSAL:
        begin = first // BLOCK_T
        clear = tl.cdiv(first + BLOCK_N - 1, BLOCK_T)
    met_tiles += batch * tl.num_programs(0) * 4
    begin, end, plain_begin, plain_end = walk(
        begin,
        tl.cdiv(Q_LEN, BLOCK_T),
        clear,
        tl.cdiv(Q_LEN, BLOCK_T),
        met_tiles,
        block,
        HAS_SEGMENTS,
    )
    dk, dv = dkv_span(
        dk,
        dv,
        keys,
        values,
        token,
        key_segment,
        query,
        d_out,
        lse,
        delta,
        segments,
        begin,
        end,
        plain_begin,
        plain_end,
        Q_LEN,
        K_LEN,
        SCALE,
        PRECISION,
        CAUSAL,
        0,
        HAS_SEGMENTS,
        True,
        KV_HEADS,
        GROUP,
        GROUP_PAD,
        HEAD_DIM,
        WIDTH,
        BLOCK_T,
    )
    dk, dv = dkv_span(
        dk,
        dv,
        keys,
        values,
        token,
        key_segment,
        query,
        d_out,
        lse,
        delta,
        segments,
        plain_begin,
        plain_end,
        0,
        0,
        Q_LEN,
        K_LEN,
        SCALE,
        PRECISION,
        CAUSAL,
        0,
        HAS_SEGMENTS,
        False,
        KV_HEADS,
        GROUP,
        GROUP_PAD,
        HEAD_DIM,
        WIDTH,
        BLOCK_T,
    )
    store_matrix(d_key + key_base, columns, dk * SCALE, inside, HEAD_DIM, WIDTH)
    store_matrix(d_value + key_base, columns, dv, inside, HEAD_DIM, WIDTH)


@triton.jit
def sequence_dq_kernel(
    query,
    key,
    value,
    d_out,
    lse,
    delta,
    query_segments,
    key_segments,
    met_blocks,
    partial_dq,
    d_query,
    Q_LEN: tl.constexpr,
    K_LEN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_PARTIAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tile, key/value head, batch); adds the depth part's dq, if there is one."""
    tile = tl.program_id(0)
    if CAUSAL:
        tile = tl.num_programs(0) - 1 - tile
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    first = tile * BLOCK_T
    row_t, row_g = row_tokens(BLOCK_T, GROUP_PAD)
    rows = row_offsets(row_t, row_g, KV_HEADS, GROUP)
    inside = (first + row_t < Q_LEN) & (row_g < GROUP)
    base = tile_base(batch, Q_LEN, first, kv_head, KV_HEADS, GROUP)
    queries = load_matrix(query + base * HEAD_DIM, rows, inside, HEAD_DIM, WIDTH)
    d_outs = load_matrix(d_out + base * HEAD_DIM, rows, inside, HEAD_DIM, WIDTH)
    row_lse = load_row_lse(lse + base, rows, inside)
    row_delta = tl.load(delta + base + rows, mask=inside, other=0.0)
    segment = load_segments(
        query_segments + batch.to(tl.int64) * Q_LEN, first + row_t, inside, HAS_SEGMENTS
    )
    key_base = (batch.to(tl.int64) * K_LEN * KV_HEADS + kv_head) * HEAD_DIM
    key, value = key + key_base, value + key_base
    segments = key_segments + batch.to(tl.int64) * K_LEN
    dq = tl.zeros([BLOCK_T * GROUP_PAD, WIDTH], tl.float32)
    end = tl.cdiv(K_LEN, BLOCK_N)
    clear = K_LEN // BLOCK_N
    if CAUSAL:
        end = tl.minimum(tl.cdiv(first + BLOCK_T, BLOCK_N), end)
        clear = tl.minimum((first + 1) // BLOCK_N, clear)
    met_blocks += batch * tl.num_programs(0) * 4
    begin, end, plain_begin, plain_end = walk(0, end, 0, clear, met_blocks, tile, HAS_SEGMENTS)
    dq = dq_span(
        dq,
        queries,
        d_outs,
        row_lse,
        row_delta,
        first + row_t,
        segment,
        key,
        value,
        segments,
        plain_begin,
        plain_end,
        0,
        0,
        K_LEN,
        SCALE,
        PRECISION,
        CAUSAL,
        0,
        HAS_SEGMENTS,
        False,
        KV_HEADS,
        HEAD_DIM,
        WIDTH,
        BLOCK_N,
    )
    dq = dq_span(
        dq,
        queries,
        d_outs,
        row_lse,
        row_delta,
        first + row_t,
        segment,
        key,
        value,
        segments,
        begin,
        end,
        plain_begin,
        plain_end,
        K_LEN,
        SCALE,
        PRECISION,
        CAUSAL,
        0,
        HAS_SEGMENTS,
        True,
        KV_HEADS,
        HEAD_DIM,
        WIDTH,
        BLOCK_N,
    )
    dq = dq * SCALE
    if HAS_PARTIAL:
        dq += load_matrix(partial_dq + base * HEAD_DIM, rows, inside, HEAD_DIM, WIDTH)
    store_matrix(d_query + base * HEAD_DIM, rows, dq, inside, HEAD_DIM, WIDTH)
