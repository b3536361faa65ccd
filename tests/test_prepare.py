"""Raw text into shards: what they hold, the same bytes whatever happens, one-line errors."""

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moda_jax.data.prepare
from moda_jax.data import units
from moda_jax.data.cache import prepared_folder
from moda_jax.data.prepare import prepare
from moda_jax.data.tokenizer import load_tokenizer
from moda_jax.data.tokenizer_training import train_tokenizer
from tests.corpora import make_texts, write_folder, write_jsonl, write_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = (ROOT / "moda_jax" / "data" / "units.py").read_text()


def run(source, output, *, tokenizer="bytes", **options):
    return prepare(str(source), output, tokenizer=tokenizer, quiet=True, **options)


def read(folder):
    """The index and the documents' tokens, ends checked and left out."""
    index = json.loads((folder / "index.json").read_bytes())
    ends = np.load(folder / "ends.npy", mmap_mode="r")
    dtype = np.dtype(index["dtype"]).newbyteorder("<")
    assert len(ends) == index["documents"] == sum(s["documents"] for s in index["shards"])
    streams = []
    for shard in index["shards"]:
        path = folder / shard["file"]
        assert path.stat().st_size == shard["size"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        reader = ArrayRecordReader(str(path))
        blocks = [np.frombuffer(record, dtype) for record in reader.read_all()]
        reader.close()
        assert all(len(block) == index["block_tokens"] for block in blocks[:-1])
        stream = np.concatenate(blocks)
        assert len(stream) == shard["tokens"]
        assert stream[-1] == index["tokenizer"]["eos_id"]
        streams.append(stream)
    stream = np.concatenate(streams)
    assert len(stream) == index["tokens"] == ends[-1]
    documents = np.split(stream, ends[:-1])
    assert all(document[-1] == index["tokenizer"]["eos_id"] for document in documents)
    return index, [document[:-1].tolist() for document in documents]


def content(folder, *, without=("plan.json", "prepare.lock")):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in without}


def texts_of(folder):
    return [bytes(tokens).decode() for tokens in read(folder)[1]]


@pytest.fixture
def small_units(monkeypatch):
    """Units of about 2 KB, on worker processes although the corpus is small."""
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    monkeypatch.setattr(units, "_OPENING_BYTES", 0)
    monkeypatch.setattr(moda_jax.data.prepare, "_SMALL_BYTES", 0)


@pytest.fixture
def bpe(tmp_path):
    """The path of a tokenizer trained on a few texts."""
    path = tmp_path / "bpe" / "tokenizer.json"
    path.parent.mkdir()
    source = write_jsonl(tmp_path / "bpe" / "train.jsonl", [SAMPLE])
    train_tokenizer([source], path, vocab_size=600)
    return str(path)


TEXTS = ["", "one", " \n\t", "zwölf\r\n東京 🙂", "\ufeff", *make_texts(20)]
KEPT = [text for text in TEXTS if text.strip("\ufeff").strip()]


def as_parquet(path, texts):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"id": range(len(texts)), "text": texts}), path,
                        row_group_size=3)  # fmt: skip


def as_dataset(folder, texts):
    """What Hugging Face's `save_to_disk` writes: Arrow streams of record batches."""
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"text": texts, "id": range(len(texts))})
    half = len(texts) // 2
    names = []
    for number, part in enumerate((table[:half], table[half:])):
        names.append(f"data-{number:05}-of-00002.arrow")
        with (
            arrow.OSFile(str(folder / names[-1]), "wb") as file,
            arrow.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(part, max_chunksize=3)
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))


def as_packed(path, texts, pack):
    plain = Path(write_jsonl(path.with_name("plain"), texts)).read_bytes()
    path.write_bytes(pack(plain))
    path.with_name("plain").unlink()


def as_zst(path, texts):
    as_packed(path, texts, pytest.importorskip("backports.zstd").compress)


SOURCES = {
    "folder": ("texts", lambda path: write_sorted(path, TEXTS)),
    "lines": ("lines.jsonl", lambda path: write_jsonl(path, TEXTS)),
    "gz": ("lines.jsonl.gz", lambda path: as_packed(path, TEXTS, gzip.compress)),
    "xz": ("lines.JSONL.xz", lambda path: as_packed(path, TEXTS, lzma.compress)),
    "zst": ("lines.jsonl.zst", lambda path: as_zst(path, TEXTS)),
    "parquet": ("rows.parquet", lambda path: as_parquet(path, TEXTS)),
    "dataset": ("saved", lambda path: (path.mkdir(), as_dataset(path, TEXTS))),
}


