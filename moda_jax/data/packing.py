"""Documents to rows of T targets: which pieces lie where, and the batch that they make.

A document of n tokens has n + 1 targets, its tokens and its end; each is predicted exactly once,
the first from eos. A row holds pieces of documents. Where they lie follows from the documents'
lengths alone, so every process knows all rows and reads the tokens of its own.

A batch is a dict of int32 arrays [B, T]: `tokens`, `targets`, `segment_ids` (1, 2, ... for the
pieces of a row, 0 for padding) and `positions`.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

from moda_jax.data.prepared import PreparedText, Split, UnreadableBlockError, ranges
from moda_jax.data.shuffle import shuffled

_NEIGHBOUR_TOKENS = 1 << 13
_FEWEST_UNITS = 1 << 10

Batch = dict[str, np.ndarray]


class Cursor(NamedTuple):
    """The next row of a stream of rows; all of its state."""

    epoch: int = 0
    document: int = 0
    """How many documents of the epoch come before those that are packed together, about: the last
    unit of neighbours counts as a whole one."""
    row: int = 0
    """Among the rows of these documents; of contiguous text, of the epoch."""


class Pieces(NamedTuple):
    """Pieces of rows, in the order of the rows; arrays [n]."""

    start: np.ndarray
    """Of the first target in the token stream, int64."""
    length: np.ndarray
    """Targets."""
    is_first: np.ndarray
    """Whether the document begins here, so that the first input is eos, bool."""
    row: np.ndarray
    column: np.ndarray
    segment: np.ndarray
    """Its number among the pieces of its row, from 1."""

    def select(self, chosen: Any) -> "Pieces":
        return Pieces(*(array[chosen] for array in self))


class RowStream(Protocol):
    """The rows of a split, in an order."""

    def take(self, cursor: Cursor | None, count: int) -> tuple[Pieces, Cursor | None, int]:
        """Up to `count` rows from `cursor` on: their pieces, what is next, how many they are.

        `Pieces.row` counts from 0. A cursor of None is the end, which endless rows do not have.
        """
        ...


class PackedRows:
    """Documents cut into pieces of at most T targets, those shorter than T packed into rows.

    A window of documents, in the epoch's order, is packed at a time by best fit, longest first
    (Ding et al., arXiv 2404.10830), and its rows are shuffled. So the pieces of a long document
    are spread over its window, and few targets of a row are padding: the last rows' of a window.
    Nothing crosses the end of an epoch, in which every document is there once.

    The order is a permutation of all documents; of a large corpus of short ones it is one of units
    of neighbours, about 8192 tokens, so that what is read for one serves the others.
    """

    def __init__(self, split: Split, seq_len: int, *, window: int, seed: int | None) -> None:
        """Plans nothing yet.

        Args:
        split: the documents.
        seq_len: T.
        window: tokens that are packed together, at least those of one document.
        seed: order of documents and rows, another one in every epoch; None: one epoch, the
            documents in their order, rows shuffled in the same way always.
        """
        self._split, self._seq_len, self._window, self._seed = split, seq_len, window, seed
        count = len(split.documents)
        mean = -(-split.num_tokens // count)
        self._together = max(1, min(_NEIGHBOUR_TOKENS // mean, count // _FEWEST_UNITS))
        self._guess = 1 + window // (mean * self._together)
        self._planned: tuple[Cursor, Pieces, np.ndarray, Cursor | None] | None = None

    def take(self, cursor: Cursor | None, count: int) -> tuple[Pieces, Cursor | None, int]:
        taken: list[Pieces] = []
        done = 0
        while done < count and cursor is not None:
            pieces, bounds, after = self._plan(cursor)
            stop = min(cursor.row + count - done, len(bounds) - 1)
            part = pieces.select(slice(bounds[cursor.row], bounds[stop]))
            taken.append(part._replace(row=part.row + (done - cursor.row)))
            done += stop - cursor.row
            cursor = after if stop == len(bounds) - 1 else cursor._replace(row=stop)
        return _join(taken), cursor, done

    def _plan(self, cursor: Cursor) -> tuple[Pieces, np.ndarray, Cursor | None]:
        """All pieces of the window, where each row's begin among them, and the next window."""
        first = cursor._replace(row=0)
        if self._planned is None or self._planned[0] != first:
            documents, after = self._documents(first)
            text = self._split.text
            seed = (self._seed or 0, first.epoch, first.document)
            pieces, bounds = _pack(
                text.starts(documents), text.lengths(documents), self._seq_len, seed
            )
            self._planned = first, pieces, bounds, after
        return self._planned[1:]

    def _documents(self, cursor: Cursor) -> tuple[np.ndarray, Cursor | None]:
        """The documents of a window, whole units of neighbours, and the next window."""
        count, size = len(self._split.documents), self._together
        num_units = -(-count // size)
        found: list[np.ndarray] = []
        total, unit = 0, cursor.document // size
        while total < self._window and unit < num_units:
            units = np.arange(unit, min(unit + self._guess, num_units))
            if self._seed is not None:
                units = shuffled(units, num_units, (self._seed, cursor.epoch))
            sizes = np.minimum(size, count - units * size)
            documents = self._split.documents[ranges(units * size, sizes)].astype(np.int64)
            ends = np.cumsum(sizes)
            sums = total + np.cumsum(self._split.text.lengths(documents))[ends - 1]
            used = min(int(np.searchsorted(sums, self._window)) + 1, len(sums))
            found.append(documents[: ends[used - 1]])
            total, unit = int(sums[used - 1]), unit + used
        if unit < num_units:
            return np.concatenate(found), cursor._replace(document=unit * size)
        return np.concatenate(found), None if self._seed is None else Cursor(cursor.epoch + 1)


class ContiguousRows:
    """The split's token stream cut every T targets, whatever documents end there.

    A row is one segment: attention sees the documents before, as OLMo trains. Its order is shuffled
    over the whole epoch. The last row is filled up with padding.
    """

    def __init__(self, split: Split, seq_len: int, *, seed: int | None) -> None:
        """As `PackedRows`; `seed` None: one epoch, in order."""
        self._split, self._seq_len, self._seed = split, seq_len, seed
        lengths = split.text.lengths(np.asarray(split.documents, np.int64))
        self._ends = np.cumsum(lengths)
        self._num_rows = -(-int(self._ends[-1]) // seq_len)

    def take(self, cursor: Cursor | None, count: int) -> tuple[Pieces, Cursor | None, int]:
        taken: list[Pieces] = []
        done = 0
        while done < count and cursor is not None:
            stop = min(cursor.row + count - done, self._num_rows)
            rows = np.arange(cursor.row, stop)
            if self._seed is not None:
                rows = shuffled(rows, self._num_rows, (self._seed, cursor.epoch))
            part = self._pieces(rows)
            taken.append(part._replace(row=part.row + done))
            done += stop - cursor.row
            if stop < self._num_rows:
                cursor = cursor._replace(row=stop)
            else:
                cursor = None if self._seed is None else Cursor(cursor.epoch + 1)
        return _join(taken), cursor, done

    def _pieces(self, rows: np.ndarray) -> Pieces:
        begin = rows * self._seq_len
        end = np.minimum(begin + self._seq_len, self._ends[-1])
        first = np.searchsorted(self._ends, begin, side="right")
        last = np.searchsorted(self._ends, end, side="left")
        counts = last - first + 1
        place = ranges(first, counts)
        row = np.repeat(np.arange(len(rows)), counts)
        documents = np.asarray(self._split.documents[place], np.int64)
        lengths = self._split.text.lengths(documents)
        document_begin = self._ends[place] - lengths
        low = np.maximum(document_begin, begin[row])
        high = np.minimum(self._ends[place], end[row])
        return Pieces(
            start=self._split.text.starts(documents) + low - document_begin,
            length=high - low,
            is_first=low == document_begin,
            row=row,
            column=low - begin[row],
            segment=np.ones(len(row), np.int64),
        )


def _pack(starts: np.ndarray, lengths: np.ndarray, seq_len: int, seed: Any):
    """(pieces in the order of shuffled rows, [R + 1] where each row's begin)."""
    rng = np.random.default_rng(seed)
    shuffle = rng.permutation(len(starts))  # documents of one length have no order
    starts, lengths = starts[shuffle], lengths[shuffle]
    counts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), counts)
    offset = ranges(np.zeros(len(counts), np.int64), counts) * seq_len
    length = np.minimum(lengths[document] - offset, seq_len)
    short = np.flatnonzero(length < seq_len)
    row = np.empty(len(length), np.int64)
    column = np.zeros(len(length), np.int64)
    row[short], column[short], num_rows = best_fit_decreasing(length[short], seq_len)
    full = np.flatnonzero(length == seq_len)
    row[full] = num_rows + np.arange(len(full))
    num_rows += len(full)
    row = rng.permutation(num_rows)[row]
    order = np.lexsort((column, row))
    row, column = row[order], column[order]
    bounds = np.searchsorted(row, np.arange(num_rows + 1))
    pieces = Pieces(
        start=starts[document[order]] + offset[order],
        length=length[order],
        is_first=offset[order] == 0,
        row=row,
        column=column,
        segment=np.arange(len(row)) - bounds[row] + 1,
    )
    return pieces, bounds


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Packs items by best fit, longest first.

    Args:
        lengths: [n], 1 to `capacity`.
        capacity: of a row.

    Returns:
        The row and the column of each item, [n], and the number of rows.
    """
    row, column = np.empty((2, len(lengths)), np.int64)
    order = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: a row with room r is open
    num_rows = 0
    for item in order:
        size = sizes[item]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            open_rows = rows_by_room[room]
            place = open_rows.pop()
            if not open_rows:
                rooms ^= 1 << room
        else:
            room, place = capacity, num_rows
            num_rows += 1
        row[item], column[item] = place, capacity - room
        if room > size:
            rows_by_room[room - size].append(place)
            rooms |= 1 << (room - size)
    return row, column, num_rows


def _join(parts: list[Pieces]) -> Pieces:
    if not parts:
        return Pieces(*(np.zeros(0, np.int64) for _ in Pieces._fields))
    return Pieces(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class Rows:
    """Batch arrays that are filled piece by piece."""

    def __init__(self, num_rows: int, seq_len: int) -> None:
        shape = num_rows, seq_len
        names = ("tokens", "targets", "segment_ids", "positions")
        self.batch: Batch = {name: np.zeros(shape, np.int32) for name in names}
        self.skipped = 0
        """Pieces that could not be read."""
        self._seq_len = seq_len

    def fill(self, text: PreparedText, pieces: Pieces, *, skip_unreadable: bool) -> None:
        """Reads the tokens of `pieces` and puts them in place.

        Raises UnreadableBlockError, unless such pieces are to be skipped: they stay padding.
        """
        while len(pieces.start):
            before = (~pieces.is_first).astype(np.int64)  # the first input, where it is no eos
            starts, lengths = pieces.start - before, pieces.length + before
            try:
                tokens = text.read(starts, lengths)
            except UnreadableBlockError as error:
                if not skip_unreadable:
                    raise
                lost = text.unreadable(starts, lengths, error.block)
                self.skipped += int(lost.sum())
                pieces = pieces.select(~lost)
                continue
            self._place(text, pieces, before, tokens)
            return

    def _place(
        self, text: PreparedText, pieces: Pieces, before: np.ndarray, tokens: np.ndarray
    ) -> None:
        if (largest := int(tokens.max())) >= text.vocab_size:
            begin = np.cumsum(pieces.length + before) - pieces.length - before
            bad = int(np.searchsorted(begin, int(tokens.argmax()), side="right")) - 1
            raise ValueError(
                f"{text.name(int(pieces.start[bad]))}: expected token ids in [0, "
                f"{text.vocab_size}), got {largest}; prepare the text again"
            )
        length = pieces.length
        where = ranges(pieces.row * self._seq_len + pieces.column, length)
        # The flat array has every piece's first input before its targets, if that is no eos.
        target = ranges(np.cumsum(length + before) - length, length)
        first = np.cumsum(length) - length
        inputs = tokens[target - 1]  # of a document's first piece: overwritten
        inputs[first[pieces.is_first]] = text.eos_id
        flat = {name: array.reshape(-1) for name, array in self.batch.items()}
        flat["tokens"][where] = inputs
        flat["targets"][where] = tokens[target]
        flat["segment_ids"][where] = np.repeat(pieces.segment, length)
        flat["positions"][where] = where % self._seq_len
        flat["positions"][where] -= np.repeat(self._origin(pieces), length).astype(np.int32)

    def _origin(self, pieces: Pieces) -> np.ndarray:
        """The column at which a piece's segment begins, whose positions count from there."""
        return np.where(pieces.segment == 1, 0, pieces.column)
