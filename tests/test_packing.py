"""Batches: every target once, in an order that the seed decides; exact resumption."""

import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moda_jax.data.packing import best_fit_decreasing
from moda_jax.data.shuffle import shuffled
from tests.corpora import (
    EOS,
    FUZZ,
    assert_batches_equal,
    expected_pieces,
    held_out_texts,
    joined,
    load,
    make_texts,
    pieces_of,
    take,
    write_folder,
    write_jsonl,
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
    assert len(held_out) == data.sources[0].validation_documents > 3
    assert pieces == collections.Counter(expected_pieces(held_out))


def test_pieces_by_hand(tmp_path):
    """Five targets in rows of four: the last token is predicted, too, in a piece of its own."""
    text = write_jsonl(tmp_path / "x.jsonl", ["abcd"])
    data = load(text, validation=text, seq_len=4)
    (batch,) = data.validation(2)
    assert sorted(pieces_of(batch)) == [(100, EOS), (EOS, 97, 98, 99, 100)]


def test_contiguous_rows_by_hand(tmp_path):
    """The stream abc$de$ in rows of three; what comes before a row's first target is its input."""
    text = write_jsonl(tmp_path / "x.jsonl", ["abc", "de"])
    data = load(text, validation=text, seq_len=3, packing="contiguous")
    (batch,) = data.validation(2)
    stream = [*b"abc", EOS, *b"de", EOS]
    if batch["targets"][0, 0] == ord("d"):  # documents come in the order of their hashes
        stream = [*b"de", EOS, *b"abc", EOS]
    np.testing.assert_array_equal(batch["targets"].ravel()[:7], stream)
    np.testing.assert_array_equal(batch["tokens"].ravel()[:7], [EOS, *stream[:-1]])
    np.testing.assert_array_equal(batch["segment_ids"].ravel(), [1] * 7 + [0] * 5)
    np.testing.assert_array_equal(batch["positions"].ravel()[:7], [0, 1, 2, 0, 1, 2, 0])


def test_contiguous_rows_hold_every_token_once_an_epoch(source, texts):
    data = load(source, packing="contiguous", batch_size=1)
    rows = -(-data.train_tokens // 16)
    epochs = [take(data.train, rows) for _ in range(2)]
    training = sorted(set(texts) - held_out_texts(load(source), texts))
    wanted = collections.Counter("".join(training).encode()) + collections.Counter(
        {EOS: len(training)}
    )
    orders = []
    for epoch in epochs:
        targets = np.concatenate([b["targets"][b["segment_ids"] > 0] for b in epoch])
        assert collections.Counter(targets.tolist()) == wanted
        orders.append([b["targets"].tobytes() for b in epoch])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


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
    texts = [f"{i:015d}" for i in range(30)]  # each fills a row exactly: rows are documents
    data = load(write_folder(tmp_path, texts), batch_size=1)
    count = data.sources[0].train_documents
    epochs = [[pieces_of(batch)[0] for batch in take(data.train, count)] for _ in range(3)]
    training = set(texts) - held_out_texts(data, texts)
    for epoch in epochs:
        assert sorted(epoch) == sorted(expected_pieces(training))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("window", [1, 300, 10**9])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_document_once_an_epoch_over_processes_and_windows(source, texts, window, count):
    settings = {"batch_size": 4, "shuffle_tokens": window}
    parts = [load(source, **settings, process_index=i, process_count=count) for i in range(count)]
    pieces = collections.Counter()
    wanted = collections.Counter(expected_pieces(set(texts) - held_out_texts(load(source), texts)))
    while sum(pieces.values()) < 3 * sum(wanted.values()):
        pieces.update(pieces_of(joined([next(part.train) for part in parts])))
    # Three epochs are over, and the batch that ended them may have begun a fourth.
    assert set(pieces) == set(wanted)
    for piece, times in pieces.items():
        assert 3 * wanted[piece] <= times <= 4 * wanted[piece]


def test_a_long_document_does_not_fill_batches(tmp_path):
    """Its pieces are spread over the window, and not in their order."""
    characters = np.random.default_rng(0).integers(33, 127, 800)
    long = "".join(map(chr, characters))  # 51 pieces; the others have 10
    texts = [*(f"{i:02d}" + "x" * 150 for i in range(40)), long]
    data = load(write_folder(tmp_path, texts), batch_size=8, validation_fraction=1e-9)
    place = {piece: n for n, piece in enumerate(expected_pieces([long]))}
    found = [
        [place[piece] for piece in pieces_of(batch) if piece in place]
        for batch in take(data.train, 51)
    ]
    order = list(itertools.chain(*found))
    assert max(map(len, found)) <= 5
    assert len(set(order)) == len(order) >= 40
    assert np.abs(np.diff(order)).mean() > 5


def test_order_follows_the_seed(source):
    first, same, other = (take(load(source, seed=seed).train, 10) for seed in (3, 3, 4))
    for a, b in zip(first, same, strict=True):
        assert_batches_equal(a, b)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("packing", ["documents", "contiguous"])
@pytest.mark.parametrize("stop", [0, 1, 2, 7, 40])
def test_restored_iterator_continues_bitwise(source, stop, packing):
    """Batches of 3 rows end inside the rows that are packed together; 40 batches pass epochs."""
    settings = {"batch_size": 3, "packing": packing, "shuffle_tokens": 300}
    uninterrupted = load(source, **settings).train
    take(uninterrupted, stop)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    expected = take(uninterrupted, 15)
    fresh = load(source, **settings).train
    take(fresh, 5)
    for train in (fresh, uninterrupted):
        train.set_states([state])
        assert train.get_state() == state
        for a, b in zip(take(train, 15), expected, strict=True):
            assert_batches_equal(a, b)


def test_another_number_of_processes_and_another_batch_size_go_on_in_the_order(source):
    """Saved by two processes at 8 rows a step, continued by one at 4 and by four at 8."""
    two = [load(source, batch_size=8, process_index=i, process_count=2).train for i in range(2)]
    for part in two:
        take(part, 5)
    states = [part.get_state() for part in two]
    expected = [joined([next(part) for part in two]) for _ in range(6)]
    one = load(source, batch_size=4).train
    one.set_states(states)
    four = [load(source, batch_size=8, process_index=i, process_count=4).train for i in range(4)]
    for part in four:
        part.set_states(states)
    for batch in expected:
        assert_batches_equal(joined([next(one), next(one)]), batch)
        assert_batches_equal(joined([next(part) for part in four]), batch)


def test_restore_inside_a_document_longer_than_the_batches(tmp_path):
    texts = [*make_texts(6), "x" * 500 + "y" * 500]
    train = load(write_folder(tmp_path, texts), batch_size=1).train
    states, batches = [], []
    for _ in range(90):
        states.append(train.get_state())
        batches.append(next(train))
    for stop in range(0, 80, 7):
        train.set_states([states[stop]])
        for a, b in zip(take(train, 5), batches[stop : stop + 5], strict=True):
            assert_batches_equal(a, b)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seq_len": 8}, "seq_len"),
        ({"seed": 1}, "seed"),
        ({"packing": "contiguous"}, "packing"),
        ({"shuffle_tokens": 3}, "shuffle_tokens"),
    ],
)
def test_state_of_other_settings_is_refused(source, change, name):
    state = load(source).train.get_state()
    with pytest.raises(ValueError, match=rf"expected the checkpoint's {name} = .*new run"):
        load(source, **change).train.set_states([state])


