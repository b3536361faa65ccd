"""The split, the share of each process, the tokenizer's fit, and the thread that prefetches."""

import itertools
import subprocess
import sys
import threading
import tracemalloc
import types

import numpy as np
import pytest
import tokenizers

import moda_jax.data.loader
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


def test_processes_read_disjoint_documents(source, texts):
    """T holds a whole document, so a piece names its document."""
    whole = load(source, seq_len=64)
    parts = [
        load(source, seq_len=64, batch_size=6, process_index=i, process_count=3) for i in range(3)
    ]
    seen = []
    for part in parts:
        batches = take(part.train, 30)
        assert {batch["tokens"].shape for batch in batches} == {(2, 64)}
        seen.append(set(itertools.chain(*map(pieces_of, batches))))
    for a, b in itertools.combinations(seen, 2):
        assert a.isdisjoint(b)
    training = set(texts) - held_out_texts(whole, texts, 64)
    assert set.union(*seen) == set(expected_pieces(training, 64))


def test_validation_does_not_depend_on_the_number_of_processes(source):
    whole = list(load(source, batch_size=6).validation(3))
    parts = [
        list(load(source, batch_size=6, process_index=i, process_count=3).validation(3))
        for i in range(3)
    ]
    assert len(whole) == 3
    for batch, *local in zip(whole, *parts, strict=True):
        joined = {name: np.concatenate([part[name] for part in local]) for name in batch}
        assert_batches_equal(joined, batch)


def test_validation_repeats_itself_and_ends_with_padding(source):
    data = load(source, batch_size=7)
    first, second = list(data.validation(10**6)), list(data.validation(10**6))
    for a, b in zip(first, second, strict=True):
        assert_batches_equal(a, b)
    assert {batch["tokens"].shape for batch in first} == {(7, 16)}
    padded = [int((batch["segment_ids"].max(axis=1) == 0).sum()) for batch in first]
    assert padded[-1] > 0
    assert not any(padded[:-1])
    (only,) = data.validation(1)
    assert_batches_equal(only, first[0])
    with pytest.raises(ValueError, match="num_batches: expected a positive number, got 0"):
        list(data.validation(0))


def test_split_by_hand():
    """Of the hashes 9, 2, 6 and 1 sixteenths, those below 0.3 are held out, smallest first."""
    digests = np.array([9, 2, 6, 1], np.uint64) << np.uint64(60)
    corpus = types.SimpleNamespace(digests=digests)
    train, held_out = moda_jax.data.loader._split(corpus, 0.3)
    assert (train.tolist(), held_out.tolist()) == ([0, 2], [3, 1])


def test_split_stays_when_documents_come_and_keeps_equal_ones_together(tmp_path, texts):
    few = load(write_folder(tmp_path / "few", texts), seq_len=64)
    more_texts = [*make_texts(30, seed=9, longest=50), *texts, *texts]
    more = load(write_folder(tmp_path / "more", more_texts), seq_len=64)
    before, after = held_out_texts(few, texts, 64), held_out_texts(more, texts, 64)
    assert before == after
    assert len(before) == few.validation_documents
    trained = set(itertools.chain(*map(pieces_of, take(more.train, 200))))
    assert trained.isdisjoint(expected_pieces(before, seq_len=64))
    assert trained.issuperset(expected_pieces(set(texts) - before, seq_len=64))


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_parts_get_a_document(tmp_path, fraction):
    data = load(write_folder(tmp_path, ["one", "two"]), validation_fraction=fraction)
    assert (data.train_documents, data.validation_documents) == (1, 1)
    assert len(list(data.validation(5))) == 1
    assert len(take(data.train, 5)) == 5


def test_sizes_are_exact_for_bytes(source, texts):
    data = load(source)
    held_out = held_out_texts(data, texts)
    training = [text for text in texts if text not in held_out]
    assert data.tokens_exact
    assert data.train_documents == len(training)
    assert data.train_tokens == sum(len(text.encode()) + 1 for text in training)
    assert data.num_bytes == sum(len(text.encode()) for text in texts)
    assert f"{len(training)} documents, {data.train_tokens} tokens an epoch" in data.describe()


@pytest.fixture
def word_tokenizer(tmp_path):
    """A tokenizer.json that knows the words w0 ... w98 and ends documents with id 0."""
    vocab = {"<eos>": 0, **{f"w{i}": i + 1 for i in range(99)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def test_tokenizer_json(tmp_path, word_tokenizer):
    texts = [" ".join(f"w{(i * j) % 99}" for j in range(5 + i)) for i in range(40)]
    data = load(write_folder(tmp_path / "c", texts), tokenizer=word_tokenizer, vocab_size=100)
    tokens = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in take(data.train, 40)])
    assert set(tokens.tolist()) <= set(range(100))
    assert 0 in tokens
    assert not data.tokens_exact
    held_out = np.concatenate([b["segment_ids"].ravel() for b in data.validation(10**6)])
    exact = sum(len(text.split()) + 1 for text in texts) - np.count_nonzero(held_out)
    assert data.train_tokens == pytest.approx(exact, rel=0.1)  # a sample of the documents
    assert "about" in data.describe()


