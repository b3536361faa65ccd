"""What the Mosaic GPU kernels share: launching, shared memory, and layouts of rows and heads.

Mosaic GPU's Python interface exists since JAX 0.11 and changes often: it is imported where it is
used, so that this package can be imported with any JAX.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms

SMEM_LIMIT = 227 * 1024  # bytes a block may have on compute capability 9.0

_detect_races: contextvars.ContextVar[bool] = contextvars.ContextVar("races", default=False)


@functools.cache
def mosaic() -> Any:
    """The module `jax.experimental.pallas.mosaic_gpu`."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


@functools.cache
def pallas() -> Any:
    """The module `jax.experimental.pallas`."""
    from jax.experimental import pallas

    return pallas


@contextlib.contextmanager
def race_detection() -> Iterator[None]:
    """Interpreted kernels that are traced inside look for races, which is slow."""
    token = _detect_races.set(True)
    try:
        yield
    finally:
        _detect_races.reset(token)


def smem(shape: tuple[int, ...], dtype: Any, *, foldable: bool = False) -> Any:
    """A shared-memory buffer; matrices in the swizzled tiles that TMA and wgmma agree on.

    foldable: the last three dimensions can be reshaped to a matrix.
    """
    plgpu = mosaic()
    if len(shape) == 1:
        return plgpu.SMEM(shape, dtype)
    lanes = min(128, shape[-1] * jnp.dtype(dtype).itemsize)
    tile = (1,) * foldable + (8, lanes // jnp.dtype(dtype).itemsize)
    transforms = (plgpu.TilingTransform(tile), plgpu.SwizzleTransform(lanes))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def barrier(arrivals: int, count: int) -> Any:
    return mosaic().Barrier(num_arrivals=arrivals, num_barriers=count)


def check_smem(needed: int, name: str) -> None:
    """Raises before a launch that could not run."""
    if needed > SMEM_LIMIT:
        raise ValueError(
            f"{name}: the tile needs {needed} bytes of shared memory, expected at most {SMEM_LIMIT}"
        )


def launch(
    body: Callable[..., None],
    *,
    name: str,
    grid: Mapping[str, int],
    out_type: Any,
    scratch: Mapping[str, Any],
    threads: int | None = None,
) -> Callable[..., Any]:
    """`plgpu.kernel`, compiled or interpreted.

    threads: number of warpgroups; None: one, which has no axis name.

    An optimization barrier holds the results. Without it, where a result goes straight into a
    stacked array (a scan that keeps lse), XLA fuses a second copy of the kernel with the update and
    runs both.
    """
    plgpu = mosaic()
    interpret = None
    if platforms.interpreted():
        interpret = plgpu.InterpretGPUParams(detect_races=_detect_races.get())
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=dict(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads,
        thread_name=None if threads is None else "warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name=name,
    )
    return lambda *operands: lax.optimization_barrier(kernel(*operands))


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def split_heads(group: int, limit: int) -> list[tuple[int, int]]:
    """The G heads of a key/value head in parts [start, stop) of at most `limit`."""
    return [(start, min(start + limit, group)) for start in range(0, group, limit)]


def take_heads(x: jax.Array, *, kv_heads: int, part: tuple[int, int]) -> jax.Array:
    """[B, T, K·G, ...] -> [B, T, K·(stop - start), ...]: a part of every group."""
    batch, length, heads = x.shape[:3]
    if part == (0, heads // kv_heads):
        return x
    grouped = x.reshape(batch, length, kv_heads, heads // kv_heads, *x.shape[3:])
    return grouped[:, :, :, part[0] : part[1]].reshape(batch, length, -1, *x.shape[3:])


def join_heads(parts: list[jax.Array], kv_heads: int) -> jax.Array:
    """The inverse of `take_heads` over all parts."""
    if len(parts) == 1:
        return parts[0]
    grouped = [x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:]) for x in parts]
    joined = jnp.concatenate(grouped, axis=3)
    return joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])


