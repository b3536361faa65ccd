"""The split, the rows of each process, the tokenizer's fit, and the thread that prefetches."""

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
import tokenizers

import moda_jax.data.prepared
from tests.corpora import (
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


@pytest.mark.parametrize("packing", ["documents", "contiguous"])
@pytest.mark.parametrize("count", [2, 4])
def test_every_process_count_gives_the_same_global_batches(source, packing, count):
    whole = load(source, batch_size=8, packing=packing)
    parts = [
        load(source, batch_size=8, packing=packing, process_index=i, process_count=count)
        for i in range(count)
    ]
    for batch, *local in zip(
        take(whole.train, 40), *(take(part.train, 40) for part in parts), strict=True
    ):
        assert {len(part["tokens"]) for part in local} == {8 // count}
        assert_batches_equal(joined(local), batch)


def test_validation_does_not_depend_on_the_number_of_processes(source):
    whole = list(load(source, batch_size=6).validation(3))
    parts = [
        list(load(source, batch_size=6, process_index=i, process_count=3).validation(3))
        for i in range(3)
    ]
    assert len(whole) == 3
    for batch, *local in zip(whole, *parts, strict=True):
        assert_batches_equal(joined(local), batch)


def test_validation_repeats_itself_and_ends_with_padding(source):
    data = load(source, batch_size=9)
    first, second = list(data.validation(10**6)), list(data.validation(10**6))
    for a, b in zip(first, second, strict=True):
        assert_batches_equal(a, b)
    assert {batch["tokens"].shape for batch in first} == {(9, 16)}
    padded = [int((batch["segment_ids"].max(axis=1) == 0).sum()) for batch in first]
    assert padded[-1] > 0
    assert not any(padded[:-1])
    (only,) = data.validation(1)
    assert_batches_equal(only, first[0])
    with pytest.raises(ValueError, match="num_batches: expected a positive number, got 0"):
        list(data.validation(0))


def test_split_by_hand():
    """Of the hashes 9, 2, 6 and 1 sixteenths, those below 0.3 are held out."""
    digests = np.array([9, 2, 6, 1], np.uint64) << np.uint64(60)
    held_out = moda_jax.data.prepared._held_out(digests, 0.3)
    assert held_out.tolist() == [False, True, False, True]


def test_split_stays_when_documents_come_and_keeps_equal_ones_together(tmp_path, texts):
    few = load(write_folder(tmp_path / "few", texts), seq_len=64)
    more_texts = [*make_texts(30, seed=9, longest=50), *texts, *texts]
    more = load(write_folder(tmp_path / "more", more_texts), seq_len=64)
    before, after = held_out_texts(few, texts, 64), held_out_texts(more, texts, 64)
    assert before == after
    assert len(before) == few.sources[0].validation_documents
    trained = set(itertools.chain(*map(pieces_of, take(more.train, 200))))
    assert trained.isdisjoint(expected_pieces(before, seq_len=64))
    assert trained.issuperset(expected_pieces(set(texts) - before, seq_len=64))


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_parts_get_a_document(tmp_path, fraction):
    data = load(write_folder(tmp_path, ["one", "two"]), validation_fraction=fraction)
    assert (data.sources[0].train_documents, data.sources[0].validation_documents) == (1, 1)
    assert len(list(data.validation(5))) == 1
    assert len(take(data.train, 5)) == 5


def test_sizes_are_exact_for_bytes(source, texts):
    data = load(source)
    held_out = held_out_texts(data, texts)
    training = [text for text in texts if text not in held_out]
    assert data.sources[0].train_documents == len(training)
    assert data.train_tokens == sum(len(text.encode()) + 1 for text in training)
    assert data.sources[0].num_bytes == sum(len(text.encode()) for text in texts)
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
    held_out = np.concatenate([b["segment_ids"].ravel() for b in data.validation(10**6)])
    total = sum(len(text.split()) + 1 for text in texts)
    assert data.train_tokens == total - np.count_nonzero(held_out)


def test_tokenizer_larger_than_the_model(source, word_tokenizer):
    with pytest.raises(ValueError, match=r"at most model\.vocab_size = 99 tokens, got 100.*set --"):
        load(source, tokenizer=word_tokenizer, vocab_size=99)
    with pytest.raises(ValueError, match=r"at most model\.vocab_size = 256 tokens, got 257"):
        load(source, vocab_size=256)


def test_tokenizer_that_knows_no_character(source, tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "empty.json"))
    with pytest.raises(ValueError, match=r"expected .* document"):
        load(source, tokenizer=str(tmp_path / "empty.json"))


def test_tokenizer_that_cannot_encode(source, word_tokenizer):
    with pytest.raises(ValueError, match=r"cannot encode .*UNK.*use a tokenizer that"):
        load(source, tokenizer=word_tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 3, "process_count": 2}, "multiple of the 2 processes, got 3"),
        ({"batch_size": 0}, "batch_size: expected a positive multiple"),
        ({"seed": -1}, r"seed: expected 0 <= seed < 2\*\*32, got -1"),
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


def test_a_script_that_never_closes_its_data_exits_silently(source, tmp_path):
    code = (
        "import sys; from moda_jax.config import DataConfig;"
        "from moda_jax.data.loader import load_data;"
        "from pathlib import Path;"
        "data = load_data(DataConfig(source=sys.argv[1]), batch_size=2, vocab_size=257, seed=0,"
        " cache_dir=Path(sys.argv[2]));"
        "next(data.train)"
    )
    command = [sys.executable, "-W", "error", "-c", code, source, str(tmp_path / "cache")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("is_held_out", [False, True])
def test_an_edited_text_is_another_run(tmp_path, texts, is_held_out):
    """A run reads the text as it was prepared; one that goes on sees that it was edited since."""
    folder = write_folder(tmp_path, texts)
    data = load(folder)
    before = take(load(folder).train, 9)
    state = data.train.get_state()
    edited = next(text for text in texts if (text in held_out_texts(data, texts)) == is_held_out)
    for path in tmp_path.rglob("*.txt"):
        if path.read_text() == edited:
            path.write_text(edited[:-1] + "~")
    for a, b in zip(take(data.train, 9), before, strict=True):
        assert_batches_equal(a, b)
    data.train.close()
    again = load(folder)
    expected = (
        "data: expected the (training|held-out) documents that the run began with .* were edited"
    )
    with pytest.raises(ValueError, match=expected) as caught:
        again.train.set_states([state])
    assert "\n" not in str(caught.value)
    again.train.close()


def test_appended_documents_are_another_run(tmp_path, texts):
    folder = write_folder(tmp_path, texts)
    state = load(folder).train.get_state()
    (tmp_path / "part0" / "new.txt").write_text("appended")
    with pytest.raises(ValueError, match="were edited, added, removed .* --init-from FOLDER"):
        load(folder).train.set_states([state])


def test_a_validation_text_of_its_own(tmp_path, texts):
    train = write_folder(tmp_path / "train", texts[:30])
    other = write_jsonl(tmp_path / "other.jsonl", texts[30:])
    data = load(train, validation=other)
    assert held_out_texts(data, texts) == set(texts[30:])
    pieces = set(itertools.chain(*map(pieces_of, take(data.train, 200))))
    assert pieces == set(expected_pieces(texts[:30]))
    (source,) = data.sources
    assert (source.train_documents, source.validation_documents) == (30, 10)
