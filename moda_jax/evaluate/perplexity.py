"""Perplexity and bits per byte of texts, by source.

A document is read alone, as in training with packed documents: after the end-of-document token,
which is not predicted itself, neither before the text nor after it. So the first token counts, and
the sum is the text's own: divided by its bytes it compares models with different tokenizers.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moda_jax.data.sections import sections_of
from moda_jax.data.tokenizer import Tokenizer
from moda_jax.data.units import SourcePlan, encode_utf8, plan_source, read_unit
from moda_jax.evaluate.scoring import Report, Row, Scorer
from moda_jax.evaluate.windows import text_rows
from moda_jax.train.validation import perplexity

_GATHERED_TOKENS = 1 << 20
"""Rows are gathered up to so many tokens, so that those of one length meet."""


class TextLoss(NamedTuple):
    """Sums over a source."""

    documents: int
    tokens: int
    """Predicted ones."""
    num_bytes: int
    """Of the text in UTF-8."""
    nats: float
    """-Σ log p(token)"""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e^loss"""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes"""
        return self.nats / math.log(2) / self.num_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "loss": self.loss,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
        }


class Text(NamedTuple):
    """A document, read."""

    text: str
    num_bytes: int


def read_texts(source: str, *, text_field: str, max_bytes: int | None = None) -> Iterator[Text]:
    """The documents of a source, as `moda_jax.data.units.list_files` describes it.

    A .txt file is one document. Blank documents are left out, as in training. Only the first
    `max_bytes` of the text are read, to the end of a character: the same text for every tokenizer.

    Raises ValueError for a source that cannot be used; the iterator, for one without text or for a
    document that cannot be used.
    """
    return _read(source, plan_source(source, text_field=text_field), text_field, max_bytes)


def _read(source: str, units: SourcePlan, text_field: str, max_bytes: int | None) -> Iterator[Text]:
    is_empty = True
    documents = (document for unit in units.units for document in read_unit(unit, text_field))
    left = math.inf if max_bytes is None else max_bytes
    if units.is_one_text:
        parts = ((part, document.name) for document in documents for part in document.parts())
        texts: Iterable[Iterable[tuple[str, Any]]] = [parts]
    else:
        texts = (((part, document.name) for part in document.parts()) for document in documents)
    for text in texts:
        kept, size = [], 0
        for part, name in text:
            content = encode_utf8(part, name)
            if len(content) > left - size:
                content = content[: int(left - size)]
                part = content.decode("utf-8", errors="ignore")  # not a part of a character
                content = part.encode("utf-8")
                left = size + len(content)
            kept.append(part)
            size += len(content)
            if size >= left:
                break
        left -= size
        whole = "".join(kept)
        if whole.strip():
            is_empty = False
            yield Text(whole, size)
        if left <= 0:
            break
    if is_empty:
        ignored = f" (and {units.ignored}, which are not read)" if units.ignored else ""
        raise ValueError(f"{source}: expected text, got none but blank documents{ignored}")


def tokenize(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of `text`; a long one is cut where that changes none of them."""
    sections = list(sections_of(tokenizer)([text]))
    return np.concatenate(tokenizer.encode_batch(sections))


def measure(
    scorer: Scorer,
    tokenizer: Tokenizer,
    texts: Iterable[Text],
    *,
    window: int,
    stride: int,
    report: Report = lambda done, total: None,
) -> TextLoss:
    """The loss of `texts`, each read alone in windows (`moda_jax.evaluate.windows`).

    Args:
        scorer: of the model.
        tokenizer: the one that the model was trained with.
        texts: not blank.
        window: most tokens that the model reads at a time.
        stride: by how much a window goes on; `window` makes chunks.
        report: is told rows that are done, and those that were gathered so far.

    Raises ValueError for a bad window or stride, if there is no text, or if its probability is 0.
    """
    documents = tokens = num_bytes = done = 0
    sums: list[float] = []
    rows: list[Row] = []
    gathered = 0

    def compute() -> None:
        nonlocal done
        before = done
        scores = scorer.score(rows, lambda now, _: report(before + now, before + len(rows)))
        sums.extend(-found.log_prob.sum(dtype=np.float64) for found in scores)
        done += len(rows)
        rows.clear()

    for text in texts:
        ids = tokenize(tokenizer, text.text).tolist()
        documents, tokens, num_bytes = documents + 1, tokens + len(ids), num_bytes + text.num_bytes
        for row in text_rows(ids, tokenizer.eos_id, window, stride):
            rows.append(row)
            gathered += len(row.tokens)
            if gathered >= _GATHERED_TOKENS:
                compute()
                gathered = 0
    compute()
    if not tokens:
        raise ValueError("texts: expected at least one token, got none")
    if not math.isfinite(nats := math.fsum(sums)):
        raise ValueError("texts: expected a probability above 0 for every token, got 0 for some")
    return TextLoss(documents, tokens, num_bytes, nats)


def summarize(losses: dict[str, TextLoss]) -> dict[str, Any]:
    """Results by source, and the mean over sources of perplexity and bits per byte.

    As in the paper's Table 5, the mean is that of perplexities, each source counting once.
    """
    found = list(losses.values())
    return {
        "sources": {name: loss.to_json() for name, loss in losses.items()},
        "mean": {
            "perplexity": math.fsum(loss.perplexity for loss in found) / len(found),
            "bits_per_byte": math.fsum(loss.bits_per_byte for loss in found) / len(found),
        },
    }


def table(losses: dict[str, TextLoss]) -> Sequence[tuple[str, ...]]:
    """Cells of a table, a row a source, its header first and the mean last."""
    mean = summarize(losses)["mean"]
    rows = [("source", "perplexity", "bits/byte", "nats/token", "documents", "tokens", "bytes")]
    rows += [
        (
            name, f"{loss.perplexity:.3f}", f"{loss.bits_per_byte:.4f}", f"{loss.loss:.4f}",
            f"{loss.documents:,}", f"{loss.tokens:,}", f"{loss.num_bytes:,}",
        )
        for name, loss in losses.items()
    ]  # fmt: skip
    mean_row = ("mean", f"{mean['perplexity']:.3f}", f"{mean['bits_per_byte']:.4f}", *[""] * 4)
    return [*rows, mean_row] if len(losses) > 1 else rows