def pad_heads(x: jax.Array, *, kv_heads: int, group: int, fill: float = 0.0) -> jax.Array:
    """[B, T, K·G, ...] -> [B, T, K·group, ...]."""
    batch, length, heads = x.shape[:3]
    missing = group - heads // kv_heads
    if not missing:
        return x
    grouped = x.reshape(batch, length, kv_heads, heads // kv_heads, *x.shape[3:])
    widths = [(0, 0)] * grouped.ndim
    widths[3] = (0, missing)
    padded = jnp.pad(grouped, widths, constant_values=fill)
    return padded.reshape(batch, length, kv_heads * group, *x.shape[3:])


def unpad_heads(x: jax.Array, kv_heads: int, group: int) -> jax.Array:
    """The inverse of `pad_heads`."""
    return take_heads(x, kv_heads=kv_heads, part=(0, group))


def pad_tokens(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros at the end of `axis` up to whole tiles: TMA's clipping knows no other token count."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x


def tile_rows(
    x: jax.Array, kv_heads: int, group: int, tokens: int, fill: float, *, tokens_first: bool = False
) -> jax.Array:
    """[B, T, K·G] -> [B, K, tiles·group·tokens]: a tile's rows side by side.

    Rows are (head, token), or with `tokens_first` (token, head).
    """
    x = pad_heads(x, kv_heads=kv_heads, group=group, fill=fill)
    batch, length, _ = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % tokens), (0, 0)), constant_values=fill)
    x = x.reshape(batch, -1, tokens, kv_heads, group)
    order = (0, 3, 1, 2, 4) if tokens_first else (0, 3, 1, 4, 2)
    return x.transpose(order).reshape(batch, kv_heads, -1)


def untile_rows(
    x: jax.Array, length: int, group: int, tokens: int, *, tokens_first: bool = False
) -> jax.Array:
    """[B, K, tiles·group·tokens] -> [B, T, K·group]: the inverse of `tile_rows`."""
    batch, kv_heads, _ = x.shape
    if tokens_first:
        x = x.reshape(batch, kv_heads, -1, tokens, group).transpose(0, 2, 3, 1, 4)
    else:
        x = x.reshape(batch, kv_heads, -1, group, tokens).transpose(0, 2, 4, 1, 3)
    return x.reshape(batch, -1, kv_heads * group)[:, :length]


def store(source: Any, target: Any, *, add: bool, old: tuple[Any, Any] | None = None) -> None:
    """target = source, or target += source, asynchronous and not yet in a group.

    The memory system adds: the kernel reads nothing back. The interpreter has no such copy. It
    reads the target back into `old` (shared memory and a barrier) and adds there; None: into memory
    that it allocates, for kernels of one warpgroup.
    """
    plgpu = mosaic()
    if not (add and platforms.interpreted()):
        reduction = "add" if add else None
        plgpu.copy_smem_to_gmem(source, target, reduction_op=reduction, commit_group=False)
        return

    def read_and_add(old, loaded):
        plgpu.copy_gmem_to_smem(target, old, loaded)
        plgpu.barrier_wait(loaded)
        old[...] = old[...] + source[...]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(old, target)
        plgpu.wait_smem_to_gmem(0)

    if old is not None:
        read_and_add(*old)
        return
    pallas().run_scoped(
        lambda old, loaded: read_and_add(old, loaded.at[0]),
        smem(source.shape, source.dtype),
        barrier(1, 1),
    )


def zeros(shape: tuple[int, int]) -> jax.Array:
    """float32 in the layout of a wgmma accumulator."""
    plgpu = mosaic()
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def multiply(a: Any, b: Any, shape: tuple[int, ...]) -> jax.Array:
    """a @ b by wgmma, float32; a in shared memory or registers, b in shared memory."""
    pl, plgpu = pallas(), mosaic()

    def product(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def multiply_add(total: jax.Array, a: Any, b: Any) -> jax.Array:
    """total + a @ b."""
    pl, plgpu = pallas(), mosaic()
    if platforms.interpreted():  # the interpreter cannot initialise an accumulator
        return total + multiply(a, b, total.shape)
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(total))


def when(condition: Any, do: Callable[[], None]) -> None:
    pallas().when(condition)(do)


def ds(start: Any, size: int) -> Any:
    return pallas().ds(start, size)


def multiple_of(x: Any, factor: int) -> Any:
    return pallas().multiple_of(x, factor)