def test_state_of_other_documents_is_refused(tmp_path, texts):
    state = load(write_folder(tmp_path / "a", texts)).train.get_state()
    more = write_folder(tmp_path / "b", make_texts(50))
    with pytest.raises(ValueError, match="expected the training documents that the run"):
        load(more).train.set_states([state])


@FUZZ
@given(st.lists(st.integers(1, 16), max_size=60), st.integers(16, 40))
def test_rows_are_never_too_full(lengths, capacity):
    row, column, num_rows = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    used = np.zeros((num_rows, capacity), np.int64)
    for r, c, length in zip(row, column, lengths, strict=True):
        assert c + length <= capacity
        used[r, c : c + length] += 1
    assert used.max(initial=0) <= 1
    assert used.sum() == sum(lengths)
    # All rows but one are at least half full, as of any two that are not, one holds both's items.
    assert num_rows <= 2 * sum(lengths) / capacity + 1


def test_best_fit_by_hand():
    """5 and 4 open rows; 3 fits best beside 5 (a room of 3), 2 and 2 beside 4."""
    row, column, num_rows = best_fit_decreasing(np.array([2, 5, 3, 4, 2]), 8)
    assert num_rows == 2
    assert row[1] == row[2] != row[3] == row[0] == row[4]
    assert column[[1, 2, 3]].tolist() == [0, 5, 0]


@FUZZ
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 3))
def test_a_shuffle_is_a_permutation(length, seed, epoch):
    places = shuffled(np.arange(length), length, (seed, epoch))
    assert np.array_equal(np.sort(places), np.arange(length))
    if length > 1:  # element by element as all at once
        assert shuffled(np.array([length - 1]), length, (seed, epoch))[0] == places[-1]


def test_a_shuffle_leaves_no_trace_of_the_order():
    """Means over blocks of a uniform permutation of n lie within 5 standard errors of n / 2."""
    length = 100_000
    places = shuffled(np.arange(length), length, (0, 0))
    means = places.reshape(100, -1).mean(axis=1)
    error = length / np.sqrt(12 * 1000)
    assert np.abs(means - length / 2).max() < 5 * error
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02
    other = shuffled(np.arange(length), length, (0, 1))
    assert (other == places).mean() < 1e-3
