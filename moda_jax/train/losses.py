"""Next-token cross-entropy, float32, without ever holding all logits."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moda_jax.model.transformer import Transformer
from moda_jax.ops.checks import check_integers, check_range, is_concrete
from moda_jax.ops.sharding import constrain, per_row_shard
from pallas_kernels.varying import vary_like

CHUNK_BYTES = (64 * 2**20, 512 * 2**20)
"""float32 logits per device that are alive at a time: a 16th of all of them, in these bounds. The
gradient of the output matrix is read and written once a chunk, so that small chunks cost time."""


NO_TARGET = -100
"""A target that does not count."""


class _Sums(NamedTuple):
    """Over target tokens; float32 scalars."""

    cross_entropy: jax.Array
    z: jax.Array
    """logsumexp(logits)²"""


def next_token_loss(
    model: Transformer, batch: Mapping[str, jax.Array], *, z_loss: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over target tokens of cross-entropy + z_loss · logsumexp(logits)², float32, in nats.

    `batch` holds int32 arrays [B, T]: tokens, targets, segment_ids (0 is padding: no target there)
    and positions. A target of -100 (`NO_TARGET`) does not count, as in PyTorch; for any other id
    outside of 0 … V−1 a ValueError is raised, or, where ids are traced, the loss is NaN. Logits are
    computed for a part of each row at a time. The first result alone is differentiable. The caller
    divides by the number of targets of the whole optimizer step.

    Returns:
      (total, {"cross_entropy": sum, "z": sum of logsumexp², "targets": count}), float32 scalars.
    """
    hidden = model.hidden(
        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )
    targets = check_integers("targets", batch["targets"], batch["tokens"].shape)
    real = (batch["segment_ids"] != 0) & (targets != NO_TARGET)
    if is_concrete(targets, real):
        check_range("targets", targets, 0, model.config.vocab_size - 1, where=real)
    rows, length = real.shape
    chunk = chunk_length(rows, length, model.config.vocab_size)

    def loss(weights, *arrays):
        total, sums = _chunked_loss(z_loss, chunk, *weights, *arrays)
        return jax.tree.map(lambda x: x[None], (total, sums))

    # Every device keeps its own sum of the head's gradient while it goes through the chunks of its
    # own rows: left to itself, the compiler gathers the head and reduces that gradient per chunk.
    parts = per_row_shard(loss)(vary_like(model.head_weights(), hidden), hidden, targets, real)
    total, sums = jax.tree.map(jnp.sum, parts)
    return total, sums._asdict() | {"targets": real.sum(dtype=jnp.float32)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_loss(
    z_loss: float, chunk: int, table_DxV, bias_V, hidden_BxTxD, targets_BxT, real_BxT
):
    """(total, sums). Differentiated, the same pass computes the gradients, by which the backward
    does not need the logits a second time.
    """
    chunks = tuple(_chunks_first(x, chunk) for x in (hidden_BxTxD, targets_BxT, real_BxT))
    padded = _pad_vocabulary(table_DxV, hidden_BxTxD.dtype)

    def body(sums, parts):
        _, _, new = _logits(padded, bias_V, table_DxV.shape[1], *parts)
        return jax.tree.map(jnp.add, sums, new), None

    zeros = vary_like(_Sums(jnp.float32(0), jnp.float32(0)), chunks)
    sums, _ = lax.scan(body, zeros, chunks)
    return sums.cross_entropy + z_loss * sums.z, sums


def _loss_forward(z_loss, chunk, table_DxV, bias_V, hidden_BxTxD, targets_BxT, real_BxT):
    vocab = table_DxV.shape[1]
    chunks = tuple(_chunks_first(x, chunk) for x in (hidden_BxTxD, targets_BxT, real_BxT))
    padded = _pad_vocabulary(table_DxV, hidden_BxTxD.dtype)

    def body(carry, parts):
        sums, d_table, d_bias = carry
        hidden_BxCxD, targets_BxC, real_BxC = parts
        logits, lse, new = _logits(padded, bias_V, vocab, *parts)
        softmax = jnp.exp(logits - lse[..., None])
        factor = jnp.where(real_BxC, 1 + 2 * z_loss * lse, 0.0)
        hit = _hit(logits, targets_BxC) & real_BxC[..., None]
        d_logits = softmax * factor[..., None] - hit.astype(jnp.float32)
        if d_bias is not None:
            d_bias += d_logits.sum(axis=(0, 1))[:vocab]
        # As any product's: the cotangent in the compute dtype, sums in float32.
        d_logits = d_logits.astype(hidden_BxCxD.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_table += product("bcd,bcv->dv", hidden_BxCxD, d_logits)
        d_hidden = product("bcv,dv->bcd", d_logits, padded).astype(hidden_BxCxD.dtype)
        return (jax.tree.map(jnp.add, sums, new), d_table, d_bias), d_hidden

    sums = _Sums(jnp.float32(0), jnp.float32(0))
    d_table = constrain(jnp.zeros(padded.shape, jnp.float32), "embed", "vocab")
    d_bias = None if bias_V is None else jnp.zeros_like(bias_V)
    init = vary_like((sums, d_table, d_bias), chunks)
    (sums, d_table, d_bias), d_hidden = lax.scan(body, init, chunks)
    batch, length, width = hidden_BxTxD.shape
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(batch, -1, width)
    grads = d_table[:, :vocab], d_bias, d_hidden[:, :length]
    return (sums.cross_entropy + z_loss * sums.z, sums), grads


def _loss_backward(z_loss, chunk, grads, cotangents):
    d_total, _ = cotangents
    scaled = jax.tree.map(lambda g: (d_total * g).astype(g.dtype), grads)
    return (*scaled, None, None)


_chunked_loss.defvjp(_loss_forward, _loss_backward)


def _logits(padded_DxV, bias_V, vocab: int, hidden_BxCxD, targets_BxC, real_BxC):
    """(logits [B, C, V], logsumexp [B, C], sums of the chunk)."""
    logits = jnp.matmul(hidden_BxCxD, padded_DxV, preferred_element_type=jnp.float32)
    logits = constrain(logits, "batch", None, "vocab")
    if bias_V is not None:
        logits += jnp.pad(bias_V, (0, padded_DxV.shape[1] - vocab))
    if padded_DxV.shape[1] > vocab:
        logits = jnp.where(jnp.arange(padded_DxV.shape[1]) < vocab, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    correct = jnp.sum(jnp.where(_hit(logits, targets_BxC), logits, 0.0), axis=-1)
    inside = (targets_BxC >= 0) & (targets_BxC < vocab)
    correct = jnp.where(inside, correct, jnp.nan)
    cross_entropy = jnp.sum(jnp.where(real_BxC, lse - correct, 0.0))
    return logits, lse, _Sums(cross_entropy, jnp.sum(jnp.where(real_BxC, jnp.square(lse), 0.0)))


def _hit(logits_BxCxV: jax.Array, targets_BxC: jax.Array) -> jax.Array:
    """[B, C, V] bool: each token's target. A mask needs no gather across a sharded vocabulary."""
    return jnp.arange(logits_BxCxV.shape[-1]) == targets_BxC[..., None]


def _pad_vocabulary(table_DxV: jax.Array, dtype) -> jax.Array:
    """The output matrix in the compute dtype; a large one in whole tiles, once and not per chunk.

    Matrix units want aligned rows, and a padded vocabulary can be split over a mesh.
    """
    vocab = table_DxV.shape[1]
    padding = -vocab % 128 if vocab >= 4096 else 0
    table = jnp.pad(table_DxV.astype(dtype), ((0, 0), (0, padding)))
    return constrain(table, None, "vocab")


def chunk_length(batch: int, length: int, vocab_size: int) -> int:
    """Tokens of each row per chunk: as many as CHUNK_BYTES allows B·C·V float32 logits a device.

    Rows stay whole in the batch axis, so that chunks are sharded as the batch is. Chunks are of
    about one size: the last one's padding costs as much as real tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    token_bytes = 4 * batch * vocab_size / max(mesh.size, 1)
    smallest, largest = CHUNK_BYTES
    size = min(max(length * token_bytes / 16, smallest), largest)
    chunks = -(-length // max(int(size / token_bytes), 1))
    return -(-length // chunks)


def _chunks_first(x_BxTx: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, chunk, ...], padded with zeros, which are not real tokens."""
    batch, length = x_BxTx.shape[:2]
    padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BxTx.ndim - 2)
    padded = jnp.pad(x_BxTx, padding)
    return jnp.moveaxis(padded.reshape(batch, -1, chunk, *x_BxTx.shape[2:]), 1, 0)
