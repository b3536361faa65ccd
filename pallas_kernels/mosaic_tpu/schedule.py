"""The block schedule of the TPU kernels: tile sizes, blocks visited, bytes moved, products.

Pure Python and NumPy, importable without a TPU: the kernels take their grids, index maps and cost
estimates from here, and so does a roofline.

Two pairs of kernels (forward and backward) share the work:

- *tokens*: flash attention of queries to keys of other tokens. A grid step is one query block
  (all G heads of a key head) against one key block. The sequence has one source of keys; with
  chunk-visible slots every visible slot is one.
- *depth*: queries to the slots of their own token. A grid step is one slot of one token block.

Whether a pair of blocks is needed is decided by `needed` and `unmasked`, on ints or on arrays of
NumPy or JAX: a block that nobody sees is neither fetched nor computed.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

LANES = 128
VMEM_BYTES = 13 * 2**20
"""What the blocks of a kernel may take: TPU v4, the smallest chip, has 16 MiB a core."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes in tokens (multiples of 128) and heads; `choose_tiles` picks them from shapes."""

    q_block: int
    """Query tokens of a block of the tokens kernels."""
    k_block: int
    """Key tokens of such a block."""
    q_span: int
    """Query tokens whose dq the tokens backward keeps in VMEM: a multiple of q_block. Longer
    sequences take several passes, which add to dk and dv."""
    depth_block: int
    """Tokens of a block of the depth forward."""
    depth_heads: int
    """Key heads of a depth block: a slot's tile is [depth_heads * H, tokens]. Divides K."""
    depth_grad_block: int
    """As `depth_block`, of the depth backward."""
    depth_grad_heads: int
    k_step: int = 128
    """Keys of a softmax update in the tokens forward. Divides k_block; several steps a block let
    the compiler run the products of one under the exponentials of another: on v5e, a pair of 512
    x 512 tokens at H = 64 takes 934 instruction bundles a head, and 1126 as one step."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the schedule must know of a call. Sizes per device."""

    batch: int
    q_len: int
    k_len: int
    """Key tokens of a source; for the depth kernels it plays no role."""
    kv_heads: int
    group: int
    """Query heads per key head."""
    head_dim: int
    itemsize: int
    """Bytes of an element of query, key and value: 2 or 4."""


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


def block_bounds(count: int, block: int, length: Any, xp: Any = np) -> tuple[Any, Any]:
    """(start, stop) of blocks 0 ... count - 1, the stop cut to `length`: int or [B, 1]."""
    start = xp.arange(count, dtype=np.int32) * block
    return start, xp.minimum(start + block, length)


def block_pairs(
    shape: Shape, tiles: Tiles, *, causal: bool, chunk: int | None = None
) -> np.ndarray:
    """[query blocks, key blocks] bool: pairs that the tokens kernels compute for each head.

    Without query offsets, lengths and segments, which can only leave more out.
    """
    q_count, k_count = (
        num_blocks(shape.q_len, tiles.q_block),
        num_blocks(shape.k_len, tiles.k_block),
    )
    q_start, q_stop = block_bounds(q_count, tiles.q_block, shape.q_len)
    k_start, k_stop = block_bounds(k_count, tiles.k_block, shape.k_len)
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


