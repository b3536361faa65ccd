"""A byte-level BPE tokenizer from the documents of a source."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from moda_jax.data.shards import OnError, whole_file
from moda_jax.data.units import BadRecord, Unit, encode_utf8, plan_source, read_unit

END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 500_000_000

_SMALLEST = 257
_PIECE_CHARACTERS = 1 << 14
_MOST_UNITS = 256


def train_tokenizer(
    sources: Sequence[str],
    path: str | Path,
    *,
    vocab_size: int,
    text_field: str = "text",
    sample_bytes: int = SAMPLE_BYTES,
    on_error: OnError = "stop",
    leave_out: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Trains a tokenizer and writes it to `path`, a tokenizer.json.

    Byte-level BPE: every text has tokens, and they are the text again. Words are cut out as GPT-2
    does. The sample is the beginnings of units that lie evenly over each source, so the same
    sources give the same tokenizer; memory grows with the number of different words in it.

    Args:
        sources: as `moda_jax.data.units.list_files` describes; each gives an equal part.
        path: of the new file.
        vocab_size: tokens, END_OF_TEXT and the 256 bytes included; a small source gives fewer.
        text_field: the field of a .jsonl record, or the column, that holds the text.
        sample_bytes: UTF-8 bytes of text to learn from, at most about.
        on_error: what a document that cannot be used does: "stop" raises, "skip" leaves it out.
        leave_out: a folder in that of the source that is not part of it.
        say: takes the messages, one line each.

    Raises:
        ValueError: the vocabulary is too small, or the source cannot be used or holds no text.
    """
    if vocab_size < _SMALLEST:
        raise ValueError(
            f"vocab_size: expected at least {_SMALLEST}, the bytes and {END_OF_TEXT}, "
            f"got {vocab_size}"
        )
    if sample_bytes < 1:
        raise ValueError(f"sample_bytes: expected a positive number, got {sample_bytes}")
    part = max(1, sample_bytes // len(sources))
    plans = [plan_source(name, text_field=text_field, leave_out=leave_out) for name in sources]
    chosen = [_choose(plan.units, part) for plan in plans]
    names = ", ".join(sources)
    say(
        f"training a tokenizer of {vocab_size:,} tokens on at most {sample_bytes / 1e6:,.0f} MB of "
        f"{names}"
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        _sample(units, text_field, max(1, part // max(len(units), 1)), on_error) for units in chosen
    )
    tokenizer.train_from_iterator(itertools.chain.from_iterable(texts), trainer)
    if tokenizer.get_vocab_size() <= _SMALLEST < vocab_size:
        raise ValueError(
            f"DataConfig.source: expected words that repeat, to learn tokens from, got none in "
            f"{names}; give more text"
        )
    with whole_file(Path(path)) as partial:
        partial.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def _choose(units: list[Unit], sample_bytes: int) -> list[Unit]:
    """All units if they fit, else some that lie evenly; each gives an equal share."""
    if sum(unit.size for unit in units) <= sample_bytes or len(units) <= _MOST_UNITS:
        return units
    numbers = np.linspace(0, len(units) - 1, _MOST_UNITS).round().astype(int)
    return [units[number] for number in numbers.tolist()]


def _sample(
    units: list[Unit], text_field: str, unit_bytes: int, on_error: OnError
) -> Iterator[list[str]]:
    """Texts of each unit, at most `unit_bytes` of it, in pieces: a text may be of any length."""
    for unit in units:
        left = unit_bytes
        for document in read_unit(unit, text_field):
            try:
                for part in document.parts():
                    part = part[:left]
                    left -= len(encode_utf8(part, document.name))
                    yield _pieces(part)
                    if left <= 0:
                        break
            except BadRecord:
                if on_error == "stop":
                    raise
            if left <= 0:
                break


def _pieces(text: str) -> list[str]:
    return [text[i : i + _PIECE_CHARACTERS] for i in range(0, len(text), _PIECE_CHARACTERS)]
