"""Tile sizes of the TPU kernels, what they take of VMEM, and the heuristic that picks them."""

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

LANES = 128
VMEM_BYTES = 13 * 2**20
"""What the blocks of a kernel may take: TPU v4, the smallest chip, has 16 MiB a core."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes in tokens (multiples of 128) and heads; `choose_tiles` picks them from shapes."""

    q_block: int
    """Query tokens of a block of the tokens forward."""
    k_block: int
    """Key tokens of such a block."""
    q_grad_block: int
    """As `q_block`, of the tokens backward."""
    k_grad_block: int
    q_span: int
    """Query tokens whose dq the tokens backward keeps in VMEM: a multiple of q_grad_block. Longer
    sequences take several launches, which add to dk and dv."""
    depth_block: int
    """Tokens of a block of the depth forward."""
    depth_heads: int
    """Key heads of a depth block: a slot's tile is [depth_heads * H, tokens]. Divides K."""
    depth_grad_block: int
    """As `depth_block`, of the depth backward."""
    depth_grad_heads: int
    k_step: int = 128
    """Keys of a softmax update in the tokens forward. Divides k_block; several steps a block let
    the compiler run the products of one under the exponentials of another: on v5e at H = 64 in 932
    instruction bundles, and 1126 as one step (`python -m benchmarks.tpu_bundles --chips v5e:2x2
    --head-dims 64 --tiles k_step=512`)."""


@dataclasses.dataclass(frozen=True)
class CallShape:
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


