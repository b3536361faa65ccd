"""Sources of documents, and the errors that say what is wrong with one."""

import gzip
import itertools
import os

import numpy as np
import pytest

from moda_jax.data.units import plan_source, read_unit
from tests.corpora import (
    assert_batches_equal,
    load,
    make_texts,
    pieces_of,
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
        assert data.sources[0].train_documents + data.sources[0].validation_documents == 2
        assert data.sources[0].num_bytes == 6


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


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="'nowhere/at/all', which does not exist; check the path"):
        load("nowhere/at/all")
    with pytest.raises(
        ValueError, match=r"at least one non-empty document.*needs \.txt or \.jsonl"
    ):
        load(str(tmp_path))
    other = tmp_path / "data.csv"
    other.write_text("a,b")
    with pytest.raises(ValueError, match=r"a \.jsonl file .*, got the file .*data\.csv"):
        load(str(other))
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"expected UTF-8 text, got .*latin1\.txt.*; convert"):
        load(str(tmp_path))


def documents_of(source):
    """(name, text) of every document that is not blank."""
    units = plan_source(str(source), text_field="text").units
    documents = itertools.chain(*(read_unit(unit, "text") for unit in units))
    pairs = [(document.name(), "".join(document.parts())) for document in documents]
    return [(name, text) for name, text in pairs if text.strip()]


def corpus_texts(source):
    return [text for _, text in documents_of(source)]


def test_linked_folders_are_read_once_and_upper_case_counts(tmp_path):
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    write_folder(elsewhere, ["linked"])
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "lower.txt").write_text("lower")
    (folder / "UPPER.TXT").write_text("upper")
    (folder / "a" / "link").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "cycle").symlink_to(folder)
    assert corpus_texts(folder) == ["upper", "lower", "linked"]


def test_files_of_other_kinds_are_counted(tmp_path):
    write_folder(tmp_path, ["one", "two"])
    for name in ("a.md", "b.MD", "notes", "lines.jsonl"):
        (tmp_path / name).write_text("x")
    shown = load(str(tmp_path)).describe()
    assert shown.endswith("not read: 2 .md, 1 .jsonl, 1 without suffix")
    assert "not read" not in load(write_folder(tmp_path / "part0", ["one", "two"])).describe()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"got none in .*files of other kinds: 1 \.csv"):
        load(str(tmp_path / "other"))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, ["one", "two"])
    listed = os.scandir

    def scandir(path):
        if path == tmp_path / "part1":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"cannot read .*part1: Permission denied; check the path"):
        load(str(tmp_path))
    monkeypatch.undo()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"cannot read .*loop: .*symbolic links"):
        load(str(tmp_path))


def test_a_folder_of_lines(tmp_path):
    """Plain and compressed ones; lines are named by their own file and number."""
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    for name, text in (("b", "three"), ("c", "four")):
        line = f'{{"text": "{text}"}}\n'.encode()
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(b"\n" + line))
    assert corpus_texts(tmp_path) == ["one", "two", "three", "four"]
    names = [name.removeprefix(f"{tmp_path}/") for name, _ in documents_of(tmp_path)]
    assert names == ["a.jsonl:1", "a.jsonl:2", "b.jsonl.gz:2", "c.jsonl.gz:2"]


@pytest.mark.parametrize("line_length", [60, 3000])
def test_one_text_is_split_by_position(tmp_path, line_length):
    """Its sections are the text again, in order; the held-out ones are its end."""
    rng = np.random.default_rng(0)
    characters = rng.choice([*"abc é東"], 40_000)
    characters[::line_length] = "\n"
    path = tmp_path / "input.TXT"
    path.write_text("\ufeff" + "".join(characters), encoding="utf-8")
    sections = corpus_texts(path)
    assert "".join(sections) == "".join(characters)
    assert 32 <= len(sections) <= 65
    if line_length < 1000:
        assert all(section.endswith("\n") for section in sections[:-1])
    data = load(str(path), seq_len=4096, validation_fraction=0.1)
    held_out = sorted(itertools.chain(*map(pieces_of, data.validation(99))))
    last = sections[data.sources[0].train_documents :]
    assert held_out == sorted((256, *text.encode(), 256) for text in last)
    assert 0.1 <= len("".join(last).encode()) / data.sources[0].num_bytes < 0.14
    assert "sections of one text" in data.describe()
    assert f"{len(last)} last sections held out" in data.describe()


def test_one_text_of_one_line(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("short")
    with pytest.raises(ValueError, match="text of at least 2 lines, .* got 1; give a longer text"):
        load(str(path))
    path.write_text("one\ntwo")
    (source,) = load(str(path)).sources
    assert (source.train_documents, source.validation_documents) == (1, 1)


def test_equal_documents_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match=r"at least 2 different documents.*got 2 with 1 text"):
        load(write_jsonl(tmp_path / "lines.jsonl", ["a", "a"]))


def test_standard_library():
    data = load("stdlib", seq_len=256, batch_size=2, validation_fraction=0.05)
    assert data.sources[0].train_documents > 200
    assert data.train_tokens > 2e6
    names = [name for name, _ in documents_of("stdlib")]
    assert any(name.endswith("json/decoder.py") for name in names)
    assert not any("/test/" in name or "-packages" in name for name in names)
    padding = np.mean([batch["segment_ids"] == 0 for batch in take(data.train, 50)])
    assert padding < 0.01
