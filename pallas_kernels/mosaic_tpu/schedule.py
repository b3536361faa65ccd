"""The block schedule of the TPU kernels: tile sizes, blocks visited, bytes moved, products.

Pure Python and NumPy, importable without a TPU: the kernels take their grids, index maps and cost
estimates from here, and so does a roofline.

Two pairs of kernels (forward and backward) share the work:

- *tokens*: flash attention of queries to keys of other tokens. A grid step is one query block
  (all G heads of a key head) against one key block. The sequence has one source of keys; with
  chunk-visible slots every visible slot is one.
- *depth*: queries to the slots of their own token. A grid step is one slot of one token block.

Whether a pair of blocks is needed is decided by `needed` and `unmasked`, on ints or on arrays of
NumPy or JAX: a pair that is masked wholly is neither fetched nor computed.
"""

import dataclasses
from typing import Any

import numpy as np

from pallas_kernels.mosaic_tpu.tiles import (
    LANES,
    VMEM_BYTES,
    CallShape,
    Tiles,
    check_tiles,
    choose_tiles,
    num_blocks,
    override,
    vmem_need,
)

__all__ = [
    "LANES",
    "VMEM_BYTES",
    "CallShape",
    "Tiles",
    "Work",
    "block_bounds",
    "block_pairs",
    "check_tiles",
    "choose_tiles",
    "depth_backward_work",
    "depth_forward_work",
    "fetches",
    "needed",
    "num_blocks",
    "override",
    "query_spans",
    "slot_bytes",
    "tokens_backward_work",
    "tokens_forward_work",
    "unmasked",
    "vmem_need",
]