def write_sorted(folder, texts):
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text.encode())


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_its_texts(tmp_path, kind):
    name, write = SOURCES[kind]
    write(tmp_path / name)
    summary = run(tmp_path / name, tmp_path / "out")
    index, tokens = read(tmp_path / "out")
    # A byte-order mark at a file's beginning is no text, in the middle of a record it is.
    kept = KEPT if kind == "folder" else [t for t in TEXTS if t.strip()]
    assert [bytes(t).decode() for t in tokens] == kept
    sizes = [len(text.encode()) for text in kept]
    digests = [
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) for text in kept
    ]
    assert np.load(tmp_path / "out" / "sizes.npy").tolist() == sizes
    assert np.load(tmp_path / "out" / "digests.npy").tolist() == digests
    joined = b"".join(digest.to_bytes(8, "little") for digest in digests)
    assert index["fingerprint"] == hashlib.blake2b(joined, digest_size=8).hexdigest()
    assert (index["bytes"], index["skipped"], index["is_one_text"]) == (sum(sizes), 0, False)
    assert (summary.documents, summary.tokens) == (len(kept), sum(sizes) + len(kept))
    assert set(content(tmp_path / "out")) == {
        "index.json", "ends.npy", "digests.npy", "sizes.npy", "shard-00000.array_record",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "lines", "parquet", "dataset"])
def test_the_number_of_workers_changes_no_byte(tmp_path, small_units, kind, bpe, monkeypatch):
    texts = [text * 40 for text in TEXTS]
    monkeypatch.setattr(sys.modules[__name__], "TEXTS", texts)
    name, write = SOURCES[kind]
    write(tmp_path / name)
    found = []
    for workers in (1, 2, 3):
        folder = tmp_path / f"out{workers}"
        summary = run(tmp_path / name, folder, tokenizer=bpe, workers=workers)
        assert summary.shards > 5
        found.append(content(folder))
    assert found[0] == found[1] == found[2]
    tokenizer = load_tokenizer(bpe)
    _, documents = read(tmp_path / "out1")
    wanted = [text.removeprefix("\ufeff") if kind == "folder" else text for text in texts]
    assert documents == [tokenizer.encode(text) for text in wanted if text.strip()]
    assert found[0]["tokenizer.json"] == Path(bpe).read_bytes()


@pytest.mark.parametrize("length", [60, 3000])
def test_one_text_is_cut_into_sections(tmp_path, small_units, length):
    rng = np.random.default_rng(0)
    characters = rng.choice([*"abc é東"], 40_000)
    characters[::length] = "\n"
    text = "".join(characters)
    (tmp_path / "input.txt").write_text("\ufeff" + text, encoding="utf-8")
    summary = run(tmp_path / "input.txt", tmp_path / "out", workers=2)
    found = texts_of(tmp_path / "out")
    assert "".join(found) == text
    assert 32 <= len(found) <= 65
    assert summary.shards > 10
    assert json.loads((tmp_path / "out" / "index.json").read_bytes())["is_one_text"]
    if length < 1000:
        assert all(section.endswith("\n") for section in found[:-1])


def test_the_standard_library(tmp_path):
    summary = run("stdlib", tmp_path / "out", workers=2)
    assert summary.documents > 200
    index = json.loads((tmp_path / "out" / "index.json").read_bytes())
    plan = json.loads((tmp_path / "out" / "plan.json").read_bytes())
    names = [file[0] for file in plan["files"]]
    assert any(name.endswith("json/decoder.py") for name in names)
    assert not any("/test/" in name or "-packages" in name for name in names)
    assert index["source"] == "stdlib"


LINES = {
    "malformed": (
        '{"text": "one"}\n{"text": "two"\n',
        r"one JSON object per line, got .*\.jsonl:2: .*; repair or remove the line",
    ),
    "no_object": ('{"text": "one"}\n\n[1]\n', r"field 'text' in .*\.jsonl:3, got no JSON object"),
    "no_field": ('{"body": "one"}\n', r"field 'text' in .*:1, got fields \['body'\]; set --data"),
    "no_string": ('{"text": 1}\n', r"string field 'text' in .*\.jsonl:1"),
    "half_surrogate": ('{"text": "\\ud800"}\n', r"expected UTF-8 text, got .*\.jsonl:1"),
    "latin1": ('{"text": "é"}\n'.encode("latin-1"), r"expected UTF-8 text, got .*\.jsonl:1"),
    "deep": ("[" * 100_000 + "\n", r"one JSON object per line, got .*\.jsonl:1"),
    "blank": ('{"text": " "}\n\n', r"at least one non-empty document, got none in .*\.jsonl'"),
    "empty": ("", r"at least one non-empty document, got none"),
}


