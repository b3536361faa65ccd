"""Prepared text: what is read is what was written, or an error that names shard and record."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moda_jax.data import units
from moda_jax.data.prepare import prepare
from moda_jax.data.prepared import Block, PreparedText, UnreadableBlockError, split
from moda_jax.data.tokenizer import ByteTokenizer
from tests.corpora import EOS, FUZZ, expected_pieces, load, pieces_of, write_jsonl

SHORT, LONG = "short", " ".join(str(i * i) for i in range(1000))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Two shards: a small file, and one of three blocks and a part."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "texts").mkdir()
    write_jsonl(folder / "texts" / "a.jsonl", [SHORT, "another"])
    write_jsonl(folder / "texts" / "b.jsonl", [LONG, "last"])
    output = folder / "output"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", (folder / "texts" / "b.jsonl").stat().st_size)
        prepare(str(folder / "texts"), output, tokenizer=ByteTokenizer(), say=lambda line: None)
    return output


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "copy")


def stream(folder):
    text = PreparedText(folder)
    return text.read(np.arange(text.num_tokens), np.ones(text.num_tokens, np.int64))


def everything():
    return [x for text in (SHORT, "another", LONG, "last") for x in (*text.encode(), EOS)]


def test_the_stream_is_the_documents(folder):
    np.testing.assert_array_equal(stream(folder), everything())
    text = PreparedText(folder)
    np.testing.assert_array_equal(text.lengths(np.arange(4)), [6, 8, len(LONG) + 1, 5])
    np.testing.assert_array_equal(text.starts(np.arange(4)), [0, 6, 14, 15 + len(LONG)])


@given(st.data())
@FUZZ
def test_ranges_of_any_order_and_size(pristine, data):
    text = PreparedText(pristine, cached_tokens=data.draw(st.sampled_from([0, 2048, 10**6])))
    expected = np.array(everything())
    shard_end = 14 + (len(expected) - 14) * np.arange(2)
    pairs = []
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(expected) - 1))
        room = int(shard_end[int(start >= 14)] - start)
        pairs.append((start, data.draw(st.integers(1, room))))
    for _ in range(2):  # the second time out of the cache
        found = text.read(*(np.array(x, np.int64) for x in zip(*pairs, strict=True)))
        wanted = np.concatenate([expected[start : start + length] for start, length in pairs])
        np.testing.assert_array_equal(found, wanted)


def test_a_shard_cut_at_every_byte_of_its_last_record(folder):
    """Every length is refused by name when the folder is opened, none is read as something else."""
    path = folder / "shard-00001.array_record"
    content = path.read_bytes()
    for cut in range(1, min(len(content), 1500)):
        path.write_bytes(content[:-cut])
        with pytest.raises(ValueError, match=r"shard-00001\.array_record: expected .* bytes"):
            PreparedText(folder)


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7])
def test_a_changed_byte_is_named_with_its_record(folder, place):
    path = folder / "shard-00001.array_record"
    content = bytearray(path.read_bytes())
    tokens = np.array(everything()[14:], "<u2").tobytes()
    block = int(place * len(tokens)) // 4096
    where = content.find(tokens[block * 4096 + 100 : block * 4096 + 150])
    assert where > 0
    content[where] ^= 1
    path.write_bytes(content)
    text = PreparedText(folder)
    starts = np.array([14, len(everything()) - 2])
    with pytest.raises(UnreadableBlockError, match=rf"shard-00001.*: expected record {block} "):
        text.read(starts, np.array([len(LONG), 1]))
    with pytest.raises(UnreadableBlockError) as caught:
        stream(folder)
    assert caught.value.block == Block(1, block)


@given(st.data())
@FUZZ
def test_changed_bytes_of_a_shard_are_an_error_or_the_same_text(pristine, tmp_path_factory, data):
    """Anywhere: blocks, their headers, the file's index."""
    folder = tmp_path_factory.mktemp("flipped")
    for path in pristine.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    shard = folder / "shard-00001.array_record"
    content = bytearray(shard.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    shard.unlink()
    shard.write_bytes(content)
    try:
        found = stream(folder)
    except ValueError:
        return
    np.testing.assert_array_equal(found, everything())


def test_what_is_damaged_is_skipped_and_counted(folder):
    path = folder / "shard-00001.array_record"
    content = bytearray(path.read_bytes())
    where = content.find(np.array(list(LONG[3000:3050].encode()), "<u2").tobytes())
    content[where] ^= 1
    path.write_bytes(content)
    settings = {"validation": str(folder), "seq_len": 512}
    with pytest.raises(ValueError, match=r"read past what is damaged with --data\.on-error skip"):
        list(load(str(folder), **settings).validation(100))
    data = load(str(folder), **settings, on_error="skip", batch_size=1)
    batches = list(data.validation(100))
    found = [piece for batch in batches for piece in pieces_of(batch)]
    wanted = expected_pieces([SHORT, "another", LONG, "last"], 512)
    missing = [piece for piece in wanted if piece not in found]
    assert set(found) < set(wanted)
    assert 4 <= len(missing) <= 6  # those with tokens in the 2048 of the block
    assert data.num_skipped_held_out == len(missing)
    for _ in batches:  # an epoch
        next(data.train)
    assert data.train.num_skipped == len(missing)
    state = data.train.get_state()
    again = load(str(folder), **settings, on_error="skip", batch_size=1)
    again.train.set_states([state])
    assert again.train.num_skipped == len(missing)


def test_ids_outside_the_vocabulary_name_the_shard_and_the_document(folder):
    index = json.loads((folder / "index.json").read_text())
    index["tokenizer"]["vocab_size"] = 115  # of "short", "s" is 115
    (folder / "index.json").write_text(json.dumps(index))
    data = load(str(folder), validation=str(folder))
    with pytest.raises(
        ValueError, match=r"shard-0000.*, document \d.*expected token ids in \[0, 1"
    ):
        list(data.validation(1000))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index.json", b"{", "index.json: expected the index of prepared text"),
        ("index.json", b"[]", "index.json: expected format 1, got 'list'"),
        ("index.json", b'{"format": 2}', "index.json: expected format 1, got 2"),
        ("index.json", b'{"format": 1}', "index.json: expected tokenizer as dict, got None"),
        ("ends.npy", b"", "ends.npy: expected an array"),
        ("ends.npy", b"\x80\x04K\x01.", "ends.npy: expected an array"),
        ("shard-00000.array_record", None, "shard-00000.array_record: expected a shard"),
        ("digests.npy", None, "digests.npy: expected an array"),
    ],
)
def test_damaged_folders(folder, name, content, message):
    path = folder / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        PreparedText(folder)
    assert "\n" not in str(caught.value)


