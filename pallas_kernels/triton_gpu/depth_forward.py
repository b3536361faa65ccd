"""Forward over the depth slots of a tile's own tokens."""

import triton
import triton.language as tl

from pallas_kernels.triton_gpu.blocks import (
    attend_block,
    finish_softmax,
    load_matrix,
    load_segments,
    row_offsets,
    row_tokens,
    start_softmax,
    tile_base,
)


@triton.jit
def slot_columns(
    slot,
    stop,
    first,
    LENGTH: tl.constexpr,
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """BLOCK_S slots times the tile's tokens: offset in rows, token within the tile, mask.

    The offset starts at a batch's token `first` of slot 0.
    """
    column = tl.arange(0, BLOCK_T * BLOCK_S)
    column_t = column % BLOCK_T
    slots = slot + column // BLOCK_T
    offset = slots.to(tl.int64) * (BATCH * LENGTH * KV_HEADS) + column_t * KV_HEADS
    return offset, column_t, (slots < stop) & (first + column_t < LENGTH)


@triton.jit
def depth_forward_kernel(
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
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (tile and key/value head, batch): neighbours read neighbouring memory.

    A dense product of the tile's rows with its (slot, token) columns, of which a row sees those of
    its own token. `bounds` holds RANGES pairs (first slot, last slot + 1); no other slot is read.
    """
    kv_head, tile = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    batch = tl.program_id(1)
    first = tile * BLOCK_T
    row_t, row_g = row_tokens(BLOCK_T, GROUP_PAD)
    rows = row_offsets(row_t, row_g, KV_HEADS, GROUP)
    inside = (first + row_t < Q_LEN) & (row_g < GROUP)
    base = tile_base(batch, Q_LEN, first, kv_head, KV_HEADS, GROUP)
    queries = load_matrix(query + base * HEAD_DIM, rows, inside, HEAD_DIM, WIDTH)
    sees = inside
    if HAS_SEGMENTS:
        segments = query_segments + batch.to(tl.int64) * Q_LEN
        sees = inside & (load_segments(segments, first + row_t, inside, True) != 0)
    total, maximum, denominator = start_softmax(
        out, lse, base, rows, inside, False, BLOCK_T * GROUP_PAD, HEAD_DIM, WIDTH
    )
    token = (batch.to(tl.int64) * Q_LEN + first) * KV_HEADS + kv_head
    key = depth_key + token * HEAD_DIM
    value = depth_value + token * HEAD_DIM
    for i in tl.static_range(RANGES):
        start, stop = tl.load(bounds + 2 * i), tl.load(bounds + 2 * i + 1)
        for slot in range(start, stop, BLOCK_S):
            offset, column_t, there = slot_columns(
                slot, stop, first, Q_LEN, BATCH, KV_HEADS, BLOCK_T, BLOCK_S
            )
            mask = (row_t[:, None] == column_t[None, :]) & there[None, :] & sees[:, None]
            keys = load_matrix(key, offset, there, HEAD_DIM, WIDTH)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            values = load_matrix(value, offset, there, HEAD_DIM, WIDTH)
            total, maximum, denominator = attend_block(
                total, maximum, denominator, scores, values, mask, SCALE, PRECISION
            )
    finish_softmax(out, lse, base, rows, inside, total, maximum, denominator, HEAD_DIM, WIDTH)