@pytest.mark.parametrize("case", LINES)
def test_bad_lines(tmp_path, case):
    lines, message = LINES[case]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(lines.encode("utf-8") if isinstance(lines, str) else lines)
    with pytest.raises(ValueError, match=message) as error:
        run(path, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "index.json").exists()


def test_bad_sources(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="'nowhere/at/all', which does not exist; check the path"):
        run("nowhere/at/all", out)
    other = tmp_path / "data.csv"
    other.write_text("a,b")
    with pytest.raises(ValueError, match=r"a \.jsonl file .*, got the file .*data\.csv"):
        run(other, out)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"got none in .*files of other kinds: 1 \.csv.*needs \.t"):
        run(tmp_path, out)
    (tmp_path / "latin1.txt").write_bytes(b"abc" * 90_000 + "café".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"UTF-8 text, got .*latin1\.txt: .* 0xe9 in position 2700"
    ):
        run(tmp_path, out)
    with pytest.raises(ValueError, match=r"expected a new or empty folder, .* 'data\.csv'"):
        run(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        run(tmp_path, other)
    other = types.SimpleNamespace(content=None)
    with pytest.raises(ValueError, match="tokenizer: expected bytes or .* got SimpleNamespace"):
        run(tmp_path, out, tokenizer=other)
    with pytest.raises(ValueError, match="workers: expected a positive number, got 0"):
        run(tmp_path, out, workers=0)
    with pytest.raises(ValueError, match='on_error: expected "stop" or "skip", got \'go\''):
        run(tmp_path, out, on_error="go")


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_damaged_archives_are_named(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".xz": lzma.compress}
    path = tmp_path / f"lines.jsonl{suffix}"
    if suffix in pack:
        as_packed(path, TEXTS, pack[suffix])
    else:
        as_zst(path, TEXTS)
    for damaged in (path.read_bytes()[:-20], b"not packed at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read .*lines\.jsonl\.\w+: "):
            run(path, tmp_path / "out", on_error="skip")


def test_columns_are_checked(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    as_parquet(tmp_path / "rows.parquet", ["one"])
    with pytest.raises(ValueError, match=r"string column 'body' in .*, got columns \['id', 'text"):
        run(tmp_path / "rows.parquet", tmp_path / "out", text_field="body")
    with pytest.raises(ValueError, match=r"string column 'id' in .*, got type int64; set --data"):
        run(tmp_path / "rows.parquet", tmp_path / "out", text_field="id")
    table = arrow.table({"text": ["one", None, "two"]})
    sys.modules["pyarrow.parquet"].write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"column 'text' of .*rows\.parquet, row 1, got null"):
        run(tmp_path / "rows.parquet", tmp_path / "out")
    assert run(tmp_path / "rows.parquet", tmp_path / "out", on_error="skip").skipped == 1
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(ValueError, match=r"cannot read .*rows\.parquet: "):
        run(tmp_path / "rows.parquet", tmp_path / "out")


def test_a_dictionary_of_datasets_names_its_splits(tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        as_dataset(tmp_path / name, ["one", "two"])
    with pytest.raises(ValueError, match=r"name one of its folders: test, train"):
        run(tmp_path, tmp_path / "out")
    run(tmp_path / "train", tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["one", "two"]


@pytest.mark.parametrize(
    ("package", "suffix", "message"),
    [
        ("pyarrow", ".parquet", r"needs the package pyarrow: .*the extra `parquet`"),
        ("backports.zstd", ".jsonl.zst", r"needs Python 3\.14 or the package backports\.zstd"),
    ],
)
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, package, suffix, message):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    (tmp_path / f"a{suffix}").write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / f"a{suffix}", tmp_path / "out")


def test_bad_documents_are_skipped_and_counted(tmp_path, bpe):
    lines = ['{"text": "one"}', "{", '{"text": "\\ud800"}', '{"body": ""}', '{"text": "two"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    summary = run(tmp_path / "a.jsonl", tmp_path / "out", on_error="skip")
    assert (summary.documents, summary.skipped) == (2, 3)
    assert texts_of(tmp_path / "out") == ["one", "two"]
    with pytest.raises(ValueError, match=r"a\.jsonl:2"):
        run(tmp_path / "a.jsonl", tmp_path / "out", on_error="stop")
    # Much of a long document has been tokenized when its bad end is found.
    folder = tmp_path / "folder"
    write_sorted(folder, ["first", "one two three " * 100_000, "last"])
    with (folder / "001.txt").open("ab") as file:
        file.write(b"\xff")
    summary = run(folder, tmp_path / "out2", tokenizer=bpe, on_error="skip")
    assert (summary.documents, summary.skipped) == (2, 1)
    tokenizer = load_tokenizer(bpe)
    assert read(tmp_path / "out2")[1] == [tokenizer.encode("first"), tokenizer.encode("last")]


def test_a_tokenizer_that_cannot_encode_a_document(tmp_path):
    """Without an unknown token; the message names the document, and it can be skipped."""
    path = write_tokenizer(tmp_path / "tokenizer.json", ["b", "c"])
    source = write_jsonl(tmp_path / "a.jsonl", ["b", "other", "c"])
    with pytest.raises(ValueError, match=r"cannot encode 'other'.* \(in .*a\.jsonl:2\)"):
        run(source, tmp_path / "out", tokenizer=path)
    assert run(source, tmp_path / "out", tokenizer=path, on_error="skip").documents == 2


def test_the_first_error_is_the_one_whatever_the_pace(tmp_path, small_units):
    lines = [json.dumps({"text": f"{i} " * 300}) for i in range(40)]
    lines[13] = lines[27] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for workers in (1, 3):
        with pytest.raises(ValueError, match=r"a\.jsonl:14"):
            run(tmp_path / "a.jsonl", tmp_path / "out", workers=workers)
    lines[13] = lines[27] = "{}"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"a\.jsonl:14, got fields"):
        run(tmp_path / "a.jsonl", tmp_path / "out", workers=2)
    kept = run(tmp_path / "a.jsonl", tmp_path / "out", workers=2, on_error="skip").kept_shards
    assert kept > 0


PREPARE = """
import sys, moda_jax.data.prepare as p
from moda_jax.data import units
units.UNIT_BYTES, p._SMALL_BYTES = 50_000, 0
print(p.prepare(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3], workers=2).describe())
assert "jax" not in sys.modules
"""


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished_shards(folder):
    return sorted(path.name for path in folder.glob("shard-?????.json"))


def test_killed_and_started_again(tmp_path, bpe, monkeypatch):
    """The finished shards are kept, half-written ones are made again, the bytes are the same."""
    texts = [SAMPLE] * 60
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    out = tmp_path / "out"
    kept = []
    for wanted in (2, 5):
        process = start(source, out, bpe)
        while len(finished_shards(out)) < wanted and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.communicate()  # ends when the workers, which have the pipe too, have ended
        kept.append(len(finished_shards(out)))
        assert not (out / "index.json").exists()
    (out / "shard-00001.array_record").write_bytes(b"cut off")
    times = {name: (out / name).stat().st_mtime_ns for name in finished_shards(out)}
    process = start(source, out, bpe)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"{kept[1] - 1} of" in output
    assert f"({kept[1] - 1} kept)" in output
    assert times
    monkeypatch.setattr(units, "UNIT_BYTES", 50_000)
    run(source, tmp_path / "whole", tokenizer=bpe, workers=1)
    assert content(out) == content(tmp_path / "whole")


def test_workers_end_with_their_parent(tmp_path, bpe):
    source = write_jsonl(tmp_path / "a.jsonl", [SAMPLE * 3] * 120)
    process = start(source, tmp_path / "out", bpe)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) < 2 or not finished_shards(tmp_path / "out"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 2
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.stdout.close()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_is_one_line(tmp_path, small_units, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", [text * 100 for text in make_texts(200)])

    def kill_all(*_):
        children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
        for pid in children.split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"moda_jax.data.worker" in command:
                os.kill(int(pid), signal.SIGKILL)

    monkeypatch.setattr(moda_jax.data.prepare.ProgressDisplay, "update", kill_all)
    with pytest.raises(ChildProcessError, match=r"ended by SIGKILL.*a\.jsonl, bytes .* to .*fewer"):
        run(source, tmp_path / "out", workers=1)


def test_two_at_once_wait_for_one_another(tmp_path, bpe):
    source = write_jsonl(tmp_path / "a.jsonl", [SAMPLE] * 20)
    first, second = (start(source, tmp_path / "out", bpe) for _ in range(2))
    outputs = [process.communicate()[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    waiting = [output for output in outputs if "waiting for another process" in output]
    assert len(waiting) == 1
    assert "kept)" in waiting[0]


def test_a_changed_input_starts_over(tmp_path, capsys):
    source = Path(write_jsonl(tmp_path / "a.jsonl", ["one"]))
    run(source, tmp_path / "out")
    before = content(tmp_path / "out")
    capsys.readouterr()
    assert run(source, tmp_path / "out").kept_shards == 1
    assert content(tmp_path / "out") == before
    assert capsys.readouterr().out == ""
    write_jsonl(source, ["two", "three"])
    assert run(source, tmp_path / "out").kept_shards == 0
    assert "another input or tokenizer: starting over" in capsys.readouterr().out
    assert texts_of(tmp_path / "out") == ["two", "three"]
    path = write_tokenizer(tmp_path / "t.json", ["a"])
    run(source, tmp_path / "out", tokenizer=path)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    (tmp_path / "out" / "shard-00000.array_record").unlink()
    run(source, tmp_path / "out", tokenizer=path)
    assert "has not what its index lists" in capsys.readouterr().out
    assert read(tmp_path / "out")[1] == [[0], [0]]


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    source = Path(write_jsonl(tmp_path / "a.jsonl", ["one"]))
    made = moda_jax.data.prepare.write_shard

    def change(*arguments):
        entry = made(*arguments)
        write_jsonl(source, ["one", "two"])
        return entry

    monkeypatch.setattr(moda_jax.data.prepare, "write_shard", change)
    with pytest.raises(ValueError, match=r"to stay as it is while it is prepared, but .*a\.jsonl"):
        run(source, tmp_path / "out")


def test_the_output_may_lie_in_the_source(tmp_path):
    write_folder(tmp_path, ["one", "two"])
    for _ in range(2):
        run(tmp_path, tmp_path / "out")
        index, documents = read(tmp_path / "out")
        assert (index["ignored"], len(documents)) == ("", 2)


def test_many_tokens_need_four_bytes(tmp_path):
    path = write_tokenizer(tmp_path / "t.json", ["a", *(f"w{i}" for i in range(70_000))])
    source = write_jsonl(tmp_path / "a.jsonl", ["w69999"])
    run(source, tmp_path / "out", tokenizer=path)
    index, documents = read(tmp_path / "out")
    assert (index["dtype"], documents) == ("uint32", [[70_000]])
    assert index["tokenizer"]["eos_token"] == "<eos>"


def cached(source, tmp_path, tokenizer="bytes", **options):
    return prepared_folder(
        str(source), tmp_path / "cache", tokenizer=load_tokenizer(tokenizer), quiet=True, **options
    )


@contextlib.contextmanager
def opened_files(monkeypatch):
    """The paths that are opened for reading meanwhile."""
    opened = []
    whole = Path.open

    def spy(path, *arguments, **options):
        opened.append(path)
        return whole(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", spy)
        yield opened


def test_a_cached_corpus_is_not_read_again(tmp_path, monkeypatch):
    source = Path(write_jsonl(tmp_path / "a b.jsonl", ["one", "two"]))
    with opened_files(monkeypatch) as opened:
        folder = cached(source, tmp_path)
    assert source in opened
    assert folder.parent == tmp_path / "cache"
    assert len(folder.name.removeprefix("a-b-")) == 12
    with opened_files(monkeypatch) as opened:
        assert cached(source, tmp_path) == folder
    assert source not in opened
    # Touched: read, not prepared again. Edited: prepared again. As it was: found again.
    os.utime(source, (1, 1))
    before = (folder / "index.json").stat().st_mtime_ns
    with opened_files(monkeypatch) as opened:
        assert cached(source, tmp_path) == folder
    assert source in opened
    assert (folder / "index.json").stat().st_mtime_ns == before
    moved = source.rename(tmp_path / "c.jsonl").rename(source)
    assert cached(moved, tmp_path) == folder
    write_jsonl(source, ["one", "owt"])
    other = cached(source, tmp_path)
    assert other != folder
    assert texts_of(other) == ["one", "owt"]
    write_jsonl(source, ["one", "two"])
    assert cached(source, tmp_path) == folder
    assert cached(source, tmp_path, write_tokenizer(tmp_path / "t.json", ["a"])) != folder


def test_a_prepared_folder_is_its_own_cache(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    run(source, tmp_path / "out")
    assert cached(tmp_path / "out", tmp_path) == tmp_path / "out"
    path = write_tokenizer(tmp_path / "t.json", ["a"])
    with pytest.raises(ValueError, match=r"was prepared with, bytes \(bytes\), got [0-9a-f]{16};"):
        cached(tmp_path / "out", tmp_path, path)
    with pytest.raises(ValueError, match="expected raw text, got the prepared folder"):
        run(tmp_path / "out", tmp_path / "again")
    index = tmp_path / "out" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_bytes()) | {"format": 2}))
    with pytest.raises(ValueError, match=r"index\.json: expected format 1, got 2"):
        cached(tmp_path / "out", tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: expected the index of prepared text, got"):
        cached(tmp_path / "out", tmp_path)


def test_of_several_processes_one_prepares(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(200))
    code = (
        "import sys; from pathlib import Path; from moda_jax.data.cache import prepared_folder;"
        "from moda_jax.data.tokenizer import load_tokenizer;"
        "print(prepared_folder(sys.argv[1], sys.argv[2], tokenizer=load_tokenizer('bytes'),"
        "say=lambda text: None))"
    )
    command = [sys.executable, "-c", code, source, str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    found = {process.communicate()[0] for process in processes}
    assert len(found) == 1
    assert [process.returncode for process in processes] == [0, 0, 0]
    folders = [p for p in (tmp_path / "cache").iterdir() if p.name != "known"]
    assert [f"{p}\n" for p in folders] == [*found]


def test_a_trained_tokenizer_gives_the_text_back(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [SAMPLE, "東京 🙂"])
    for name in ("a", "b"):
        train_tokenizer([source], tmp_path / name, vocab_size=500)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    assert (tokenizer.vocab_size, tokenizer.eos_token) == (500, "<|endoftext|>")
    text = "def f():\n\treturn 1  # 東京, 🙂 naïve \0"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match="vocab_size: expected at least 257, .* got 256"):
        train_tokenizer([source], tmp_path / "c", vocab_size=256)
    with pytest.raises(ValueError, match="expected words that repeat"):
        train_tokenizer([write_jsonl(tmp_path / "e.jsonl", [""])], tmp_path / "c", vocab_size=300)


def test_a_tokenizers_sample_is_bounded(tmp_path, small_units):
    source = write_jsonl(
        tmp_path / "a.jsonl", [f"{chr(97 + i)}{chr(98 + i)} " * 300 for i in range(24)]
    )
    for size in (6000, 10**9):
        train_tokenizer([source], tmp_path / f"{size}.json", vocab_size=2000, sample_bytes=size)
    small, large = (load_tokenizer(str(tmp_path / f"{n}.json")) for n in (6000, 10**9))
    assert small.vocab_size < large.vocab_size


def command(*arguments, **options):
    code = "import sys; from moda_jax.cli import command; sys.exit(command())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, **options,
    )  # fmt: skip


def test_the_command(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [SAMPLE])
    first = command("prepare", source, "--output", tmp_path / "out", "--vocab-size", 400)
    assert first.returncode == 0, first.stderr
    assert "training a tokenizer of 400 tokens" in first.stdout
    assert "1 documents" in first.stdout
    again = command("prepare", source, "--output", tmp_path / "out", "--vocab-size", 400)
    assert "training" not in again.stdout
    assert "(1 kept)" in again.stdout
    index, documents = read(tmp_path / "out")
    assert index["tokenizer"]["vocab_size"] == 400
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.decode(documents[0]) == SAMPLE
    shown = command("--help").stdout
    assert "moda-jax train" in shown
    assert "moda-jax prepare" in shown


def test_mistakes_on_the_command_line_are_one_line(capsys, tmp_path):
    from moda_jax.data.prepare_command import main

    for arguments, message in (
        (["nowhere", "--output", str(tmp_path / "out")], "which does not exist"),
        ([str(tmp_path)], "--output"),
        (["stdlib", "--output", "x", "--on-error", "go"], "stop"),
        (["stdlib", "--output", "x", "--vocab-size", "300", "--tokenizer", "t"], "--vocab-size"),
        (["stdlib", "--output", "x", "--tokenizer", "no/file"], "tokenizer.json"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_ctrl_c_is_one_line(tmp_path, bpe):
    source = write_jsonl(tmp_path / "a.jsonl", [SAMPLE * 100] * 6)
    process = subprocess.Popen(
        [sys.executable, "-m", "moda_jax.data.prepare", source, "--output", str(tmp_path / "out"),
         "--tokenizer", bpe],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not list((tmp_path / "out").glob("*.partial")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_importing_the_package_imports_no_jax():
    code = (
        "import sys, moda_jax; assert 'generate' in dir(moda_jax); assert 'jax' not in sys.modules;"
        "from moda_jax import ModelConfig, generate; import moda_jax.model.generation as g;"
        "assert moda_jax.generate is generate is g.generate; moda_jax.ops.attention;"
        "print(sorted(set(moda_jax.__all__) ^ set(moda_jax._MODULES)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                            check=True)  # fmt: skip
    assert result.stdout == "[]\n"


texts = st.text(max_size=20)
values = st.recursive(
    st.none() | texts,
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["text", "a"]), inner),
    max_leaves=4,
)
json_lines = st.lists(
    st.one_of(
        texts.map(lambda text: json.dumps({"text": text}).encode()),
        texts.map(lambda text: f'{{"text": "{text}"}}'.encode("utf-8", "surrogatepass")),
        st.binary(max_size=20),
        st.sampled_from([b"", b"  ", b"{}", b"[]", b'{"text": null}', b"\xef\xbb\xbf{}", b"null"]),
        values.map(lambda value: json.dumps(value).encode()),
    ),
    max_size=8,
)


@settings(
    deadline=None, max_examples=150, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(lines=json_lines, end=st.sampled_from([b"\n", b"\r\n"]))
def test_any_lines_give_their_texts_or_an_error(tmp_path, lines, end):
    """A specification in a few lines, of what is in a .jsonl file."""
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(end.join(lines))
    found, expected = [], []
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            try:
                text = json.loads(line.decode("utf-8-sig"))["text"]
                text.encode("utf-8")
                expected.append(text)
            except (ValueError, TypeError, KeyError, AttributeError, IndexError):
                expected.append(None)
    size = path.stat().st_size
    (unit,) = units.plan_source(str(path), text_field="text").units if size else (None,)
    if unit is not None:
        for document in units.read_unit(unit, "text"):
            try:
                text = "".join(document.parts())
                units.encode_utf8(text, document.name)
                found.append(text)
            except units.BadRecord as error:
                assert str(path) in str(error)  # noqa: PT017  (among documents that are good)
                found.append(None)
    assert found == expected


MEMORY = """
import resource, sys
from pathlib import Path
from moda_jax.data.shards import Job, write_shard
from moda_jax.data.tokenizer import load_tokenizer
from moda_jax.data.units import Piece, Unit
size = Path(sys.argv[1]).stat().st_size
unit = Unit("texts", (Piece(sys.argv[1], 0, size),), size)
job = Job(sys.argv[2], "text", "stop", None, sys.argv[3] != "bytes")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
entry = write_shard(job, load_tokenizer(sys.argv[3]), 0, unit)
print(entry["documents"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_document_of_100_megabytes_takes_little_memory(tmp_path, name, bpe):
    text = SAMPLE
    path = tmp_path / "long.txt"
    path.write_text(text * (100_000_000 // len(text) + 1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_bytes(Path(bpe).read_bytes())
    tokenizer = name if name == "bytes" else str(tmp_path / "out" / "tokenizer.json")
    output = subprocess.check_output(
        [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "out"), tokenizer],
        cwd=ROOT, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    documents, kilobytes = map(int, output.split())
    assert documents == 1
    assert kilobytes < 300_000


MENDED = ["sizes.npy", "ends.npy", "index.json", "shard-00000.array_record"]


@pytest.mark.parametrize("name", MENDED)
@pytest.mark.parametrize("how", ["gone", "changed"])
def test_preparing_again_mends_a_finished_folder(tmp_path, name, how):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    run(source, tmp_path / "out")
    before = content(tmp_path / "out")
    path = tmp_path / "out" / name
    if how == "gone":
        path.unlink()
    else:
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    run(source, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_the_cache_mends_a_folder_that_lost_a_shard(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    options = {"tokenizer": load_tokenizer("bytes"), "say": lambda line: None}
    folder = prepared_folder(source, tmp_path / "cache", **options)
    before = content(folder)
    (folder / "shard-00000.array_record").unlink()
    assert prepared_folder(source, tmp_path / "cache", **options) == folder
    assert content(folder) == before


def test_the_cache_never_has_other_content_under_a_name(tmp_path, monkeypatch):
    """The text is edited between its hash and its preparation, then put back."""
    source = Path(write_jsonl(tmp_path / "a.jsonl", ["one", "two"]))
    first, status = source.read_bytes(), source.stat()
    options = {"tokenizer": load_tokenizer("bytes"), "say": lambda line: None}

    def edit_and_prepare(*args, **kwargs):
        write_jsonl(source, ["other", "texts"])
        return prepare(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("moda_jax.data.cache.prepare", edit_and_prepare)
        with pytest.raises(ValueError, match="to stay as it is while it is prepared"):
            prepared_folder(str(source), tmp_path / "cache", **options)
    source.write_bytes(first)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    folder = prepared_folder(str(source), tmp_path / "cache", **options)
    assert texts_of(folder) == ["one", "two"]


def test_skipping_reads_the_same_cache_where_nothing_was_skipped(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    options = {"tokenizer": load_tokenizer("bytes"), "say": lambda line: None}
    folders = {
        prepared_folder(source, tmp_path / "cache", on_error=way, **options)
        for way in ("stop", "skip", "stop")
    }
    assert len(folders) == 1
    Path(source).write_bytes(Path(source).read_bytes() + b"{")
    skipping = prepared_folder(source, tmp_path / "cache", on_error="skip", **options)
    with pytest.raises(ValueError, match=r"a\.jsonl:3"):
        prepared_folder(source, tmp_path / "cache", on_error="stop", **options)
    assert skipping not in folders


def test_a_folder_of_one_text_and_that_text_are_two_things(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("a line\n" * 50)
    run(tmp_path / "one", tmp_path / "out")
    assert len(texts_of(tmp_path / "out")) == 1
    run(tmp_path / "one" / "a.txt", tmp_path / "out")
    assert len(texts_of(tmp_path / "out")) > 10


@pytest.mark.parametrize("line", [b"# coding: uft-8\n", b"# coding: rot13\n", b"x = '\xff'\n"])
def test_python_files_of_no_known_encoding_are_bad_records(tmp_path, monkeypatch, line):
    (tmp_path / "a.py").write_bytes(line)
    (tmp_path / "b.py").write_text("print(1)\n")
    monkeypatch.setitem(units.NAMED, "stdlib", lambda: sorted(tmp_path.glob("*.py")))
    with pytest.raises(ValueError, match=r"expected UTF-8 text, got .*a\.py"):
        run("stdlib", tmp_path / "out")
    assert run("stdlib", tmp_path / "out", on_error="skip").skipped == 1
    assert texts_of(tmp_path / "out") == ["print(1)\n"]


def test_a_section_ends_whatever_the_bytes():
    """Three bytes after its limit at most; it went on while no character began."""
    content = b"a" + b"\x80" * 1000
    assert units.rest_of_line(io.BytesIO(content), 10) == content[:13]
    assert units.rest_of_line(io.BytesIO("東京".encode()), 4).decode() == "東京"


def test_a_long_last_line_is_looked_for_once(tmp_path, small_units, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", ["one", "x" * 100_000])
    calls = []
    find = units._next_line
    monkeypatch.setattr(units, "_next_line", lambda *args: calls.append(args) or find(*args))
    units.plan_source(str(tmp_path / "a.jsonl"), text_field="text")
    assert len(calls) == 1


def test_an_index_of_something_else_is_a_file_of_the_text(tmp_path):
    write_folder(tmp_path / "texts", ["one", "two"])
    (tmp_path / "texts" / "index.json").write_text('{"title": "a site"}')
    run(tmp_path / "texts", tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["one", "two"]
    with pytest.raises(ValueError, match="which holds other files"):
        run(tmp_path / "texts", tmp_path / "texts")


def test_a_copied_folder_is_a_prepared_one(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    run(source, tmp_path / "out")
    (tmp_path / "out" / "prepare.lock").unlink()
    assert run(source, tmp_path / "out").kept_shards == 1
