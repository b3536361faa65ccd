"""Batches: every target once, exact resumption, disjoint parts, and errors that say what to do."""

import collections
import itertools
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import tokenizers

import moda_jax.data
from moda_jax.config import DataConfig
from moda_jax.corpus import Corpus
from moda_jax.data import load_data

EOS = 256


def make_texts(count, *, longest=40, seed=0):
    """`count` different documents of 1 to `longest` ASCII characters, none of them blank."""
    rng = np.random.default_rng(seed)
    return [
        f"{i:02x}" + "".join(map(chr, rng.integers(33, 127, rng.integers(0, longest - 1))))
        for i in range(count)
    ]


def write_folder(folder, texts):
    for i, text in enumerate(texts):
        path = folder / f"part{i % 3}" / f"{i:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))
    return str(folder)


def write_jsonl(path, texts, field="text"):
    lines = (json.dumps({field: text, "id": i}) for i, text in enumerate(texts))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def load(source, *, batch_size=4, vocab_size=257, seed=0, process_index=0, process_count=1, **data):
    data = {"seq_len": 16, "packing_bins": 4, "validation_fraction": 0.3, **data}
    return load_data(
        DataConfig(source=source, **data),
        batch_size=batch_size,
        vocab_size=vocab_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )


def pieces_of(batch):
    """The pieces of a batch in order, each as its tokens followed by its last target."""
    found = []
    for row in range(len(batch["tokens"])):
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            tokens = batch["tokens"][row][segments == segment]
            targets = batch["targets"][row][segments == segment]
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            found.append((*tokens.tolist(), int(targets[-1])))
    return found


def expected_pieces(texts, seq_len=16):
    """The specification, written out: pieces of at most seq_len inputs that overlap by one."""
    found = []
    for text in texts:
        tokens = [EOS, *text.encode(), EOS]
        for start in range(0, len(tokens) - 1, seq_len):
            found.append(tuple(tokens[start : start + seq_len + 1]))
    return found


def assert_batches_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype == np.int32
        np.testing.assert_array_equal(first[name], second[name])


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def held_out_texts(data, texts, seq_len=16):
    """The texts whose every piece is among the held-out ones."""
    held_out = set(itertools.chain(*map(pieces_of, data.validation(10**6))))
    return {text for text in texts if held_out.issuperset(expected_pieces([text], seq_len))}


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
    [({"seq_len": 8}, "seq_len"), ({"seed": 1}, "seed"), ({"packing_bins": 2}, "packing_bins")],
)
def test_state_of_other_settings_is_refused(source, change, name):
    state = load(source).train.get_state()
    with pytest.raises(ValueError, match=rf"expected the checkpoint's {name} = .*new run"):
        load(source, **change).train.set_state(state)


def test_state_of_other_documents_is_refused(tmp_path, texts):
    state = load(write_folder(tmp_path / "a", texts)).train.get_state()
    more = write_folder(tmp_path / "b", make_texts(50))
    with pytest.raises(ValueError, match="expected the checkpoint's documents = "):
        load(more).train.set_state(state)


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


def test_blank_documents_are_dropped(tmp_path):
    texts = ["", "one", " \n\t", "two", "\ufeff"]
    for source in (
        write_folder(tmp_path / "folder", texts[:4]),
        write_jsonl(tmp_path / "lines.jsonl", texts[:4]),
    ):
        data = load(source, validation_fraction=0.5)
        assert data.train_documents + data.validation_documents == 2
        assert data.num_bytes == 6


