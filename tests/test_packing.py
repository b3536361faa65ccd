"""Batches: every target once, in an order that the seed decides; exact resumption."""

import collections
import itertools
import json

import numpy as np
import pytest

from moda_jax.data.packing import Pieces
from tests.corpora import (
    assert_batches_equal,
    expected_pieces,
    held_out_texts,
    load,
    make_texts,
    pieces_of,
    take,
    write_folder,
)


@pytest.fixture
def texts():
    return make_texts(40)


@pytest.fixture
def source(tmp_path, texts):
    return write_folder(tmp_path / "corpus", texts)


def test_validation_holds_every_target_of_its_documents_once(source, texts):
    data = load(source)
    batches = list(data.validation(10**6))
    pieces = collections.Counter(itertools.chain(*map(pieces_of, batches)))
    held_out = held_out_texts(data, texts)
    assert len(held_out) == data.validation_documents > 3
    assert pieces == collections.Counter(expected_pieces(held_out))


def test_pieces_by_hand():
    """Five pairs in rows of four: the last token is predicted, too, in a piece of its own."""
    dealt = Pieces(np.arange(6), 4, np.random.default_rng(0))
    assert sorted(dealt[i]["pairs"].tolist() for i in range(len(dealt))) == [
        [[0, 1], [1, 2], [2, 3], [3, 4]],
        [[4, 5]],
    ]


def test_rows_are_numbered_and_padded_with_zeros(source):
    for batch in take(load(source).train, 20):
        assert {array.shape for array in batch.values()} == {(4, 16)}
        for segments, positions in zip(batch["segment_ids"], batch["positions"], strict=True):
            used = np.count_nonzero(segments)
            starts = np.flatnonzero(np.diff(segments[:used], prepend=0))
            np.testing.assert_array_equal(segments[starts], np.arange(1, len(starts) + 1))
            lengths = np.diff([*starts, used])
            np.testing.assert_array_equal(
                positions[:used], np.concatenate([np.arange(n) for n in lengths])
            )
        for name, array in batch.items():
            assert not array[batch["segment_ids"] == 0].any(), name


def test_an_epoch_holds_every_training_document_once_in_a_new_order(tmp_path):
    # Each document fills one row exactly and one row is open at a time: rows are documents.
    texts = [f"{i:015d}" for i in range(30)]
    data = load(write_folder(tmp_path, texts), batch_size=1, packing_bins=1)
    epochs = [
        [pieces_of(batch)[0] for batch in take(data.train, data.train_documents)] for _ in range(3)
    ]
    training = set(texts) - held_out_texts(data, texts)
    for epoch in epochs:
        assert sorted(epoch) == sorted(expected_pieces(training))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_long_document_does_not_fill_batches(tmp_path):
    """One of its pieces comes per round of the 40 open documents, and not in their order."""
    long = "".join(chr(33 + i % 90) for i in range(800))  # 51 pieces; the others have 10
    texts = [*(f"{i:02d}" + "x" * 150 for i in range(40)), long]
    data = load(write_folder(tmp_path, texts), batch_size=8, validation_fraction=1e-9)
    place = {piece: n for n, piece in enumerate(expected_pieces([long]))}
    found = [
        [place[piece] for piece in pieces_of(batch) if piece in place]
        for batch in take(data.train, 10 * 40 // 8)
    ]
    order = list(itertools.chain(*found))
    assert max(map(len, found)) <= 2
    assert len(set(order)) == len(order) >= 8
    assert np.abs(np.diff(order)).mean() > 5


def test_order_follows_the_seed(source):
    first, same, other = (take(load(source, seed=seed).train, 10) for seed in (3, 3, 4))
    for a, b in zip(first, same, strict=True):
        assert_batches_equal(a, b)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("stop", [0, 1, 2, 7, 40])
def test_restored_iterator_continues_bitwise(source, stop):
    """Batches of 3 rows end inside the 4 rows that are packed together; 40 batches pass epochs."""
    uninterrupted = load(source, batch_size=3).train
    take(uninterrupted, stop)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    expected = take(uninterrupted, 15)
    fresh = load(source, batch_size=3).train
    take(fresh, 5)
    for train in (fresh, uninterrupted):
        train.set_state(state)
        assert train.get_state() == state
        for a, b in zip(take(train, 15), expected, strict=True):
            assert_batches_equal(a, b)


def test_restore_inside_a_document_longer_than_the_open_rows(tmp_path):
    texts = [*make_texts(6), "x" * 500 + "y" * 500]
    source = write_folder(tmp_path, texts)
    train = load(source, batch_size=1).train
    states, batches = [], []
    for _ in range(90):
        states.append(train.get_state())
        batches.append(next(train))
    for stop in range(0, 80, 7):
        train.set_state(states[stop])
        for a, b in zip(take(train, 5), batches[stop : stop + 5], strict=True):
            assert_batches_equal(a, b)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seq_len": 8}, "seq_len"),
        ({"seed": 1}, "seed"),
        ({"packing_bins": 2}, "packing_bins"),
        ({"open_documents": 3}, "open_documents"),
        ({"batch_size": 8}, "batch_size"),
    ],
)
def test_state_of_other_settings_is_refused(source, change, name):
    state = load(source).train.get_state()
    with pytest.raises(ValueError, match=rf"expected the checkpoint's {name} = .*new run"):
        load(source, **change).train.set_state(state)


def test_state_of_other_documents_is_refused(tmp_path, texts):
    state = load(write_folder(tmp_path / "a", texts)).train.get_state()
    more = write_folder(tmp_path / "b", make_texts(50))
    with pytest.raises(ValueError, match="expected the training documents that the run"):
        load(more).train.set_state(state)