def num_blocks(length: int, block: int) -> int:
    return -(-length // block)


def query_spans(q_len: int, tiles: Tiles) -> list[tuple[int, int]]:
    """[start, stop) of the query blocks of each pass of the tokens backward."""
    count, per_span = num_blocks(q_len, tiles.q_block), tiles.q_span // tiles.q_block
    return [(start, min(start + per_span, count)) for start in range(0, count, per_span)]


# --- tile sizes -----------------------------------------------------------------------------------

_override: contextvars.ContextVar[dict[str, int] | None] = contextvars.ContextVar(
    "tiles", default=None
)


@contextlib.contextmanager
def override(**sizes: int) -> Iterator[None]:
    """Calls traced inside take these fields of `Tiles`, the others from the heuristic."""
    token = _override.set(sizes)
    try:
        yield
    finally:
        _override.reset(token)


def tokens_forward_vmem(shape: Shape, q_block: int, k_block: int) -> int:
    """Bytes of VMEM: blocks twice (one is computed with, one in flight), scratch and scores."""
    rows, lanes = shape.group * shape.head_dim, q_block
    query, state = rows * lanes * shape.itemsize, rows * lanes * 4
    keys = 2 * shape.head_dim * k_block * shape.itemsize
    scores = k_block * lanes * (4 + 4 + shape.itemsize)
    lse = 2 * 2 * max(shape.group, 8) * lanes * 4
    return 2 * (query + state + state + keys) + state + scores + lse


def tokens_backward_vmem(shape: Shape, q_block: int, k_block: int, q_span: int) -> int:
    """As `tokens_forward_vmem`; dq of a whole span stays in VMEM."""
    rows = shape.group * shape.head_dim
    queries = 2 * rows * q_block * shape.itemsize
    keys = 2 * shape.head_dim * k_block * shape.itemsize
    key_grads = 2 * shape.head_dim * k_block * 4
    scores = k_block * q_block * (4 * 4 + 2 * shape.itemsize)
    state = rows * q_span * 4
    lse = 2 * 2 * max(shape.group, 8) * q_block * 4
    return 2 * (queries + keys + 2 * key_grads) + key_grads + scores + 2 * state + lse


def depth_forward_vmem(shape: Shape, block: int, heads: int) -> int:
    rows = heads * shape.group * shape.head_dim
    query, state = rows * block * shape.itemsize, rows * block * 4
    slots = 2 * heads * shape.head_dim * block * shape.itemsize
    vectors = 5 * max(heads * shape.group, 8) * block * 4
    return 2 * (query + slots + state) + state + 2 * vectors + 4 * shape.head_dim * block * 4


def depth_backward_vmem(shape: Shape, block: int, heads: int) -> int:
    """With dq, which may continue another kernel's, and a float32 running gradient cache."""
    rows = heads * shape.group * shape.head_dim
    queries, state = 2 * rows * block * shape.itemsize, rows * block * 4
    slots = 2 * heads * shape.head_dim * block * (shape.itemsize + 4 + 4)
    vectors = 6 * max(heads * shape.group, 8) * block * 4
    return 2 * (queries + slots + state) + state + 2 * vectors + 6 * shape.head_dim * block * 4


def choose_tiles(shape: Shape, vmem_bytes: int = VMEM_BYTES) -> Tiles:
    """The largest tiles that fit, or those of `override`.

    Large token blocks amortise a grid step (about 0.35 us) and the loads of the MXU's weights;
    beyond 512 only masked work grows. dq of as many queries as fit stays in VMEM.

    Raises:
      ValueError: heads too many or too wide for the smallest blocks, or an override that does not
        fit.
    """
    q_most, k_most = (min(512, _whole_lanes(n)) for n in (shape.q_len, shape.k_len))
    half = vmem_bytes // 2  # the rest of the backward's share goes to its span
    q_block, k_block = _largest(
        [(q, min(k, k_most)) for q in (512, 256, 128) for k in (512, 256, 128) if q <= q_most],
        lambda q, k: (tokens_forward_vmem(shape, q, k) <= vmem_bytes
                      and tokens_backward_vmem(shape, q, k, q) <= max(half, vmem_bytes - 2**22)),
    )  # fmt: skip
    spans = range(q_block, _whole_lanes(shape.q_len) + q_block, q_block)
    fitting = [n for n in spans if tokens_backward_vmem(shape, q_block, k_block, n) <= vmem_bytes]
    heads = [n for n in range(shape.kv_heads, 0, -1) if shape.kv_heads % n == 0]
    depth = [(block, n) for block in (512, 256, 128) if block <= q_most for n in heads]
    forward, backward = (
        _largest(depth, lambda *tile, fits=fits: fits(shape, *tile) <= vmem_bytes)
        for fits in (depth_forward_vmem, depth_backward_vmem)
    )
    tiles = Tiles(q_block, k_block, max(fitting, default=q_block), *forward, *backward)
    tiles = dataclasses.replace(tiles, **(_override.get() or {}))
    check_tiles(shape, tiles, vmem_bytes)
    return tiles


def _whole_lanes(length: int) -> int:
    return max(num_blocks(length, LANES), 1) * LANES


def _largest(candidates: list[tuple[int, int]], fits: Any) -> tuple[int, int]:
    """Of the candidates that fit, the one with the most elements; the first among equals."""
    fitting = [pair for pair in candidates if fits(*pair)] or candidates[-1:]
    return max(fitting, key=lambda pair: pair[0] * pair[1])


def check_tiles(shape: Shape, tiles: Tiles, vmem_bytes: int = VMEM_BYTES) -> None:
    """Raises ValueError where the kernels could not run with these tiles."""
    need = vmem_need(shape, tiles)
    for kernel, size in need.items():
        if size > vmem_bytes:
            raise ValueError(
                f"mosaic_tpu {kernel}: expected blocks of at most {vmem_bytes} bytes of VMEM, got "
                f"{size} with {tiles} and {shape}"
            )
    if tiles.q_span % tiles.q_block:
        raise ValueError(f"q_span: expected a multiple of q_block, got {tiles}")
    for heads in (tiles.depth_heads, tiles.depth_grad_heads):
        if shape.kv_heads % heads:
            raise ValueError(f"depth heads: expected a divisor of {shape.kv_heads}, got {heads}")


def vmem_need(shape: Shape, tiles: Tiles) -> dict[str, int]:
    """Bytes of VMEM by kernel."""
    return {
        "tokens_forward": tokens_forward_vmem(shape, tiles.q_block, tiles.k_block),
        "tokens_backward": tokens_backward_vmem(
            shape, tiles.q_block, tiles.k_block, min(tiles.q_span, _span_of(shape, tiles))
        ),
        "depth_forward": depth_forward_vmem(shape, tiles.depth_block, tiles.depth_heads),
        "depth_backward": depth_backward_vmem(
            shape, tiles.depth_grad_block, tiles.depth_grad_heads
        ),
    }  # fmt: skip


def _span_of(shape: Shape, tiles: Tiles) -> int:
    return num_blocks(shape.q_len, tiles.q_block) * tiles.q_block


# --- work -----------------------------------------------------------------------------------------


def tokens_forward_work(
    shape: Shape, tiles: Tiles, *, causal: bool, chunk: int | None = None, sources: int = 1,
    continues: bool = False,
) -> Work:  # fmt: skip
    """`continues`: starts from the (o, lse) of another kernel."""
    pairs = block_pairs(shape, tiles, causal=causal, chunk=chunk)
    heads, group, width = shape.batch * shape.kv_heads, shape.group, shape.head_dim
    visited = int(pairs.sum()) * heads * sources
    entries = visited * group * tiles.q_block * tiles.k_block
    queries = heads * group * shape.q_len
    query_bytes = queries * width * shape.itemsize
    return Work(
        steps=pairs.size * heads * sources, pairs=visited,
        bytes_read=query_bytes + heads * fetches(pairs, sources, same_source=False)
        * 2 * width * tiles.k_block * shape.itemsize
        + continues * queries * (width + 1) * 4,
        bytes_written=query_bytes + queries * 4,
        mxu_flops=2 * 2 * entries * width,
        # scale, max, subtract, sum, cast; the output is rescaled once a pair
        vpu_ops=5 * entries + 2 * visited * group * tiles.q_block * width,
        exps=entries,
    )  # fmt: skip


def tokens_backward_work(
    shape: Shape, tiles: Tiles, *, causal: bool, chunk: int | None = None, sources: int = 1,
    grads_itemsize: int = 4, running: bool = False, span: tuple[int, int] | None = None,
) -> Work:  # fmt: skip
    """Of the launch for a `span` of query blocks, or of all launches together.

    `running`: dk and dv are added to a gradient that is there, of `grads_itemsize` bytes.
    """
    spans = query_spans(shape.q_len, tiles)
    if span is None:
        parts = [
            tokens_backward_work(
                shape, tiles, causal=causal, chunk=chunk, sources=sources, span=part,
                grads_itemsize=grads_itemsize, running=running,
            )
            for part in spans
        ]  # fmt: skip
        return Work(*map(sum, zip(*map(dataclasses.astuple, parts), strict=True)))
    pairs = block_pairs(shape, tiles, causal=causal, chunk=chunk)[slice(*span)]
    seen = int(pairs.any(axis=0).sum())
    heads, group, width = shape.batch * shape.kv_heads, shape.group, shape.head_dim
    visited = int(pairs.sum()) * heads * sources
    entries = visited * group * tiles.q_block * tiles.k_block
    keys = 2 * heads * sources * min(seen * tiles.k_block, shape.k_len) * width
    adds = running or len(spans) > 1
    own = shape.itemsize if len(spans) == 1 else 4
    grads = keys * (grads_itemsize if running else own)
    queries = heads * group * (span[1] - span[0]) * tiles.q_block
    return Work(
        steps=pairs.shape[0] * seen * heads * sources, pairs=visited,
        bytes_read=heads * fetches(pairs.T, sources, same_source=True) * group * tiles.q_block
        * (2 * width * shape.itemsize + 2 * 4)
        + keys * shape.itemsize + grads * adds,
        bytes_written=queries * width * 4 + grads,
        mxu_flops=5 * 2 * entries * width,
        vpu_ops=6 * entries,  # scale, subtract; subtract, multiply; two casts
        exps=entries,
    )  # fmt: skip


def depth_forward_work(shape: Shape, tiles: Tiles, slots: int, *, last: bool = False) -> Work:
    """`slots`: visible ones. `last`: no sequence follows, so the output has the query's dtype."""
    tokens = shape.batch * shape.q_len
    rows = tokens * shape.kv_heads * shape.group
    blocks = _depth_blocks(shape, tiles.depth_block, tiles.depth_heads)
    width, entries = shape.head_dim, rows * slots
    return Work(
        steps=blocks * slots, pairs=blocks * slots,
        bytes_read=rows * width * shape.itemsize + slot_bytes(shape, slots),
        bytes_written=rows * width * (shape.itemsize if last else 4) + rows * 4,
        mxu_flops=0,
        # multiply, add; rescale, multiply, add
        vpu_ops=5 * entries * width + 6 * entries, exps=2 * entries,
    )  # fmt: skip


def depth_backward_work(
    shape: Shape, tiles: Tiles, slots: int, *, grads_itemsize: int, running: bool,
    continues: bool = False, want_query: bool = True, want_depth: bool = True,
) -> Work:  # fmt: skip
    """`running`: adds into a gradient cache. `continues`: adds to the sequence part's dq.

    A deferred addition for R layers is one with R times the query heads per key head.
    """
    rows = shape.batch * shape.q_len * shape.kv_heads * shape.group
    blocks = _depth_blocks(shape, tiles.depth_grad_block, tiles.depth_grad_heads)
    width, entries = shape.head_dim, rows * slots
    grads = slot_bytes(shape, slots) // shape.itemsize * grads_itemsize if want_depth else 0
    return Work(
        steps=blocks * slots, pairs=blocks * slots,
        bytes_read=rows * (2 * width * shape.itemsize + 2 * 4) + slot_bytes(shape, slots)
        + grads * running + rows * width * 4 * continues,
        bytes_written=rows * width * shape.itemsize * want_query + grads,
        mxu_flops=0,
        vpu_ops=(4 + 2 * want_query + 4 * want_depth) * entries * width + 4 * entries,
        exps=entries,
    )  # fmt: skip


def slot_bytes(shape: Shape, slots: int) -> int:
    """Bytes of K and V of that many slots: read once per kernel, whatever G is."""
    tokens = shape.batch * shape.q_len * slots
    return 2 * tokens * shape.kv_heads * shape.head_dim * shape.itemsize


def _depth_blocks(shape: Shape, block: int, heads: int) -> int:
    return shape.batch * num_blocks(shape.q_len, block) * (shape.kv_heads // heads)