def changed(value, data):
    kinds = st.sampled_from([None, -1, 0, 1, 10**18, "x", "../x", [], {}, True, 1.5])
    return data.draw(kinds.filter(lambda new: new != value or type(new) is not type(value)))


@given(st.data())
@FUZZ
def test_a_changed_index_is_an_error_or_the_same_text(pristine, tmp_path_factory, data):
    index = json.loads((pristine / "index.json").read_text())
    shard = data.draw(st.sampled_from([None, 0, 1]))
    part = index if shard is None else index["shards"][shard]
    if shard is None and data.draw(st.booleans()):
        part = index["tokenizer"]
    name = data.draw(st.sampled_from(sorted(part)))
    part[name] = changed(part[name], data)
    folder = tmp_path_factory.mktemp("changed")
    for path in pristine.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    (folder / "index.json").unlink()
    (folder / "index.json").write_text(json.dumps(index))
    try:
        found = stream(folder)
        split(PreparedText(folder), 0.3)
    except ValueError:
        return
    np.testing.assert_array_equal(found, everything())


def test_an_old_cut_of_another_text_is_not_taken(tmp_path):
    """The folder is prepared again with other texts; the split of the first lies beside it."""
    source = tmp_path / "x.jsonl"
    output = tmp_path / "out"
    for texts in (["one", "two", "three"], ["four", "five", "six", "seven"]):
        write_jsonl(source, texts)
        prepare(str(source), output, tokenizer=ByteTokenizer(), say=lambda line: None)
        train, held_out = split(PreparedText(output), 0.3)
        assert len(train.documents) + len(held_out.documents) == len(texts)


def test_what_the_system_refuses_is_no_damage(folder, monkeypatch):
    """Too many open files: with on_error=skip, documents would be lost silently."""

    def refuse(path, options):
        raise RuntimeError("open() failed: Too many open files")

    monkeypatch.setattr("moda_jax.data.prepared.ArrayRecordReader", refuse)
    with pytest.raises(ValueError, match="shard that can be opened, got .*Too many open") as caught:
        stream(folder)
    assert not isinstance(caught.value, UnreadableBlockError)


def test_few_files_are_open_at_a_time(folder):
    text = PreparedText(folder, open_shards=1)
    for position in (0, 20, 1, 21):
        text.read(np.array([position]), np.array([1]))
        assert len(text._readers) == 1
