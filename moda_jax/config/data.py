"""The settings of what a run reads."""

import dataclasses
from typing import Literal

from moda_jax.config.checks import require, require_positive, require_types


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One text of a mixture."""

    name: str
    """Under which its validation loss is logged."""
    path: str
    """As `DataConfig.source`."""
    weight: float = 1.0
    """Its share of the rows is weight / sum of weights."""
    validation: str | None = None
    """As `DataConfig.validation`."""

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "weight")
        name_ok = self.name.replace("_", "").replace("-", "").isalnum()
        require(self, "name", name_ok, "letters, digits, '-' and '_'")
        require(self, "path", bool(self.path), "a non-empty string")
        require(self, "validation", self.validation != "", "None or a non-empty string")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut into rows."""

    source: str | None = "stdlib"
    """"stdlib" (the Python standard library's source on this machine), a .txt file (one text, its
    end held out), a .jsonl file (also .gz, .zst, .xz), a .parquet file, a folder of .txt or else
    of these, a local Hugging Face dataset, or a folder that `moda-jax prepare` wrote. None: there
    are `sources`."""
    sources: tuple[SourceConfig, ...] = ()
    """A mixture of texts, in place of `source`."""
    validation: str | None = None
    """A text to validate on, as `source`; None: a part of `source` is held out."""
    text_field: str = "text"
    """The field of a record that holds the document."""
    tokenizer: str = "bytes"
    """"bytes", or the path of a local tokenizer.json."""
    eos_token: str | None = None
    """The token of a tokenizer.json that stands between documents; None: one of the usual names."""
    seq_len: int = 256
    """T: target tokens per row."""
    validation_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of their content; of one text, its end.
    Of texts without a validation text of their own."""
    packing: Literal["documents", "contiguous"] = "documents"
    """documents: pieces of documents, each a segment of its own, are packed into rows. contiguous:
    the stream of all documents is cut every T tokens, and attention sees what stands before."""
    shuffle_tokens: int = 1 << 24
    """Tokens of whole documents, in random order, that are packed and shuffled together;
    contiguous rows are shuffled over all."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a record of text, or a block of prepared text, that cannot be read."""

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "seq_len", "shuffle_tokens")
        require(self, "validation_fraction", 0 < self.validation_fraction < 1, "0 < fraction < 1")
        for field in ("text_field", "tokenizer"):
            require(self, field, bool(getattr(self, field)), "a non-empty string")
        require(self, "validation", self.validation != "", "None or a non-empty string")
        if self.sources:
            require(self, "source", self.source is None, "None beside data.sources")
            require(self, "validation", self.validation is None, "None beside data.sources")
            names = [source.name for source in self.sources]
            require(self, "sources", len(set(names)) == len(names), "different names")
        else:
            require(self, "source", bool(self.source), "a text, or data.sources")
        eos_ok = self.eos_token is None or self.tokenizer != "bytes"
        require(self, "eos_token", eos_ok, "None with the byte tokenizer, which has its own")

    @property
    def texts(self) -> tuple[SourceConfig, ...]:
        """The sources, a single one under the name "text"."""
        if self.sources:
            return self.sources
        assert self.source is not None
        return (SourceConfig("text", self.source, validation=self.validation),)
