"""Memory for a history and for results of all layers, uninitialized where that is possible.

Filling a large buffer that is overwritten anyway costs a pass over memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from moda_jax.ops.sharding import compiler_axes, constrain, partition_spec
from pallas_kernels import platforms

EntryLike = tuple[Any, ...]
"""Arrays, or `jax.ShapeDtypeStruct`s."""


def entry_axes(ndim: int) -> tuple[str | None, ...]:
    """Logical axes of a history buffer: [S, B, T, K, H] keys or values, [S, B, T, D] outputs."""
    return (None, "batch", None, "kv_heads", None) if ndim == 5 else (None, "batch", None, None)


def uninitialized_entries(
    like: EntryLike, dtype: Any = None, *, count: int | None = None
) -> tuple[jax.Array, ...]:
    """Buffers like `like` [S, B, T, ...] (with `count` slots) that may hold anything, NaN included.

    On the CPU they are zeros: memory is filled there all the same.
    """
    shapes = [(count or x.shape[0], *x.shape[1:]) for x in like]
    dtypes = [jnp.dtype(dtype or x.dtype) for x in like]
    if platforms.current() == "cpu":
        structs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
        return zero_entries(tuple(structs))
    return tuple(
        uninitialized(shape, d, *entry_axes(len(shape)))
        for shape, d in zip(shapes, dtypes, strict=True)
    )


def zero_entries(like: EntryLike, dtype: Any = None) -> tuple[jax.Array, ...]:
    """Zeros like `like`, as separate arrays to the compiler.

    Equal ones it would make once and copy, which reads and writes more than filling each.
    """
    zeros = tuple(jnp.zeros((), dtype or x.dtype) for x in like)
    if len(zeros) > 1:
        zeros = lax.optimization_barrier(zeros)
    return tuple(
        constrain(jnp.broadcast_to(zero, x.shape), *entry_axes(len(x.shape)))
        for zero, x in zip(zeros, like, strict=True)
    )


def uninitialized(shape: tuple[int, ...], dtype: Any, *logical_axes: str | None) -> jax.Array:
    """Uninitialized memory, sharded as `constrain` does.

    Every device makes its part: what is made whole and split is whole on every device first. On a
    CPU JAX fills it with zeros.
    """
    sizes = compiler_axes()
    if not sizes:
        return jax.lax.empty(shape, dtype)
    spec = partition_spec(logical_axes, shape, sizes)
    part = NamedSharding(jax.sharding.get_abstract_mesh(), spec).shard_shape(shape)
    return jax.shard_map(
        lambda: jax.lax.empty(part, dtype),
        in_specs=(),
        out_specs=spec,
        axis_names=set(sizes),
        check_vma=False,
    )()


def stacked_memory(length: int, one: jax.ShapeDtypeStruct) -> jax.Array:
    """Memory [length, ...] for results like `one` that are all written, each at its index.

    Uninitialized; zeros on a mesh, since the compiler splits zeros by what is written to them.
    """
    memory = jnp.zeros if compiler_axes() else jax.lax.empty
    return memory((length, *one.shape), one.dtype)
