"""One global order of rows: which row of which source is the n-th, whatever reads it.

It follows from the documents' lengths, the weights and the seed; neither the number of processes
nor the batch size is part of it. A process reads the tokens of its own rows only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from moda_jax.data.packing import Batch, Cursor, Pieces, Rows, RowStream
from moda_jax.data.prepared import PreparedText


class WeightedRows(NamedTuple):
    """Endless rows of a source, and its share of all rows."""

    text: PreparedText
    rows: RowStream
    weight: float


def share_out(taken: Sequence[int], weights: Sequence[float], count: int) -> np.ndarray:
    """[count]: the sources of the next rows, when `taken` rows of each are gone.

    The source that lacks most of its share is next, the first of equals, so that after every row
    each source has its share up to a row.
    """
    if len(weights) == 1:
        return np.zeros(count, np.int64)
    shares = np.asarray(weights, np.float64) / sum(weights)
    so_far = np.asarray(taken, np.int64).copy()
    done = int(so_far.sum())
    sources = np.empty(count, np.int64)
    for i in range(count):
        source = int(np.argmax(shares * (done + i + 1) - so_far))
        sources[i] = source
        so_far[source] += 1
    return sources


class Reading(NamedTuple):
    """How a process reads its rows of the global batches."""

    batch_size: int
    local: slice
    """Its rows of a batch."""
    seq_len: int
    skip_unreadable: bool

    def rows(self) -> Rows:
        """Rows of padding, to be filled with `fill`."""
        return Rows(self.local.stop - self.local.start, self.seq_len)

    def fill(self, rows: Rows, text: PreparedText, pieces: Pieces) -> None:
        """Reads what is local of the `pieces` of a global batch."""
        chosen = (pieces.row >= self.local.start) & (pieces.row < self.local.stop)
        mine = pieces.select(chosen)
        mine = mine._replace(row=mine.row - self.local.start)
        rows.fill(text, mine, skip_unreadable=self.skip_unreadable)


class GlobalBatches(grain.IterDataset[Batch]):
    """Endless batches, of which a process reads its rows.

    Its iterator's state is the same in every process but for `skipped`, the number of pieces that
    this process could not read.
    """

    def __init__(self, sources: Sequence[WeightedRows], reading: Reading) -> None:
        super().__init__()
        self.sources, self.reading = sources, reading

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator[Batch]):
    def __init__(self, dataset: GlobalBatches) -> None:
        super().__init__()
        self._dataset = dataset
        self._cursors: list[Cursor | None] = [Cursor() for _ in dataset.sources]
        self._taken = [0] * len(dataset.sources)
        self._skipped = 0

    def __next__(self) -> Batch:
        sources, reading = self._dataset.sources, self._dataset.reading
        order = share_out(self._taken, [x.weight for x in sources], reading.batch_size)
        cursors, taken = list(self._cursors), list(self._taken)
        rows = reading.rows()
        for number, source in enumerate(sources):
            (places,) = np.nonzero(order == number)
            pieces, cursors[number], count = source.rows.take(cursors[number], len(places))
            assert count == len(places)
            taken[number] += count
            reading.fill(rows, source.text, pieces._replace(row=places[pieces.row]))
        # Only now: a batch that could not be read is not gone.
        self._cursors, self._taken = cursors, taken
        self._skipped += rows.skipped
        return rows.batch

    def get_state(self) -> dict[str, Any]:
        cursors = [list(cursor or ()) for cursor in self._cursors]
        return {"cursors": cursors, "taken": list(self._taken), "skipped": self._skipped}

    def set_state(self, state: dict[str, Any]) -> None:
        self._cursors = [Cursor(*cursor) for cursor in state["cursors"]]
        self._taken, self._skipped = list(state["taken"]), state["skipped"]