def test_folder_and_jsonl_of_the_same_texts_give_the_same_batches(tmp_path):
    texts = [*make_texts(12), "naïve\r\n東京 🙂"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_bytes(text.encode("utf-8"))
    lines = write_jsonl(tmp_path / "lines.jsonl", texts, field="body")
    first, second = load(str(folder)), load(lines, text_field="body")
    for a, b in zip(take(first.train, 10), take(second.train, 10), strict=True):
        assert_batches_equal(a, b)


def test_jsonl_reads_documents_at_random(tmp_path):
    """Blank lines, a byte-order mark, CRLF and a missing last newline do not shift the index."""
    content = '\ufeff{"text": "one"}\n\n{"text": ""}\r\n{"text": "zwölf"}\r\n  \n{"text": "three"}'
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content.encode("utf-8"))
    corpus = Corpus(str(path), text_field="text")
    assert [corpus[i] for i in (2, 0, 1)] == ["three", "one", "zwölf"]
    assert [corpus.name(i) for i in range(3)] == [f"{path}:{line}" for line in (1, 4, 6)]
    assert corpus.sizes.tolist() == [3, 6, 5]


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
    class Lying(moda_jax.data.ByteTokenizer):
        def encode(self, text):
            return [ord(character) for character in text]

    monkeypatch.setattr(moda_jax.data, "load_tokenizer", lambda name: Lying())
    data = load(write_folder(tmp_path, ["東", "東京"]), vocab_size=300)
    message = (
        r"expected token ids in \[0, 300\), got (26481|20140) in .*\.txt; raise --model\.vocab-size"
    )
    with pytest.raises(ValueError, match=message):
        take(data.train, 5)
    with pytest.raises(ValueError, match=message):
        list(data.validation(1))


LINES = {
    "malformed": (
        '{"text": "one"}\n{"text": "two"\n',
        r"one JSON object per line, got .*\.jsonl:2",
    ),
    "no_object": ('{"text": "one"}\n\n[1]\n', r"field 'text' in .*\.jsonl:3, got no JSON object"),
    "no_field": ('{"body": "one"}\n', r"field 'text' in .*:1, got fields \['body'\]; set --data"),
    "no_string": ('{"text": 1}\n', r"string field 'text' in .*\.jsonl:1"),
    "half_surrogate": ('{"text": "\\ud800"}\n', r"expected UTF-8 text, got .*\.jsonl:1"),
    "latin1": ('{"text": "é"}\n'.encode("latin-1"), r"expected UTF-8 text, got .*\.jsonl:1"),
    "blank": ('{"text": " "}\n\n', r"at least one non-empty document, got none in .*\.jsonl'"),
    "empty": ("", r"at least one non-empty document, got none"),
    "one": ('{"text": "a"}\n' * 2, r"at least 2 different documents.*got 2 with 1 text"),
}


@pytest.mark.parametrize("case", LINES)
def test_bad_jsonl(tmp_path, case):
    content, message = LINES[case]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as error:
        load(str(path))
    assert "\n" not in str(error.value)


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="'nowhere/at/all', which does not exist; check the path"):
        load("nowhere/at/all")
    with pytest.raises(ValueError, match=r"at least one non-empty document.*needs \.txt files"):
        load(str(tmp_path))
    other = tmp_path / "data.csv"
    other.write_text("a,b")
    with pytest.raises(ValueError, match=r"or a \.jsonl file, got the file .*data\.csv"):
        load(str(other))
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"expected UTF-8 text, got .*latin1\.txt.*; convert"):
        load(str(tmp_path))


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


def test_a_file_that_vanishes_is_named(tmp_path):
    source = write_folder(tmp_path, ["one", "two"])
    data = load(source)
    for path in tmp_path.rglob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*\.txt: No such file"):
        next(data.train)


def test_standard_library():
    data = load("stdlib", seq_len=256, batch_size=2, validation_fraction=0.05)
    assert data.train_documents > 200
    assert data.train_tokens > 2e6
    corpus = Corpus("stdlib", text_field="text")
    names = [corpus.name(i) for i in range(len(corpus))]
    assert any(name.endswith("json/decoder.py") for name in names)
    assert not any("/test/" in name or "-packages" in name for name in names)
    padding = np.mean([batch["segment_ids"] == 0 for batch in take(data.train, 50)])
    assert padding < 0.05


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
        "import sys; from moda_jax.config import DataConfig; from moda_jax.data import load_data;"
        "data = load_data(DataConfig(source=sys.argv[1]), batch_size=2, vocab_size=257, seed=0);"
        "next(data.train)"
    )
    command = [sys.executable, "-W", "error", "-c", code, source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
