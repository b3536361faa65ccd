"""The deferred backward of a call for which a backend has no kernel that does it at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.operands import Gradients, Operands, Options, depth_readers, visible_slots


def in_two_passes(
    without: Callable[..., Gradients],
    add: Callable[..., tuple[jax.Array, jax.Array]],
    operands: Operands,
    options: Options,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array | None,
    depth_grads: tuple[jax.Array, jax.Array],
    first: Any,
) -> Gradients:
    """`deferred_backward` (see `pallas_kernels`): the slots' gradients in a pass of their own.

    without, add: a backend's `backward_without_depth_grads` and `add_depth_grads`.
    """
    assert options.depth_chunk is None
    grads = without(operands, options, out, lse, d_out, d_lse)
    alone = jax.tree.map(lambda x: x[None], depth_readers(operands, out, lse, d_out, d_lse))
    for start, stop in visible_slots(operands, options):
        depth_grads = add(
            alone, operands.depth_key, operands.depth_value, depth_grads,
            jnp.clip(first, start, stop), stop, scale=options.scale,
        )  # fmt: skip
    return grads._replace(depth_key=depth_grads[0], depth_value=depth_grads[1])
