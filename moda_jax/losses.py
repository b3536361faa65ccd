"""Next-token cross-entropy, float32, without ever holding all logits."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moda_jax.model import Transformer, head_logits
from moda_jax.sharding import per_row_shard

CHUNK_BYTES = 256 * 2**20
"""float32 logits per device that are alive at a time, about. Every chunk reads the head and adds
to its float32 gradient: a quarter of this is so few tokens, at V = 100K, that memory sets the pace.
"""


def next_token_loss(
    model: Transformer, batch: Mapping[str, jax.Array], *, z_loss: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over target tokens of cross-entropy + z_loss · logsumexp(logits)², float32, in nats.

    `batch` holds int32 arrays [B, T]: tokens, targets, segment_ids (0 is padding: no target there)
    and positions. Logits are computed for a part of each row at a time and again in the backward.
    The caller divides by the number of targets of the whole optimizer step.

    Returns:
      (total, {"cross_entropy": sum, "z": sum of logsumexp², "targets": count}), float32 scalars.
    """
    hidden = model.hidden(
        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )
    rows, length = batch["tokens"].shape
    chunk = chunk_length(rows, length, model.config.vocab_size)
    real = batch["segment_ids"] != 0

    def sums(weights, *rows_of):
        parts = tuple(_chunks_first(x, chunk) for x in rows_of)
        add = functools.partial(_add_chunk, weights)
        totals, _ = lax.scan(add, (jnp.zeros(1), jnp.zeros(1)), parts)
        return totals

    # Every device keeps its own sum of the head's gradient while it goes through the chunks of its
    # own rows: left to itself, the compiler gathers the head and reduces that gradient per chunk.
    totals = per_row_shard(sums)(model.head_weights(), hidden, batch["targets"], real)
    cross_entropy, z = (total.sum() for total in totals)
    metrics = {"cross_entropy": cross_entropy, "z": z, "targets": real.sum(dtype=jnp.float32)}
    return cross_entropy + z_loss * z, metrics


def _add_chunk(weights: Any, sums: Any, chunk: Any) -> tuple[Any, None]:
    """Adds a chunk's (cross-entropy, logsumexp²) to `sums`; its logits do not outlive it."""

    @jax.checkpoint
    def chunk_sums(weights, hidden_BxCxD, targets_BxC, real_BxC):
        logits = head_logits(weights, hidden_BxCxD)
        lse = jax.nn.logsumexp(logits, axis=-1)
        # Not take_along_axis: a masked sum needs no gather across a sharded vocabulary.
        hit = jnp.arange(logits.shape[-1]) == targets_BxC[..., None]
        correct = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return (
            jnp.sum(jnp.where(real_BxC, lse - correct, 0.0)),
            jnp.sum(jnp.where(real_BxC, jnp.square(lse), 0.0)),
        )

    new = chunk_sums(weights, *chunk)
    return (sums[0] + new[0], sums[1] + new[1]), None


def chunk_length(batch: int, length: int, vocab_size: int) -> int:
    """Tokens of each row per chunk: the most that keep B·C·V float32 within CHUNK_BYTES a device.

    Rows stay whole in the batch axis, so that chunks are sharded as the batch is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = max(mesh.size, 1)
    most = CHUNK_BYTES * devices // (4 * batch * vocab_size)
    return min(length, max(most, 1))


def _chunks_first(x_BxTx: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, chunk, ...], padded with zeros, which are not real tokens."""
    batch, length = x_BxTx.shape[:2]
    padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BxTx.ndim - 2)
    padded = jnp.pad(x_BxTx, padding)
    return jnp.moveaxis(padded.reshape(batch, -1, chunk, *x_BxTx.shape[2:]), 1, 0)
