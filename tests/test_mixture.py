"""Mixtures of sources: shares, validation by source, exact resumption."""

import collections
import itertools

import numpy as np
import pytest

from moda_jax.config import DataConfig, SourceConfig, dataclass_from_json, to_json
from moda_jax.data.order import share_out
from tests.corpora import (
    assert_batches_equal,
    expected_pieces,
    joined,
    load,
    pieces_of,
    take,
    write_jsonl,
)


@pytest.fixture
def sources(tmp_path):
    """Documents that fill one row each, of letters and of digits."""
    letters = [f"{i:02d}" + "a" * 13 for i in range(40)]
    digits = [f"{i:02d}" + "0" * 13 for i in range(20)]
    return (
        SourceConfig("letters", write_jsonl(tmp_path / "letters.jsonl", letters), weight=3),
        SourceConfig("digits", write_jsonl(tmp_path / "digits.jsonl", digits), weight=1),
    )


def kinds(batch):
    return collections.Counter(chr(piece[-2]) for piece in pieces_of(batch))


def test_shares_by_hand():
    assert share_out([0, 0], [3, 1], 8).tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert share_out([2, 0], [3, 1], 2).tolist() == [1, 0]
    assert share_out([5], [0.1], 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.2, 0.1], [5, 3, 1, 1]])
def test_every_prefix_has_its_shares_up_to_a_row(weights):
    order = share_out([0] * len(weights), weights, 1000)
    counts = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, 1001)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - wanted).max() < 1 + 1e-9


def test_batches_have_their_shares(sources):
    data = load(None, sources=sources, batch_size=8)
    for batch in take(data.train, 30):
        assert kinds(batch) == {"a": 6, "0": 2}


def test_each_source_has_epochs_of_its_own(sources):
    data = load(None, sources=sources, batch_size=8)
    letters, digits = (source.train_documents for source in data.sources)
    pieces = list(itertools.chain(*map(pieces_of, take(data.train, 100))))
    for kind, count in ((ord("a"), letters), (ord("0"), digits)):
        found = [piece for piece in pieces if piece[-2] == kind]
        for start in range(0, len(found) - count, count):
            assert len(set(found[start : start + count])) == count


def test_validation_is_by_source(sources):
    data = load(None, sources=sources)
    for number, kind in enumerate("a0"):
        batches = list(data.validation(100, number))
        assert set(kinds(joined(batches))) == {kind}
    assert data.describe().splitlines()[0].startswith("75.0% letters, ")


def test_a_source_with_a_validation_text(sources, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", ["xyz", "zyx"])
    first, second = sources
    second = SourceConfig("digits", second.path, validation=other)
    data = load(None, sources=(first, second))
    pieces = set(itertools.chain(*map(pieces_of, data.validation(9, 1))))
    assert pieces == set(expected_pieces(["xyz", "zyx"]))
    assert data.sources[1].train_documents == 20


def test_a_mixture_resumes_on_other_processes(sources):
    def open_part(index, count):
        return load(None, sources=sources, batch_size=6,
                    process_index=index, process_count=count).train  # fmt: skip

    whole = open_part(0, 1)
    take(whole, 7)
    state = whole.get_state()
    expected = take(whole, 5)
    parts = [open_part(i, 3) for i in range(3)]
    for part in parts:
        part.set_states([state])
    for batch in expected:
        assert_batches_equal(joined([next(part) for part in parts]), batch)


def test_other_weights_are_refused(sources):
    state = load(None, sources=sources).train.get_state()
    changed = (sources[0], SourceConfig("digits", sources[1].path, weight=2))
    with pytest.raises(ValueError, match="checkpoint's weights = "):
        load(None, sources=changed).train.set_states([state])


def test_config_of_a_mixture_comes_back(sources):
    config = DataConfig(source=None, sources=sources)
    assert dataclass_from_json(to_json(config), DataConfig) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "x"}, "source: expected None beside data.sources, got 'x'"),
        ({"validation": "x"}, "validation: expected None beside data.sources"),
        ({"sources": ()}, "source: expected a text, or data.sources"),
    ],
)
def test_bad_settings(sources, settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"source": None, "sources": sources, **settings})


def test_bad_sources(sources):
    with pytest.raises(ValueError, match="sources: expected different names"):
        DataConfig(source=None, sources=(sources[0], sources[0]))
    with pytest.raises(ValueError, match=r"SourceConfig\.name: expected letters, digits"):
        SourceConfig("a/b", "x")
    with pytest.raises(ValueError, match=r"SourceConfig\.weight: expected a positive number"):
        SourceConfig("a", "x", weight=0)
    with pytest.raises(ValueError, match="validation: expected None or a non-empty string, got ''"):
        SourceConfig("a", "x", validation="")
    with pytest.raises(ValueError, match="validation: expected None or a non-empty string, got ''"):
        DataConfig(validation="")
    with pytest.raises(ValueError, match="sources: expected a tuple, each a SourceConfig"):
        DataConfig(source=None, sources=("x",))
