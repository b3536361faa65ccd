"""Arrays inside `jax.shard_map`, which by default checks over which mesh axes a value varies.

A loop's carry must vary over the axes that the loop's results vary over. What is made of a shape
alone, like zeros, varies over none, whatever is added to it later: it is cast here first. Nothing
is computed by that; outside of `shard_map`, and with `check_vma=False`, arrays stay as they are.
"""

from typing import Any

import jax
from jax import lax


def axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which any of the arrays in a tree varies."""
    return frozenset().union(*map(_axes, jax.tree.leaves(tree)))


def _axes(x: Any) -> frozenset[str]:
    return getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", frozenset())


def vary_like(tree: Any, like: Any) -> Any:
    """A tree whose arrays vary over every axis that an array of the tree `like` varies over."""
    wanted = axes(like)

    def one(x: Any) -> Any:
        missing = tuple(sorted(wanted - _axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree) if wanted else tree
