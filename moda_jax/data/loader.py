"""Training and validation batches: prepared text, its split, one global order of rows."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from moda_jax.config import DataConfig, SourceConfig
from moda_jax.data.cache import prepared_folder
from moda_jax.data.order import GlobalBatches, Reading, WeightedRows
from moda_jax.data.packing import Batch, ContiguousRows, Cursor, PackedRows, RowStream
from moda_jax.data.prepared import PreparedText, Split, split, whole
from moda_jax.data.tokenizer import Tokenizer, load_tokenizer

_PREFETCHED_BATCHES = 4  # planning a window takes as long as a few steps
_OPEN_SHARDS = 256  # a process may have 1024 files open on many systems
_ORDER = 2
"""Of the rows: a checkpoint of another order cannot go on exactly."""


def _close(opened: list[Any]) -> None:
    while opened:
        opened.pop().close()


class TrainIterator(Iterator[Batch]):
    """Endless training batches of this process, whose state can be saved and restored exactly.

    A background thread reads the next batches; the state is that of the last batch handed out. But
    for what could not be read it is the same in all processes, and does not depend on their number
    or on the batch size.
    """

    def __init__(
        self,
        batches: grain.IterDataset,
        identity: dict[str, Any],
        *,
        process_index: int,
        process_count: int,
    ) -> None:
        self._opened = [iter(batches)]
        self._identity = identity
        self._process = process_index, process_count
        # grain closes its thread in __del__, which fails with a message on standard error when the
        # iterator lives until the interpreter's modules are gone; a finalizer runs before that.
        self._finalizer = weakref.finalize(self, _close, self._opened)

    @property
    def _iterator(self) -> grain.DatasetIterator[Batch]:
        if not self._opened:
            raise ValueError("train: expected an open iterator, got one after close()")
        return self._opened[0]

    @property
    def num_skipped(self) -> int:
        """Pieces of documents that this process could not read, since the run began."""
        return self._iterator.get_state()["skipped"]

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns a JSON-serialisable state; the batches after it are a function of it."""
        return {"identity": dict(self._identity), "rows": self._iterator.get_state()}

    def set_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Continues after the batch at which `states` were taken.

        Args:
            states: of all processes; their number need not be that of now.

        Raises ValueError if they belong to other data: it would give other batches.
        """
        state = states[0]
        saved = state["identity"]
        if saved.get("order") != self._identity["order"]:
            raise ValueError(
                "data: expected a checkpoint whose rows have this version's order, got one of "
                "another version; start a new run from its weights: --name NEW --init-from FOLDER"
            )
        for name, which in (("documents", "training"), ("held_out", "held-out")):
            if saved.get(name) != self._identity[name]:
                raise ValueError(
                    f"data: expected the {which} documents that the run began "
                    f"with (fingerprint {saved.get(name)}), got others "
                    f"({self._identity[name]}): texts were edited, added, removed or renamed, or "
                    f"the split was changed; restore them, or start a new run from this one's "
                    f"weights: --name NEW --init-from FOLDER"
                )
        for name, value in self._identity.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"data: expected the checkpoint's {name} = {saved.get(name)}, got {value}; "
                    f"restore the data settings, or start a new run from this one's weights: "
                    f"--name NEW --init-from FOLDER"
                )
        index, count = self._process
        skipped = [each["rows"]["skipped"] for each in states]
        if len(states) != count:  # the first process answers for those before
            skipped = [sum(skipped)] + [0] * (count - 1)
        self._iterator.set_state(state["rows"] | {"skipped": skipped[index]})

    def close(self) -> None:
        """Stops the background thread; the iterator cannot be used afterwards."""
        self._finalizer()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What a run reads of one text: sizes over all processes."""

    name: str
    path: str
    weight: float
    validation: str | None
    """A text of its own for validation; None: a part of this one is held out."""
    fingerprint: str
    """Of the texts of all documents, in their order."""
    train_documents: int
    validation_documents: int
    num_bytes: int
    """UTF-8 bytes of all documents."""
    train_tokens: int
    """Targets in one epoch: the tokens of the training documents, each one's end included."""
    is_one_text: bool
    """The documents are sections of one text, the held-out ones its last."""
    notes: str
    """What was not read, for the start screen; or empty."""

    def describe(self) -> str:
        """One line for the start screen."""
        unit = "sections of one text" if self.is_one_text else "documents"
        held_out = "last sections" if self.is_one_text else "documents"
        where = f" of {self.validation}" if self.validation else ""
        return (
            f"{self.path}: {self.train_documents:,} {unit}, {self.train_tokens:,} "
            f"tokens an epoch; {self.validation_documents:,} {held_out}{where} held out; "
            f"{self.num_bytes / 1e6:,.1f} MB{self.notes}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads: batches of this process, and what they are made of."""

    tokenizer: Tokenizer
    train: TrainIterator
    sources: tuple[Source, ...]
    held_out: tuple["HeldOut", ...] = dataclasses.field(repr=False)
    """Of each source."""

    @property
    def train_tokens(self) -> int:
        """Targets in one epoch of every source."""
        return sum(source.train_tokens for source in self.sources)

    @property
    def num_skipped_held_out(self) -> int:
        """Pieces that this process could not read in the last validation of each source."""
        return sum(part.num_skipped for part in self.held_out)

    def describe(self) -> str:
        """A line for every source, for the start screen."""
        if len(self.sources) == 1:
            return self.sources[0].describe()
        total = sum(source.weight for source in self.sources)
        return "\n".join(
            f"{source.weight / total:.1%} {source.name}, {source.describe()}"
            for source in self.sources
        )

    def validation(self, num_batches: int, source: int = 0) -> Iterator[Batch]:
        """Yields the first batches of a source's held-out documents, the same ones on every call.

        At most `num_batches`, and no document twice; fewer if the held-out part is smaller, the
        last one filled up with rows of padding. All processes yield equally many: each takes its
        rows of the same global batches, which do not depend on the number of processes.
        """
        if num_batches < 1:
            raise ValueError(f"num_batches: expected a positive number, got {num_batches}")
        return self.held_out[source].batches(num_batches)


@dataclasses.dataclass
class HeldOut:
    """Rows to validate on."""

    text: PreparedText
    rows: RowStream
    reading: Reading
    num_skipped: int = 0
    """Pieces that this process could not read, in the last validation."""

    def batches(self, count: int) -> Iterator[Batch]:
        """The first `count`, or fewer."""
        cursor: Cursor | None = Cursor()
        self.num_skipped = 0
        for _ in range(count):
            if cursor is None:
                return
            pieces, cursor, _ = self.rows.take(cursor, self.reading.batch_size)
            rows = self.reading.rows()
            self.reading.fill(rows, self.text, pieces)
            self.num_skipped += rows.skipped
            yield rows.batch


def _check_sizes(tokenizer: Tokenizer, name: str, *, batch_size: int, vocab_size: int,
                 seed: int, process_count: int) -> None:  # fmt: skip
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"DataConfig.tokenizer: expected at most model.vocab_size = {vocab_size} tokens, got "
            f"{tokenizer.vocab_size} in {name!r}; set --model.vocab-size {tokenizer.vocab_size} "
            f"or more"
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size: expected a positive multiple of the {process_count} processes, "
            f"got {batch_size}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected 0 <= seed < 2**32, got {seed}")


