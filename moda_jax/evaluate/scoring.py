"""Log-probabilities of chosen tokens: rows of tokens in, numbers of the asked positions out.

Rows of about one length share a batch. Each length is padded to one of few, and all batches of such
a bucket have one shape, so that a bucket is compiled once. Logits are computed where a row is asked
for them only, a part at a time, and two numbers a token leave the device.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from moda_jax.config import MeshConfig
from moda_jax.evaluate import BATCH_TOKENS
from moda_jax.model.transformer import Transformer
from moda_jax.ops.checks import check_int
from moda_jax.ops.sharding import batch_sharding, make_mesh
from moda_jax.train.losses import chunk_length

_SHORTEST, _FEWEST_ASKED = 64, 16
_IN_FLIGHT = 2  # batches that the device may have before the host reads their results

Report = Callable[[int, int], None]
"""(rows done, rows in all)"""


class Row(NamedTuple):
    """Tokens of one sequence, and which predictions are asked for."""

    tokens: Sequence[int]
    """What the model reads, at positions 0, 1, ..."""
    positions: Sequence[int]
    """Of the predictions: the one at position i is of the token that follows tokens[i]."""
    targets: Sequence[int]
    """One token id for each position; a position may come several times."""


class RowScores(NamedTuple):
    """Of each target of a row."""

    log_prob: np.ndarray
    """[n] float32, natural logarithm."""
    is_greedy: np.ndarray
    """[n] bool: no token is likelier than the target."""


class Batch(NamedTuple):
    """Rows that are computed together."""

    members: Sequence[int]
    """Numbers of the rows."""
    shape: tuple[int, int, int]
    """(B, T, Q): rows, tokens of each, predictions of each; what is compiled."""


def data_mesh() -> Mesh:
    """All devices along the axis "data": each has the whole model and its own rows."""
    return make_mesh(MeshConfig(data=len(jax.devices())))


class Scorer:
    """A model on a mesh, and the size of its batches."""

    def __init__(
        self, model: Transformer, *, mesh: Mesh | None = None, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        """The mesh (None: `data_mesh`) splits rows over its axes data and fsdp.

        Raises ValueError unless `batch_tokens`, of each device, is a positive integer.
        """
        self.batch_tokens = check_int("batch_tokens", batch_tokens, 1)
        self.mesh = data_mesh() if mesh is None else mesh
        self.model = model
        self._graph, self._state = nnx.split(model)

    @property
    def num_row_shards(self) -> int:
        """Devices, or groups of them, that have rows of their own."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def num_parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self._state))

    @property
    def device_kind(self) -> str:
        """As JAX names the mesh's devices."""
        return self.mesh.devices.flat[0].device_kind

    def batch_rows(self, length: int, count: int) -> int:
        """Rows of `length` tokens in a batch, of `count` in all; as many for each row shard.

        Few rows make a small batch, of a size that the next call may have, too.
        """
        each = min(
            max(self.batch_tokens // length, 1), _power_of_two(-(-count // self.num_row_shards))
        )
        return each * self.num_row_shards

    def score(
        self, rows: Sequence[Row], report: Report = lambda done, total: None
    ) -> list[RowScores]:
        """The scores of each row, in the order of `rows`. The longest are computed first.

        Raises ValueError if a log-probability is not a number: the parameters are not, or a token
        id is outside of the vocabulary.
        """
        scores: list[RowScores | None] = [None] * len(rows)
        waiting: collections.deque[tuple[Batch, tuple[jax.Array, jax.Array]]] = collections.deque()
        done = 0

        def read() -> None:
            nonlocal done
            batch, results = waiting.popleft()
            log_prob, is_greedy = map(np.asarray, results)
            for line, number in enumerate(batch.members):
                count = len(rows[number].positions)
                scores[number] = RowScores(log_prob[line, :count], is_greedy[line, :count])
                if np.isnan(log_prob[line, :count]).any():
                    raise ValueError(
                        "expected log-probabilities, got NaN: the model's parameters are not "
                        "finite, or the tokenizer has ids that the model does not know"
                    )
            done += len(batch.members)
            report(done, len(rows))

        with jax.set_mesh(self.mesh):
            for batch in plan(rows, self.batch_rows):
                waiting.append((batch, self._compute(rows, batch)))
                if len(waiting) > _IN_FLIGHT:
                    read()
            while waiting:
                read()
        return [found for found in scores if found is not None]

    def _compute(self, rows: Sequence[Row], batch: Batch) -> tuple[jax.Array, jax.Array]:
        num_rows, length, asked = batch.shape
        tokens = np.zeros((num_rows, length), np.int32)
        positions, targets = np.zeros((2, num_rows, asked), np.int32)
        lengths = np.zeros(num_rows, np.int32)
        for line, number in enumerate(batch.members):
            row = rows[number]
            lengths[line] = len(row.tokens)
            tokens[line, : len(row.tokens)] = row.tokens
            positions[line, : len(row.positions)] = row.positions
            targets[line, : len(row.targets)] = row.targets
        arrays = jax.device_put((tokens, lengths, positions, targets), batch_sharding(self.mesh))
        chunk = chunk_length(num_rows, asked, self.model.config.vocab_size)
        return _score(self._graph, chunk, self._state, *arrays)


def plan(rows: Sequence[Row], batch_rows: Callable[[int, int], int]) -> list[Batch]:
    """Batches of rows of about one length, the longest first, all of a bucket in one shape.

    `batch_rows(length, count)` is how many of `count` rows of a length, padding included, are
    computed together.
    """
    buckets: dict[int, list[int]] = collections.defaultdict(list)
    for number, row in enumerate(rows):
        buckets[bucket_length(len(row.tokens))].append(number)
    batches = []
    for length, members in sorted(buckets.items(), reverse=True):
        members.sort(key=lambda number: len(rows[number].tokens), reverse=True)
        size = batch_rows(length, len(members))
        asked = _asked_length(max(len(rows[number].positions) for number in members), length)
        batches += [
            Batch(members[start : start + size], (size, length, asked))
            for start in range(0, len(members), size)
        ]
    return batches


def bucket_length(length: int) -> int:
    """`length` rounded up to 64, 96, 128, 192, 256, 384, ...: above 64 less than half is added."""
    size = max(_power_of_two(length), _SHORTEST)
    three_quarters = size * 3 // 4
    return three_quarters if size > _SHORTEST and length <= three_quarters else size


def _asked_length(count: int, length: int) -> int:
    """`count` rounded up to 16, 64, 256, ..., but to no more than a bucket's `length`.

    Few sizes, since padding costs little here. A row that is shared may ask for more.
    """
    size = _FEWEST_ASKED
    while size < count:
        size *= 4
    return min(size, length) if count <= length else size


def _power_of_two(count: int) -> int:
    """The smallest one that is not less."""
    return 1 << max(count - 1, 0).bit_length()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(graph, chunk: int, state, tokens_BxT, lengths_B, positions_BxQ, targets_BxQ):
    """(log-probabilities [B, Q] float32, whether they are the largest [B, Q])."""
    model = nnx.merge(graph, state)
    real_BxT = jnp.arange(tokens_BxT.shape[1]) < lengths_B[:, None]
    hidden_BxTxD = model.hidden(tokens_BxT, segment_ids=real_BxT.astype(jnp.int32))
    hidden_BxQxD = jnp.take_along_axis(hidden_BxTxD, positions_BxQ[..., None], axis=1)

    def score(parts):
        hidden_BxCxD, targets_BxC = parts
        logits = model.logits(hidden_BxCxD)
        target = jnp.take_along_axis(logits, targets_BxC[..., None], axis=-1)[..., 0]
        log_prob = target - jax.nn.logsumexp(logits, axis=-1)
        return log_prob, logits.argmax(axis=-1) == targets_BxC

    chunks = _chunks_first(hidden_BxQxD, chunk), _chunks_first(targets_BxQ, chunk)
    log_prob, is_greedy = lax.map(score, chunks)
    asked = positions_BxQ.shape[1]
    return tuple(
        jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :asked] for x in (log_prob, is_greedy)
    )


def _chunks_first(x_BxQx: jax.Array, chunk: int) -> jax.Array:
    """[B, Q, ...] -> [chunks, B, chunk, ...], padded with zeros."""
    batch, asked = x_BxQx.shape[:2]
    padding = [(0, 0), (0, -asked % chunk)] + [(0, 0)] * (x_BxQx.ndim - 2)
    padded = jnp.pad(x_BxQx, padding)
    return jnp.moveaxis(padded.reshape(batch, -1, chunk, *x_BxQx.shape[2:]), 1, 0)