@dataclasses.dataclass(frozen=True)
class Work:
    """What one launch moves and computes."""

    steps: int
    """Grid steps, those that find nothing to do included."""
    pairs: int
    """Grid steps that compute: pairs of a query and a key block, or slots of a token block."""
    bytes_read: int
    """HBM to VMEM, counting every fetch of a block."""
    bytes_written: int
    mxu_flops: int
    """2 per multiply-add of the matrix products, whole blocks: masked entries count."""
    vpu_ops: int
    """Vector additions, multiplications, comparisons and selections, per element."""
    exps: int

    def divided(self, parts: int) -> "Work":
        """The average of that many launches."""
        return Work(*(n // parts for n in dataclasses.astuple(self)))


# --- which blocks ---------------------------------------------------------------------------------


def needed(q_start, q_stop, k_start, k_stop, *, causal: bool, lowest: Any = None) -> Any:
    """Whether a query at a position in [q_start, q_stop) sees a key in [k_start, k_stop).

    lowest: position of the first key that the first query sees; None: it sees the first of all.
    """
    result = (q_start < q_stop) & (k_start < k_stop)
    if causal:
        result &= k_start < q_stop
    if lowest is not None:
        result &= k_stop > lowest
    return result


def unmasked(q_start, q_stop, k_start, k_stop, *, causal: bool, lowest: Any = None) -> Any:
    """Whether every query of the block sees every key of the block, given `needed`.

    lowest: position of the first key that the last query sees.
    """
    result = True
    if causal:
        result &= k_stop - 1 <= q_start
    if lowest is not None:
        result &= k_start >= lowest
    return result


def block_bounds(count: int, block: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, stop) of blocks 0 ... count - 1, the stop cut to `length`."""
    start = np.arange(count, dtype=np.int32) * block
    return start, np.minimum(start + block, length)


def block_pairs(
    shape: CallShape, q_block: int, k_block: int, *, causal: bool, chunk: int | None = None
) -> np.ndarray:
    """[query blocks, key blocks] bool: pairs that a tokens kernel computes for each head.

    Without query offsets, lengths and segments, which can only leave more out.
    """
    q_start, q_stop = block_bounds(num_blocks(shape.q_len, q_block), q_block, shape.q_len)
    k_start, k_stop = block_bounds(num_blocks(shape.k_len, k_block), k_block, shape.k_len)
    q_start, q_stop = q_start[:, None], q_stop[:, None]
    lowest = None if chunk is None else q_start // chunk * chunk
    return needed(q_start, q_stop, k_start, k_stop, causal=causal, lowest=lowest)


def fetches(pairs: np.ndarray, sources: int = 1, *, same_source: bool) -> int:
    """Blocks fetched while a pipeline passes over `pairs` row by row: those needed in each row.

    A row that starts with the block that the one before ended with finds it there already.
    same_source: sources share the blocks (queries), else each has its own (keys).
    """
    rows = pairs[pairs.any(axis=1)]
    first, last = rows.argmax(axis=1), rows.shape[1] - 1 - rows[:, ::-1].argmax(axis=1)
    kept = int((first[1:] == last[:-1]).sum())
    if sources == 1:
        return int(rows.sum()) - kept
    if not same_source:
        return sources * int(rows.sum())
    return sources * (int(rows.sum()) - kept) - (sources - 1) * int(first[0] == last[-1])


def query_spans(q_len: int, tiles: Tiles) -> list[tuple[int, int]]:
    """[start, stop) of the query blocks of each launch of the tokens backward."""
    count, most = num_blocks(q_len, tiles.q_grad_block), tiles.q_span // tiles.q_grad_block
    size = num_blocks(count, num_blocks(count, most))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


# --- work -----------------------------------------------------------------------------------------


def tokens_forward_work(
    shape: CallShape,
    tiles: Tiles,
    *,
    causal: bool,
    chunk: int | None = None,
    sources: int = 1,
    continues: bool = False,
) -> Work:
    """`continues`: starts from the (o, lse) of another kernel."""
    pairs = block_pairs(shape, tiles.q_block, tiles.k_block, causal=causal, chunk=chunk)
    heads, group, width = shape.batch * shape.kv_heads, shape.group, shape.head_dim
    visited = int(pairs.sum()) * heads * sources
    entries = visited * group * tiles.q_block * tiles.k_block
    queries = heads * group * shape.q_len
    query_bytes = queries * width * shape.itemsize
    key_blocks = heads * fetches(pairs, sources, same_source=False)
    key_bytes = key_blocks * 2 * width * tiles.k_block * shape.itemsize
    return Work(
        steps=pairs.size * heads * sources,
        pairs=visited,
        bytes_read=query_bytes + key_bytes + continues * queries * (width + 1) * 4,
        bytes_written=query_bytes + queries * 4,
        mxu_flops=2 * 2 * entries * width,
        # scale, max, subtract, sum, cast; the output is rescaled once a pair
        vpu_ops=5 * entries + 2 * visited * group * tiles.q_block * width,
        exps=entries,
    )


def tokens_backward_work(
    shape: CallShape,
    tiles: Tiles,
    *,
    causal: bool,
    chunk: int | None = None,
    sources: int = 1,
    grads_itemsize: int = 4,
    running: bool = False,
    span: tuple[int, int] | None = None,
) -> Work:
    """Of the launch for a `span` of query blocks, or of all launches together.

    `running`: dk and dv are added to running gradients of `grads_itemsize` bytes an element.
    """
    spans = query_spans(shape.q_len, tiles)
    if span is None:
        parts = [
            tokens_backward_work(
                shape,
                tiles,
                causal=causal,
                chunk=chunk,
                sources=sources,
                span=part,
                grads_itemsize=grads_itemsize,
                running=running,
            )
            for part in spans
        ]
        return Work(*map(sum, zip(*map(dataclasses.astuple, parts), strict=True)))
    q_block, k_block = tiles.q_grad_block, tiles.k_grad_block
    pairs = block_pairs(shape, q_block, k_block, causal=causal, chunk=chunk)[slice(*span)]
    seen = int(pairs.any(axis=0).sum())
    heads, group, width = shape.batch * shape.kv_heads, shape.group, shape.head_dim
    visited = int(pairs.sum()) * heads * sources
    entries = visited * group * q_block * k_block
    keys = 2 * heads * sources * min(seen * k_block, shape.k_len) * width
    adds = running or len(spans) > 1
    own = shape.itemsize if len(spans) == 1 else 4
    grads = keys * (grads_itemsize if running else own)
    queries = heads * group * (span[1] - span[0]) * q_block
    query_blocks = heads * fetches(pairs.T, sources, same_source=True)
    query_bytes = query_blocks * group * q_block * (2 * width * shape.itemsize + 2 * 4)
    return Work(
        steps=pairs.shape[0] * seen * heads * sources,
        pairs=visited,
        bytes_read=query_bytes + keys * shape.itemsize + grads * adds,
        bytes_written=queries * width * 4 + grads,
        mxu_flops=5 * 2 * entries * width,
        vpu_ops=6 * entries,  # scale, subtract; subtract, multiply; two casts
        exps=entries,
    )


def depth_forward_work(shape: CallShape, tiles: Tiles, slots: int, *, last: bool = False) -> Work:
    """`slots`: visible ones. `last`: no sequence follows, so the output has the query's dtype."""
    tokens = shape.batch * shape.q_len
    rows = tokens * shape.kv_heads * shape.group
    blocks = _depth_blocks(shape, tiles.depth_block, tiles.depth_heads)
    width, entries = shape.head_dim, rows * slots
    return Work(
        steps=blocks * slots,
        pairs=blocks * slots,
        bytes_read=rows * width * shape.itemsize + slot_bytes(shape, slots),
        bytes_written=rows * width * (shape.itemsize if last else 4) + rows * 4,
        mxu_flops=0,
        # multiply, add; rescale, multiply, add
        vpu_ops=5 * entries * width + 6 * entries,
        exps=2 * entries,
    )


def depth_backward_work(
    shape: CallShape,
    tiles: Tiles,
    slots: int,
    *,
    grads_itemsize: int,
    running: bool,
    continues: bool = False,
    want_depth: bool = True,
) -> Work:
    """`running`: adds into a gradient cache. `continues`: adds to the sequence part's dq."""
    rows = shape.batch * shape.q_len * shape.kv_heads * shape.group
    blocks = _depth_blocks(shape, tiles.depth_grad_block, tiles.depth_grad_heads)
    width, entries = shape.head_dim, rows * slots
    grads = slot_bytes(shape, slots) // shape.itemsize * grads_itemsize if want_depth else 0
    return Work(
        steps=blocks * slots,
        pairs=blocks * slots,
        bytes_read=rows * (2 * width * shape.itemsize + 2 * 4)
        + slot_bytes(shape, slots)
        + grads * running
        + rows * width * 4 * continues,
        bytes_written=rows * width * shape.itemsize + grads,
        mxu_flops=0,
        vpu_ops=(6 + 4 * want_depth) * entries * width + 4 * entries,
        exps=entries,
    )


def slot_bytes(shape: CallShape, slots: int) -> int:
    """Bytes of K and V of that many slots: read once per kernel, whatever G is."""
    tokens = shape.batch * shape.q_len * slots
    return 2 * tokens * shape.kv_heads * shape.head_dim * shape.itemsize


def _depth_blocks(shape: CallShape, block: int, heads: int) -> int:
    return shape.batch * num_blocks(shape.q_len, block) * (shape.kv_heads // heads)
