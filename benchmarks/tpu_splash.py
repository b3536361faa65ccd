"""Splash attention, the TPU attention kernel that ships with JAX, for comparison.

It attends to the sequence alone. What it fetches and computes follows from its own block masks
(`fwd_mask_info`, `dq_mask_info`, `dkv_mask_info` of the kernel object) and from its index maps:
query heads are the outermost axis of its grids, so each reads the keys of its group by itself.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from benchmarks.tpu_kernels import Call, Launch, traced
from moda_jax.ops import attention
from pallas_kernels import mosaic_tpu
from pallas_kernels.mosaic_tpu.schedule import LANES, Work

BLOCK = 512


@functools.cache
def kernel(call: Call, *, fused: bool = False, residuals: bool = False) -> Any:
    """A kernel for causal attention with blocks of 512; call it with [heads, T, H] arrays.

    fused: one backward kernel instead of two; dq is then a sum over [T / 512, ...] in HBM.
    residuals: returns lse besides; JAX cannot differentiate that.
    """
    block = min(BLOCK, call.tokens)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    causal = masks.CausalMask((call.tokens, call.tokens))
    return splash.make_splash_mha(
        masks.MultiHeadMask([causal] * call.heads),
        block_sizes=sizes,
        save_residuals=residuals,
        head_shards=1,
        q_seq_shards=1,
    )


def attend(call: Call, query, key, value, **settings: Any) -> Any:
    """Causal attention of [B, T, N, H] with [B, T, K, H]; with `residuals` also lse [B, T, N]."""
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (call.head_dim**-0.5 * query, key, value)]
    result = jax.vmap(kernel(call, **settings))(*heads_first)
    if not settings.get("residuals"):
        return jnp.swapaxes(result, 1, 2)
    out, (lse,) = result
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)


def merged(call: Call, query, key, value, depth_key, depth_value) -> jax.Array:
    """The forward of MoDA from this kernel and a depth kernel, merged by their lse."""
    out, lse = attend(call, query, key, value, residuals=True)
    depth_out, depth_lse = mosaic_tpu.forward(
        *attention.check(query, None, None, depth_key, depth_value)
    )
    weight = jax.nn.sigmoid(lse - depth_lse)[..., None]  # of the sequence: e^(lse - total)
    return (weight * out + (1 - weight) * depth_out).astype(query.dtype)


def depth_alone(call: Call) -> tuple[Launch, ...]:
    """The depth kernels of `merged`."""
    arrays = call.arrays()

    def forward(query, depth_key, depth_value):
        return mosaic_tpu.forward(*attention.check(query, None, None, depth_key, depth_value))

    return traced(forward, arrays[0], *arrays[3:])


def launches(call: Call, *, fused: bool = False, residuals: bool = True) -> tuple[Launch, ...]:
    """Forward and backward kernels. `residuals`: the forward writes lse, as training needs it."""
    made = kernel(call, fused=fused)
    kernels = [_forward(call, _visited(call, made.fwd_mask_info), residuals)]
    visited = _visited(call, made.dkv_mask_info)
    if fused:
        return (*kernels, _key_gradients(call, visited, fused=True), _sum_of_parts(call))
    dq_visited = _visited(call, made.dq_mask_info)
    return (*kernels, _key_gradients(call, visited), _query_gradient(call, dq_visited))


def _visited(call: Call, info: Any) -> int:
    """Pairs of blocks that are computed, over all query heads; one mask may stand for all."""
    mask = np.asarray(info.block_mask)
    return int(np.count_nonzero(mask)) * call.batch * (call.heads if mask.shape[0] == 1 else 1)


class _Sizes:
    """Bytes of rows as they lie in HBM: H in the lanes, padded to 128."""

    def __init__(self, call: Call) -> None:
        self.row = 2 * -(-call.head_dim // LANES) * LANES  # bfloat16
        self.block = min(BLOCK, call.tokens)
        self.queries = call.batch * call.heads * call.tokens
        self.keys = call.batch * call.kv_heads * call.tokens
        self.steps = call.batch * call.heads * (call.tokens // self.block) ** 2


def _forward(call: Call, visited: int, residuals: bool) -> Launch:
    size = _Sizes(call)
    entries = visited * size.block**2
    suffix = "residuals" if residuals else "no_residuals"
    return Launch(
        f"splash_mha_fwd_{suffix}",
        Work(
            steps=size.steps,
            pairs=visited,
            bytes_read=size.queries * size.row + visited * 2 * size.block * size.row,
            # lse stands in all 128 lanes, in float32
            bytes_written=size.queries * (size.row + residuals * LANES * 4),
            mxu_flops=2 * 2 * entries * call.head_dim,
            vpu_ops=5 * entries + 2 * visited * size.block * call.head_dim,
            exps=entries,
        ),
    )


def _key_gradients(call: Call, visited: int, *, fused: bool = False) -> Launch:
    """dk and dv; fused: also every key block's part of dq, [T / block, B, N, T, H]."""
    size = _Sizes(call)
    entries = visited * size.block**2
    parts = fused * (call.tokens // size.block) * size.queries * size.row
    return Launch(
        "splash_mha_dkv_no_residuals",
        Work(
            steps=size.steps,
            pairs=visited,
            bytes_read=visited * size.block * (2 * size.row + 2 * 4) + 2 * size.queries * size.row,
            bytes_written=2 * size.keys * size.row + parts,
            mxu_flops=(4 + fused) * 2 * entries * call.head_dim,
            vpu_ops=6 * entries,
            exps=entries,
        ),
    )


def _query_gradient(call: Call, visited: int) -> Launch:
    size = _Sizes(call)
    entries = visited * size.block**2
    return Launch(
        "splash_mha_dq_no_residuals",
        Work(
            steps=size.steps,
            pairs=visited,
            bytes_read=size.queries * (2 * size.row + 2 * 4) + visited * 2 * size.block * size.row,
            bytes_written=size.queries * size.row,
            mxu_flops=3 * 2 * entries * call.head_dim,
            vpu_ops=6 * entries,
            exps=entries,
        ),
    )


def _sum_of_parts(call: Call) -> Launch:
    """The fused backward's dq: XLA reads the parts and adds them up."""
    size = _Sizes(call)
    parts = call.tokens // size.block
    return Launch(
        "sum of dq's parts",
        Work(
            steps=0,
            pairs=0,
            bytes_read=parts * size.queries * size.row,
            bytes_written=size.queries * size.row,
            mxu_flops=0,
            vpu_ops=parts * size.queries * call.head_dim,
            exps=0,
        ),
    )
