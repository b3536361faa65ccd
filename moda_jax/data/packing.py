"""Documents to packed rows, with grain: pieces, dealt in turn, then first fit into rows of T.

A document of n tokens becomes [eos] + tokens + [eos], cut into pieces of at most T inputs that
overlap by one token, so that each of its n + 1 targets is predicted exactly once. A batch is a dict
of int32 arrays [B, T]: `tokens`, `targets`, `segment_ids` (1, 2, ... for the pieces of a row, 0 for
padding) and `positions` (from 0 in each piece).
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from moda_jax.config import DataConfig

Batch = dict[str, np.ndarray]
Piece = dict[str, np.ndarray]


class Pieces:
    """A document's pieces in the order in which they are dealt, made one at a time."""

    def __init__(self, tokens: np.ndarray, seq_len: int, rng: np.random.Generator) -> None:
        """From the n + 2 tokens of a document; no pieces for text without tokens."""
        self._tokens, self._seq_len = tokens, seq_len
        num_targets = len(tokens) - 1 if len(tokens) > 2 else 0
        self._order = rng.permutation(-(-num_targets // seq_len))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Piece:
        """A piece [<= T, 2] of (input, target) pairs, int32.

        They travel as pairs, since packing costs per feature and piece.
        """
        start = int(self._order[index]) * self._seq_len
        tokens = self._tokens[start : start + self._seq_len + 1].astype(np.int32)
        return {"pairs": np.stack([tokens[:-1], tokens[1:]], axis=1)}


class DealtPieces(grain.IterDataset[Piece]):
    """Pieces of `open_documents` documents at a time, one of each in turn.

    A piece is a context of its own, so nothing is lost by taking those of a document in a random
    order and far apart, while the pieces of a long one, together, would fill whole batches. When a
    document is used up, the next one takes its place.
    """

    def __init__(
        self, documents: grain.MapDataset, *, seq_len: int, open_documents: int, seed: int
    ) -> None:
        super().__init__()
        self.documents, self.open_documents = documents, open_documents
        self._seq_len, self._seed = seq_len, seed

    def __iter__(self) -> "_DealtPiecesIterator":
        return _DealtPiecesIterator(self)

    def shuffled_pieces(self, number: int) -> Pieces:
        """The pieces of document `number` (counted over all epochs), in their order."""
        rng = np.random.default_rng((self._seed, number))
        return Pieces(self.documents[number], self._seq_len, rng)


class _DealtPiecesIterator(grain.DatasetIterator[Piece]):
    """Its state is whose turn it is, and of every open document how many pieces are gone."""

    def __init__(self, dataset: DealtPieces) -> None:
        super().__init__()
        self._dataset = dataset
        self._next = self._turn = 0
        self._open: list[list[Any]] = []  # [number or None, pieces gone]
        self._pieces: list[Sequence[Piece] | Pieces] = []
        self.set_state({"next": 0, "turn": 0, "open": [[None, 0]] * dataset.open_documents})

    def __next__(self) -> Piece:
        for _ in self._open:
            turn = self._turn
            self._turn = (turn + 1) % len(self._open)
            while self._is_used_up(turn) and self._next < len(self._dataset.documents):
                self._open[turn] = [self._next, 0]
                self._pieces[turn] = self._read(self._next)
                self._next += 1
            if not self._is_used_up(turn):
                number, gone = self._open[turn]
                self._open[turn] = [number, gone + 1]
                return self._pieces[turn][gone]
        raise StopIteration

    def _is_used_up(self, turn: int) -> bool:
        return self._open[turn][1] == len(self._pieces[turn])

    def _read(self, number: int | None) -> Sequence[Piece] | Pieces:
        return [] if number is None else self._dataset.shuffled_pieces(number)

    def get_state(self) -> dict[str, Any]:
        return {"next": self._next, "turn": self._turn, "open": [list(x) for x in self._open]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next, self._turn = state["next"], state["turn"]
        self._open = [list(x) for x in state["open"]]
        self._pieces = [self._read(number) for number, _ in self._open]


def _make_batch(rows: Sequence[dict[str, np.ndarray]], *, batch_size: int) -> Batch:
    """Stacks packed rows; missing ones become rows of padding."""
    empty = {name: np.zeros_like(array) for name, array in rows[0].items()}
    rows = [*rows, *[empty] * (batch_size - len(rows))]
    pairs_BxTx2 = np.stack([row["pairs"] for row in rows])
    return {
        "tokens": np.ascontiguousarray(pairs_BxTx2[..., 0]),
        "targets": np.ascontiguousarray(pairs_BxTx2[..., 1]),
        "segment_ids": np.stack([row["pairs_segment_ids"] for row in rows]),
        "positions": np.stack([row["pairs_positions"] for row in rows]),
    }


def pack(
    documents: grain.MapDataset,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    num_documents: int,
) -> grain.IterDataset[Batch]:
    """Tokens of documents, `num_documents` an epoch -> batches of packed rows; `seed` decides all.

    Reading in the thread that calls keeps one order and one state.
    """
    pieces = DealtPieces(
        documents,
        seq_len=config.seq_len,
        open_documents=min(config.open_documents, num_documents),
        seed=seed,
    )
    rows = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={"pairs": config.seq_len},
        num_packing_bins=config.packing_bins,
        seed=seed,
        shuffle_bins=True,
    )
    return rows.batch(batch_size, batch_fn=lambda rows: _make_batch(rows, batch_size=batch_size))