def num_blocks(length: int, block: int) -> int:
    return -(-length // block)


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


def tokens_forward_vmem(shape: CallShape, q_block: int, k_block: int) -> int:
    """Bytes of VMEM: blocks twice (one is computed with, one in flight), scratch and scores."""
    rows, lanes = shape.group * shape.head_dim, q_block
    query, state = rows * lanes * shape.itemsize, rows * lanes * 4
    keys = 2 * shape.head_dim * k_block * shape.itemsize
    scores = k_block * lanes * (4 + 4 + shape.itemsize)
    lse = 2 * 2 * max(shape.group, 8) * lanes * 4
    return 2 * (query + state + state + keys) + state + scores + lse


def tokens_backward_vmem(shape: CallShape, q_block: int, k_block: int, q_span: int) -> int:
    """As `tokens_forward_vmem`; dq of a whole span stays in VMEM."""
    rows = shape.group * shape.head_dim
    queries = 2 * rows * q_block * shape.itemsize
    keys = 2 * shape.head_dim * k_block * shape.itemsize
    key_grads = 2 * shape.head_dim * k_block * 4
    scores = k_block * q_block * (4 * 4 + 2 * shape.itemsize)
    state = rows * q_span * 4
    lse = 2 * 2 * max(shape.group, 8) * q_block * 4
    return 2 * (queries + keys + 2 * key_grads) + key_grads + scores + 2 * state + lse


def depth_forward_vmem(shape: CallShape, block: int, heads: int) -> int:
    rows = heads * shape.group * shape.head_dim
    query, state = rows * block * shape.itemsize, rows * block * 4
    slots = 2 * heads * shape.head_dim * block * shape.itemsize
    vectors = 5 * max(heads * shape.group, 8) * block * 4
    return 2 * (query + slots + state) + state + 2 * vectors + 4 * shape.head_dim * block * 4


def depth_backward_vmem(shape: CallShape, block: int, heads: int) -> int:
    """With dq, which may continue another kernel's, and a float32 running gradient cache."""
    rows = heads * shape.group * shape.head_dim
    queries, state = 2 * rows * block * shape.itemsize, rows * block * 4
    slots = 2 * heads * shape.head_dim * block * (shape.itemsize + 4 + 4)
    vectors = 6 * max(heads * shape.group, 8) * block * 4
    return 2 * (queries + slots + state) + state + 2 * vectors + 6 * shape.head_dim * block * 4


def choose_tiles(
    shape: CallShape, chunk: int | None = None, *, vmem_bytes: int = VMEM_BYTES
) -> Tiles:
    """The largest tiles that fit, or those of `override`.

    Large token blocks amortise a grid step (about 0.35 us) and the loads of the MXU's weights;
    beyond 512 only masked work grows. With `chunk` only the diagonal is visible, and a block is a
    chunk. dq of as many queries as fit stays in VMEM.

    Raises:
      ValueError: heads too many or too wide for the smallest blocks, or an override that does not
        fit.
    """
    most = 512 if chunk is None else min(512, _whole_lanes(chunk))
    q_all = _whole_lanes(shape.q_len)
    q_most, k_most = min(most, q_all), min(most, _whole_lanes(shape.k_len))
    pairs = [
        (q, k) for q in (512, 256, 128) for k in (512, 256, 128) if q <= q_most and k <= k_most
    ]
    forward = _largest(pairs, lambda q, k: tokens_forward_vmem(shape, q, k) <= vmem_bytes)
    # Two query blocks at least to a span: each span reads the keys again.
    q_block, k_block = _largest(
        pairs, lambda q, k: tokens_backward_vmem(shape, q, k, min(2 * q, q_all)) <= vmem_bytes
    )
    fitting = [
        n
        for n in range(q_block, q_all + q_block, q_block)
        if tokens_backward_vmem(shape, q_block, k_block, n) <= vmem_bytes
    ]
    backward = q_block, k_block, max(fitting, default=q_block)
    heads = [n for n in range(shape.kv_heads, 0, -1) if shape.kv_heads % n == 0]
    depth = [(n, m) for n in (512, 256, 128) if n <= q_all for m in heads]
    depth_tiles = (
        _largest(depth, lambda *tile, fits=fits: fits(shape, *tile) <= vmem_bytes)
        for fits in (depth_forward_vmem, depth_backward_vmem)
    )
    tiles = Tiles(*forward, *backward, *itertools.chain(*depth_tiles))
    tiles = dataclasses.replace(tiles, **(_override.get() or {}))
    check_tiles(shape, tiles, vmem_bytes)
    return tiles


def _whole_lanes(length: int) -> int:
    return max(num_blocks(length, LANES), 1) * LANES


def _largest(candidates: list[tuple[int, int]], fits: Any) -> tuple[int, int]:
    """Of the candidates that fit, the one with the most elements; the first among equals."""
    fitting = [pair for pair in candidates if fits(*pair)] or candidates[-1:]
    return max(fitting, key=lambda pair: pair[0] * pair[1])


def check_tiles(shape: CallShape, tiles: Tiles, vmem_bytes: int = VMEM_BYTES) -> None:
    """Raises ValueError where the kernels could not run with these tiles."""
    need = vmem_need(shape, tiles)
    for kernel, size in need.items():
        if size > vmem_bytes:
            raise ValueError(
                f"mosaic_tpu {kernel}: expected blocks of at most {vmem_bytes} bytes of VMEM, got "
                f"{size} with {tiles} and {shape}"
            )
    if tiles.q_span % tiles.q_grad_block:
        raise ValueError(f"q_span: expected a multiple of q_grad_block, got {tiles}")
    for heads in (tiles.depth_heads, tiles.depth_grad_heads):
        if shape.kv_heads % heads:
            raise ValueError(f"depth heads: expected a divisor of {shape.kv_heads}, got {heads}")


def vmem_need(shape: CallShape, tiles: Tiles) -> dict[str, int]:
    """Bytes of VMEM by kernel."""
    return {
        "tokens_forward": tokens_forward_vmem(shape, tiles.q_block, tiles.k_block),
        "tokens_backward": tokens_backward_vmem(
            shape, tiles.q_grad_block, tiles.k_grad_block, min(tiles.q_span, _span_of(shape, tiles))
        ),
        "depth_forward": depth_forward_vmem(shape, tiles.depth_block, tiles.depth_heads),
        "depth_backward": depth_backward_vmem(
            shape, tiles.depth_grad_block, tiles.depth_grad_heads
        ),
    }


def _span_of(shape: CallShape, tiles: Tiles) -> int:
    return num_blocks(shape.q_len, tiles.q_grad_block) * tiles.q_grad_block
