"""The array layout of the paper's official kernels, to and from that of `moda_attention`.

There, queries that share a key/value head stand in the token axis, query head g of the group of
token t in row t·G + g, and a token's depth slots stand one after the other in the depth's token
axis, slot s of token t in row t·S + s. So row i of the queries reads the rows (i // G)·S …
(i // G)·S + S − 1 of the depth arrays (Zhu et al., arXiv 2603.15619, Alg. 1). Sequence keys and
values are [B, T, K, H] in both.
"""

import jax
import jax.numpy as jnp

from moda_jax.ops.checks import check_array, check_int, fail


def query_to_official(query: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, T·G, K, H], for queries, outputs and their gradients; N = K·G.

    Raises ValueError if `num_kv_heads`, K, does not divide N.
    """
    check_array("query", query, ("B", "T", "N", "H"))
    batch, length, heads, head_dim = query.shape
    kv_heads = check_int("num_kv_heads", num_kv_heads, 1)
    if heads % kv_heads:
        fail("num_kv_heads", f"a divisor of the {heads} query heads", kv_heads)
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    return jnp.swapaxes(grouped, 2, 3).reshape(batch, -1, kv_heads, head_dim)


def query_from_official(query: jax.Array, group: int) -> jax.Array:
    """[B, T·G, K, H] -> [B, T, N, H]; `group` is G, query heads per key/value head.

    Raises ValueError if G does not divide the rows.
    """
    check_array("query", query, ("B", "T·G", "K", "H"))
    batch, rows, kv_heads, head_dim = query.shape
    group = check_int("group", group, 1)
    if rows % group:
        fail("group", f"a divisor of the {rows} rows", group)
    grouped = query.reshape(batch, rows // group, group, kv_heads, head_dim)
    return jnp.swapaxes(grouped, 2, 3).reshape(batch, rows // group, -1, head_dim)


def depth_to_official(depth: jax.Array) -> jax.Array:
    """[S, B, T, K, H] -> [B, T·S, K, H], for depth keys, depth values and their gradients."""
    check_array("depth", depth, ("S", "B", "T", "K", "H"))
    _, batch, _, kv_heads, head_dim = depth.shape
    return jnp.moveaxis(depth, 0, 2).reshape(batch, -1, kv_heads, head_dim)


def depth_from_official(depth: jax.Array, num_slots: int) -> jax.Array:
    """[B, T·S, K, H] -> [S, B, T, K, H]; `num_slots` is S, the official code's L.

    Raises ValueError if S does not divide the rows.
    """
    check_array("depth", depth, ("B", "T·S", "K", "H"))
    batch, rows, kv_heads, head_dim = depth.shape
    num_slots = check_int("num_slots", num_slots, 1)
    if rows % num_slots:
        fail("num_slots", f"a divisor of the {rows} rows", num_slots)
    by_token = depth.reshape(batch, rows // num_slots, num_slots, kv_heads, head_dim)
    return jnp.moveaxis(by_token, 2, 0)
