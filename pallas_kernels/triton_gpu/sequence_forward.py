"""Forward over tokens: the sequence's keys, or chunk-visible slots. Tiles as in `blocks`."""

import triton
import triton.language as tl

from pallas_kernels.triton_gpu.blocks import (
    attend_block,
    beyond_gap,
    finish_softmax,
    load_matrix,
    load_segments,
    row_offsets,
    row_tokens,
    start_softmax,
    tile_base,
    token_mask,
    walk,
)


@triton.jit
def attend_span(
    total,
    maximum,
    denominator,
    query,
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
    """Continues the softmax over the key blocks begin ... end - 1, without those of the gap.
    Without MASKED, all keys of the blocks exist and every row sees them.

    `key`, `value` and `key_segments` point at token 0 of a batch's key/value head.
    """
    column = tl.arange(0, BLOCK_N)
    for i in range(begin, end - (gap_end - gap_begin)):
        first = i * BLOCK_N
        if MASKED:
            first = beyond_gap(i, gap_begin, gap_end) * BLOCK_N
        base = tl.cast(first, tl.int64) * (KV_HEADS * HEAD_DIM)
        inside = None
        mask = None
        if MASKED:
            inside = first + column < key_len
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
        keys = load_matrix(key + base, column * KV_HEADS, inside, HEAD_DIM, WIDTH)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        values = load_matrix(value + base, column * KV_HEADS, inside, HEAD_DIM, WIDTH)
        total, maximum, denominator = attend_block(
            total, maximum, denominator, scores, values, mask, SCALE, PRECISION
        )
    return total, maximum, denominator


@triton.jit
def sequence_forward_kernel(
    query,
    key,
    value,
    query_segments,
    key_segments,
    met_blocks,
    partial_out,
    partial_lse,
    out,
    lse,
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
    """Program (tile, key/value head, batch); the causal tiles with the most keys come first."""
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
    segment = load_segments(
        query_segments + batch.to(tl.int64) * Q_LEN, first + row_t, inside, HAS_SEGMENTS
    )
    total, maximum, denominator = start_softmax(
        partial_out,
        partial_lse,
        base,
        rows,
        inside,
        HAS_PARTIAL,
        BLOCK_T * GROUP_PAD,
        HEAD_DIM,
        WIDTH,
    )
    key_base = (batch.to(tl.int64) * K_LEN * KV_HEADS + kv_head) * HEAD_DIM
    segments = key_segments + batch.to(tl.int64) * K_LEN
    end = tl.cdiv(K_LEN, BLOCK_N)
    clear = K_LEN // BLOCK_N  # blocks before it are seen by every row of the tile
    if CAUSAL:
        end = tl.minimum(tl.cdiv(first + BLOCK_T, BLOCK_N), end)
        clear = tl.minimum((first + 1) // BLOCK_N, clear)
    met_blocks += batch * tl.num_programs(0) * 4
    begin, end, plain_begin, plain_end = walk(0, end, 0, clear, met_blocks, tile, HAS_SEGMENTS)
    total, maximum, denominator = attend_span(
        total,
        maximum,
        denominator,
        queries,
        first + row_t,
        segment,
        key + key_base,
        value + key_base,
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
    total, maximum, denominator = attend_span(
        total,
        maximum,
        denominator,
        queries,
        first + row_t,
        segment,
        key + key_base,
        value + key_base,
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
    finish_softmax(out, lse, base, rows, inside, total, maximum, denominator, HEAD_DIM, WIDTH)
