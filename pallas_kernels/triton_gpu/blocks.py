"""What the kernels share: a tile of query rows, masks, one step of an online softmax.

A tile of query rows is BLOCK_T tokens times the G heads of one key/value head (G padded to a power
of two), so that whatever a token's group reads is read once. Scores are kept in units of log2(e),
for `exp2`. Offsets are 64-bit up to the tile and 32-bit within it.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_tokens(BLOCK_T: tl.constexpr, GROUP_PAD: tl.constexpr):
    """Token within the tile and head within the group, of each row."""
    row = tl.arange(0, BLOCK_T * GROUP_PAD)
    return row // GROUP_PAD, row % GROUP_PAD


@triton.jit
def row_offsets(row_t, row_g, KV_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Of the rows in [T, N], from the tile's first token and the group's first head."""
    return row_t * (KV_HEADS * GROUP) + row_g


@triton.jit
def tile_base(batch, length, first, kv_head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Offset of the tile's first row in [B, T, N]."""
    token = batch.to(tl.int64) * length + first
    return token * (KV_HEADS * GROUP) + kv_head * GROUP


@triton.jit
def load_matrix(pointer, offset, mask, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] of rows of HEAD_DIM elements at `offset` (in rows); 0 where masked.

    mask None: all rows exist.
    """
    dim = tl.arange(0, WIDTH)
    where = pointer + offset[:, None] * HEAD_DIM + dim[None, :]
    there = dim[None, :] < HEAD_DIM
    if mask is not None:
        there = there & mask[:, None]
    if mask is None and HEAD_DIM == WIDTH:
        x = tl.load(where)
    else:
        x = tl.load(where, mask=there, other=0.0)
    return x


@triton.jit
def store_matrix(pointer, offset, x, mask, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The counterpart of `load_matrix`, in the pointer's dtype."""
    dim = tl.arange(0, WIDTH)
    where = pointer + offset[:, None] * HEAD_DIM + dim[None, :]
    x = x.to(pointer.dtype.element_ty)
    tl.store(where, x, mask=mask[:, None] & (dim[None, :] < HEAD_DIM))


@triton.jit
def load_row_lse(lse, offset, mask):
    """In units of log2(e); +inf, which makes every weight 0, where there is nothing to see."""
    x = tl.load(lse + offset, mask=mask, other=float("inf"))
    return tl.where(x == float("-inf"), float("inf"), x * LOG2_E)


@triton.jit
def token_mask(
    row_token,
    key_token,
    row_segment,
    key_segment,
    key_len,
    CAUSAL: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
):
    """[rows, keys]: which keys a row's token may look at. CHUNK 0: there are no chunks."""
    mask = (key_token < key_len)[None, :]
    if CAUSAL:
        mask = mask & (key_token[None, :] <= row_token[:, None])
    if CHUNK > 0:
        mask = mask & ((key_token // CHUNK)[None, :] == (row_token // CHUNK)[:, None])
    if HAS_SEGMENTS:
        mask = mask & (key_segment[None, :] == row_segment[:, None]) & (row_segment != 0)[:, None]
    return mask


@triton.jit
def load_segments(segments, offset, mask, HAS_SEGMENTS: tl.constexpr):
    """Of tokens or keys, 0 where masked; without segments an unused value."""
    if HAS_SEGMENTS:
        return tl.load(segments + offset, mask=mask, other=0)
    return offset


@triton.jit
def walk(begin, end, plain_begin, plain_end, met, tile, HAS_SEGMENTS: tl.constexpr):
    """The blocks begin ... end - 1 that a tile meets, of which plain_begin ... plain_end - 1 need
    no mask; with segments narrowed to its row of `met` [tiles, 4], see `segments.segment_bounds`.
    """
    if HAS_SEGMENTS:
        met += tile * 4
        begin = tl.maximum(begin, tl.minimum(tl.load(met), end))
        end = tl.maximum(begin, tl.minimum(tl.load(met + 1), end))
        plain_begin = tl.maximum(plain_begin, tl.load(met + 2))
        plain_end = tl.minimum(plain_end, tl.load(met + 3))
    begin = tl.minimum(begin, end)
    plain_begin = tl.minimum(tl.maximum(plain_begin, begin), end)
    plain_end = tl.minimum(tl.maximum(plain_end, plain_begin), end)
    return begin, end, plain_begin, plain_end


@triton.jit
def beyond_gap(i, gap_begin, gap_end):
    """The block at place i of a range without its gap: i before the gap, later ones shifted."""
    return i + tl.where(i < gap_begin, 0, gap_end - gap_begin)


@triton.jit
def attend_block(
    total, maximum, denominator, scores, value, mask, SCALE: tl.constexpr, PRECISION: tl.constexpr
):
    """One step of the online softmax; `scores` are products, not yet scaled, SCALE > 0."""
    if mask is not None:
        scores = tl.where(mask, scores, float("-inf"))
    new = tl.maximum(maximum, tl.max(scores, 1) * (SCALE * LOG2_E))
    shift = new
    if mask is not None:  # a row that has seen nothing yet: -inf - (-inf) is NaN
        shift = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores * (SCALE * LOG2_E) - shift[:, None])
    decay = tl.exp2(maximum - shift)
    denominator = denominator * decay + tl.sum(weights, 1)
    total = total * decay[:, None]
    total = tl.dot(weights.to(value.dtype), value, total, input_precision=PRECISION)
    return total, new, denominator


@triton.jit
def start_softmax(
    partial_out,
    partial_lse,
    base,
    rows,
    mask,
    HAS_PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The state of an online softmax: empty, or of keys that another kernel has attended to."""
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    if HAS_PARTIAL:
        total = load_matrix(partial_out + base * HEAD_DIM, rows, mask, HEAD_DIM, WIDTH)
        maximum = tl.load(partial_lse + base + rows, mask=mask, other=float("-inf")) * LOG2_E
        denominator = tl.where(maximum == float("-inf"), 0.0, 1.0)
    return total, maximum, denominator


@triton.jit
def finish_softmax(
    out,
    lse,
    base,
    rows,
    mask,
    total,
    maximum,
    denominator,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes o and lse; o = 0 and lse = -inf where nothing was seen."""
    seen = denominator > 0
    safe = tl.where(seen, denominator, 1.0)
    store_matrix(out + base * HEAD_DIM, rows, total / safe[:, None], mask, HEAD_DIM, WIDTH)
    log = tl.where(seen, (maximum + tl.log2(safe)) * LN_2, float("-inf"))
    tl.store(lse + base + rows, log, mask=mask)
