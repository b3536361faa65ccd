"""Forward over chunk-visible slots: slot after slot, the tokens of the tile's chunks."""

import triton
import triton.language as tl

from pallas_kernels.triton_gpu.blocks import (
    finish_softmax,
    load_matrix,
    load_segments,
    row_offsets,
    row_tokens,
    start_softmax,
    tile_base,
)
from pallas_kernels.triton_gpu.sequence_forward import attend_span


@triton.jit
def chunk_forward_kernel(
    query,
    depth_key,
    depth_value,
    bounds,
    query_segments,
    out,
    lse,
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
    """Program (tile, key/value head, batch): slot after slot, the tokens of the tile's chunks."""
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tile * BLOCK_T
    row_t, row_g = row_tokens(BLOCK_T, GROUP_PAD)
    rows = row_offsets(row_t, row_g, KV_HEADS, GROUP)
    inside = (first + row_t < Q_LEN) & (row_g < GROUP)
    base = tile_base(batch, Q_LEN, first, kv_head, KV_HEADS, GROUP)
    queries = load_matrix(query + base * HEAD_DIM, rows, inside, HEAD_DIM, WIDTH)
    segments = query_segments + batch.to(tl.int64) * Q_LEN
    segment = load_segments(segments, first + row_t, inside, HAS_SEGMENTS)
    total, maximum, denominator = start_softmax(
        out, lse, base, rows, inside, False, BLOCK_T * GROUP_PAD, HEAD_DIM, WIDTH
    )
    key_base = (batch.to(tl.int64) * Q_LEN * KV_HEADS + kv_head) * HEAD_DIM
    begin = first // CHUNK * CHUNK // BLOCK_N
    end = tl.cdiv(tl.minimum(first + BLOCK_T, Q_LEN), BLOCK_N)
    for i in tl.static_range(RANGES):
        start, stop = tl.load(bounds + 2 * i), tl.load(bounds + 2 * i + 1)
        for slot in range(start, stop):
            offset = key_base + tl.cast(slot, tl.int64) * (BATCH * Q_LEN * KV_HEADS * HEAD_DIM)
            total, maximum, denominator = attend_span(
                total,
                maximum,
                denominator,
                queries,
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
    finish_softmax(out, lse, base, rows, inside, total, maximum, denominator, HEAD_DIM, WIDTH)