def prepare_sources(
    config: DataConfig, cache_dir: Path, *, workers: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Path]:  # fmt: skip
    """Prepares every text of a config that is not prepared yet; the folders by the texts' paths.

    Raises ValueError, naming file and place, for text that cannot be read.
    """
    texts = [text for source in config.texts for text in (source.path, source.validation)]
    tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    return {
        text: prepared_folder(
            text,
            cache_dir,
            tokenizer=tokenizer,
            text_field=config.text_field,
            on_error=config.on_error,
            workers=workers,
            say=say,
        )
        for text in dict.fromkeys(texts)
        if text is not None
    }


def load_data(
    config: DataConfig,
    *,
    batch_size: int,
    vocab_size: int,
    seed: int,
    cache_dir: Path,
    process_index: int = 0,
    process_count: int = 1,
    say: Callable[[str], None] = print,
) -> Data:
    """Opens the texts, which are prepared first where they are not, and orders their rows.

    Args:
        config: sources, tokenizer, row length T, share held out, packing.
        batch_size: rows of a batch over all processes; this one gets batch_size / process_count.
        vocab_size: the model's; every token id lies below it.
        seed: order of the training rows, another one in every epoch.
        cache_dir: where prepared text is kept.
        process_index: this process; it reads its own rows.
        process_count: number of processes.
        say: takes lines about preparation.

    Raises:
        ValueError: a text or the tokenizer cannot be used (one line that says what to do), or
            the sizes do not fit. What is damaged in prepared text raises where it is read.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    _check_sizes(tokenizer, config.tokenizer, batch_size=batch_size, vocab_size=vocab_size,
                 seed=seed, process_count=process_count)  # fmt: skip
    count = batch_size // process_count
    local = slice(process_index * count, (process_index + 1) * count)
    reading = Reading(batch_size, local, config.seq_len, config.on_error == "skip")
    folders = prepare_sources(config, cache_dir, say=say)
    described, train, held_out = [], [], []
    # Two readers of a source: training reads in a thread of its own.
    open_shards = max(1, _OPEN_SHARDS // (2 * len(config.texts)))
    cached = config.shuffle_tokens * 5 // 4
    for number, source in enumerate(config.texts):
        text = PreparedText(folders[source.path], cached_tokens=cached, open_shards=open_shards)
        other = PreparedText(folders[source.validation or source.path], open_shards=open_shards)
        if source.validation is None:
            learned, tested = split(text, config.validation_fraction)
            tested = tested._replace(text=other)
        else:
            learned, tested = Split(text, np.arange(len(text))), whole(other)
        described.append(_describe(source, learned, tested))
        rows = _row_stream(learned, config, seed + number * 2**32)
        train.append(WeightedRows(text, rows, source.weight))
        held_out.append(HeldOut(tested.text, _row_stream(tested, config, None), reading))
    identity = {
        "order": _ORDER,
        "documents": "+".join(part.train_fingerprint for part in described),
        "held_out": "+".join(part.held_out_fingerprint for part in described),
        "tokenizer": tokenizer.fingerprint,
        "weights": [source.weight for source in config.texts],
        "seq_len": config.seq_len,
        "packing": config.packing,
        "shuffle_tokens": config.shuffle_tokens,
        "seed": seed,
    }
    batches = grain.experimental.ThreadPrefetchIterDataset(
        GlobalBatches(train, reading), prefetch_buffer_size=_PREFETCHED_BATCHES
    )
    return Data(
        tokenizer=tokenizer,
        train=TrainIterator(
            batches, identity, process_index=process_index, process_count=process_count
        ),
        sources=tuple(part.source for part in described),
        held_out=tuple(held_out),
    )


@dataclasses.dataclass(frozen=True)
class _Described:
    source: Source
    train_fingerprint: str
    held_out_fingerprint: str


def _describe(source: SourceConfig, train: Split, held_out: Split) -> _Described:
    index = train.text.index
    notes = ""
    if index["ignored"]:
        notes += f"; files of other kinds, not read: {index['ignored']}"
    if index["skipped"]:
        notes += f"; records that were skipped: {index['skipped']:,}"
    described = Source(
        name=source.name,
        path=source.path,
        weight=source.weight,
        validation=source.validation,
        fingerprint=index["fingerprint"],
        train_documents=len(train.documents),
        validation_documents=len(held_out.documents),
        num_bytes=index["bytes"],
        train_tokens=train.num_tokens,
        is_one_text=index["is_one_text"],
        notes=notes,
    )
    return _Described(described, train.fingerprint, held_out.fingerprint)


def _row_stream(part: Split, config: DataConfig, seed: int | None) -> RowStream:
    if config.packing == "contiguous":
        return ContiguousRows(part, config.seq_len, seed=seed)
    return PackedRows(part, config.seq_len, window=config.shuffle_tokens, seed=seed)