def test_tokenizer_larger_than_the_model(source, word_tokenizer):
    with pytest.raises(ValueError, match=r"at most model\.vocab_size = 99 tokens, got 100.*set --"):
        load(source, tokenizer=word_tokenizer, vocab_size=99)
    with pytest.raises(ValueError, match=r"at most model\.vocab_size = 256 tokens, got 257"):
        load(source, vocab_size=256)


def test_tokenizer_that_knows_no_character(source, tmp_path):
    """Without this error the search for a training token would never end."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "empty.json"))
    with pytest.raises(ValueError, match="expected tokens from the documents, got none"):
        load(source, tokenizer=str(tmp_path / "empty.json"))


def test_tokenizer_that_cannot_encode(source, word_tokenizer):
    with pytest.raises(ValueError, match=r"cannot encode .*UNK.*use a tokenizer that"):
        load(source, tokenizer=word_tokenizer)


def test_ids_outside_the_vocabulary_name_the_document(tmp_path, monkeypatch):
    texts = ["東", "東京"]
    source = write_folder(tmp_path, texts)
    truthful = held_out_texts(load(source, vocab_size=300), texts)

    class Lying(moda_jax.data.loader.ByteTokenizer):
        def encode_document(self, text):
            if text in truthful:
                return super().encode_document(text)
            return np.array([256, *map(ord, text), 256], np.uint32)

    monkeypatch.setattr(moda_jax.data.loader, "load_tokenizer", lambda *_: Lying())
    data = load(source, vocab_size=300)
    message = (
        r"expected token ids in \[0, 300\), got (26481|20140) in .*\.txt; raise --model\.vocab-size"
    )
    with pytest.raises(ValueError, match=message):
        take(data.train, 5)
    truthful.clear()
    with pytest.raises(ValueError, match=message):  # held-out documents are read at the start
        load(source, vocab_size=300)


def test_a_long_document_takes_few_bytes_a_token(tmp_path):
    """Read, encoded and dealt in pieces; as a list of integers it took 20 bytes a token."""
    long = 10**6
    source = write_folder(tmp_path, ["a line of text\n" * (long // 15), "b" * long])
    tracemalloc.start()
    try:
        take(load(source, seq_len=256).train, 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * long


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 3, "process_count": 2}, "multiple of the 2 processes, got 3"),
        ({"batch_size": 0}, "batch_size: expected a positive multiple"),
        ({"seed": -1}, r"seed: expected 0 <= seed < 2\*\*32, got -1"),
        ({"batch_size": 99, "process_count": 99}, "a training document for each of the 99"),
    ],
)
def test_bad_arguments(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(source, **arguments)


def test_close_stops_the_thread(source):
    before = threading.active_count()
    data = load(source)
    next(data.train)
    assert threading.active_count() == before + 1
    data.train.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="expected an open iterator"):
        next(data.train)


def test_a_script_that_never_closes_its_data_exits_silently(source):
    code = (
        "import sys; from moda_jax.config import DataConfig;"
        "from moda_jax.data.loader import load_data;"
        "data = load_data(DataConfig(source=sys.argv[1]), batch_size=2, vocab_size=257, seed=0);"
        "next(data.train)"
    )
    command = [sys.executable, "-W", "error", "-c", code, source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_held_out_documents_without_tokens(tmp_path):
    """Said at the start, not at the first validation."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    tokenizer.add_special_tokens(["<eos>"])
    path = tmp_path / "a.json"
    tokenizer.save(str(path))
    texts = ["a" * n for n in (4, 8, 11)] + ["b" * 19]  # which has the smallest hash
    with pytest.raises(ValueError, match="expected tokens in the documents held out .* none in 1;"):
        load(write_folder(tmp_path / "c", texts), tokenizer=str(path), validation_fraction=1e-9)


@pytest.mark.parametrize("is_held_out", [False, True])
def test_a_text_edited_under_a_run_is_noticed(tmp_path, texts, is_held_out):
    """By the run that reads it next, and by one that goes on; the length stays as it was."""
    folder = write_folder(tmp_path, texts)
    data = load(folder)
    state = data.train.get_state()
    edited = next(text for text in texts if (text in held_out_texts(data, texts)) == is_held_out)
    for path in tmp_path.rglob("*.txt"):
        if path.read_text() == edited:
            path.write_text(edited[:-1] + "~")
    with pytest.raises(ValueError, match="expected .*txt as it was when the run started"):
        take(data.validation(10**6) if is_held_out else data.train, 1000)
    data.train.close()
    again = load(folder)
    expected = (
        "data: expected the (training|held-out) documents that the run began with .* were edited"
    )
    with pytest.raises(ValueError, match=expected) as caught:
        again.train.set_state(state)
    assert "\n" not in str(caught.value)
    again.train.close()
