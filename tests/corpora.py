"""Small corpora for tests, and what their batches must hold."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
from hypothesis import HealthCheck, settings

from moda_jax.config import DataConfig
from moda_jax.data.loader import load_data

EOS = 256
FUZZ = settings(
    max_examples=40,
    derandomize=True,  # the same cases in every run: a new one would fail somebody else's change
    deadline=None,
    suppress_health_check=list(HealthCheck),  # they are about time
)
_CACHE = tempfile.TemporaryDirectory(prefix="moda-jax-tests-")


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


def write_tokenizer(path, tokens):
    """A tokenizer.json that gives `tokens` their place as id; "a" stands for unknown words."""
    vocabulary = {token: i for i, token in enumerate([*tokens, "<eos>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(path))
    return str(path)


def load(source, *, batch_size=4, vocab_size=257, seed=0, process_index=0, process_count=1, **data):
    data = {"seq_len": 16, "validation_fraction": 0.3, **data}
    return load_data(
        DataConfig(source=source, **data),
        batch_size=batch_size,
        vocab_size=vocab_size,
        seed=seed,
        cache_dir=Path(_CACHE.name),
        process_index=process_index,
        process_count=process_count,
        say=lambda line: None,
    )


def joined(parts):
    """The global batch of several processes' ones."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
