"""Sources of documents, and the errors that say what is wrong with one."""

import numpy as np
import pytest

from moda_jax.data.corpus import Corpus
from tests.corpora import (
    assert_batches_equal,
    load,
    make_texts,
    take,
    write_folder,
    write_jsonl,
)


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
    assert padding < 0.1  # 0.04 and 0.05 measured, with two versions' libraries
