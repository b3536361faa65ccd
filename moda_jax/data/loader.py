"""Training and validation batches from a corpus, with grain.

The documents are split by their content, shuffled anew in every epoch, shared out to the processes
and packed into rows: see `packing` for what a batch holds.
"""

import dataclasses
import hashlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from moda_jax.config import DataConfig
from moda_jax.data.corpus import Corpus
from moda_jax.data.packing import Batch, pack
from moda_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

_PREFETCHED_BATCHES = 2
_SAMPLED_DOCUMENTS = 32
_SAMPLED_CHARACTERS = 1 << 16


class _TokenSource:
    """Random access to the tokens of chosen documents (grain's RandomAccessDataSource).

    Element i is [eos] + tokens + [eos], unsigned integers [n + 2], of document `indices[i]`.
    """

    def __init__(
        self, corpus: Corpus, indices: np.ndarray, tokenizer: Tokenizer, vocab_size: int
    ) -> None:
        self._corpus = corpus
        self._indices = indices
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> np.ndarray:
        document = int(self._indices[index])
        tokens = self._tokenizer.encode_document(self._corpus[document])
        # JAX clamps or wraps an index outside the embedding silently, so it must not get there.
        if (largest := tokens.max()) >= self._vocab_size:
            raise ValueError(
                f"DataConfig.tokenizer: expected token ids in [0, {self._vocab_size}), got "
                f"{largest} in {self._corpus.name(document)}; raise --model.vocab-size"
            )
        return tokens


def _train_batches(
    documents: _TokenSource, config: DataConfig, rows: int, seed: int
) -> grain.IterDataset:
    """Endless batches; every epoch has its own order, derived from `seed`."""
    epochs = grain.MapDataset.source(documents).seed(seed).shuffle().repeat()
    return grain.experimental.ThreadPrefetchIterDataset(
        pack(epochs, config, batch_size=rows, seed=seed, num_documents=len(documents)),
        prefetch_buffer_size=_PREFETCHED_BATCHES,
    )


def _close(iterators: list[grain.DatasetIterator[Batch]]) -> None:
    while iterators:
        iterators.pop().close()


class TrainIterator(Iterator[Batch]):
    """Endless training batches of this process, whose state can be saved and restored exactly.

    A background thread prepares the next batches; the state is that of the last batch handed out.
    With several processes each has its own state.
    """

    def __init__(self, batches: grain.IterDataset, identity: dict[str, Any]) -> None:
        self._opened = [iter(batches)]
        self._identity = identity
        # grain closes its thread in __del__, which fails with a message on standard error when the
        # iterator lives until the interpreter's modules are gone; a finalizer runs before that.
        self._finalizer = weakref.finalize(self, _close, self._opened)

    @property
    def _iterator(self) -> grain.DatasetIterator[Batch]:
        if not self._opened:
            raise ValueError("train: expected an open iterator, got one after close()")
        return self._opened[0]

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns a JSON-serialisable state; the batches after it are a function of it."""
        return {"identity": dict(self._identity), "grain": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken.

        Raises ValueError if the state belongs to other data: it would give other batches.
        """
        saved = state["identity"]
        for name, which in (("documents", "training"), ("held_out", "held-out")):
            if saved.get(name) != self._identity[name]:
                raise ValueError(
                    f"data: expected the {which} documents that the run began "
                    f"with (fingerprint {saved.get(name)}), got others "
                    f"({self._identity[name]}): texts were edited, added, removed or renamed, or "
                    f"the split was changed; restore them, or start a new run under another --name"
                )
        for name, value in self._identity.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"data: expected the checkpoint's {name} = {saved.get(name)}, got {value}; "
                    f"restore the data settings, or start a new run under another --name"
                )
        self._iterator.set_state(state["grain"])

    def close(self) -> None:
        """Stops the background thread; the iterator cannot be used afterwards."""
        self._finalizer()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads: batches of this process, and sizes over all processes."""

    tokenizer: Tokenizer
    train: TrainIterator
    source: str
    fingerprint: str
    """Of the texts of all documents, in their order."""
    train_documents: int
    validation_documents: int
    num_bytes: int
    """UTF-8 bytes of all documents."""
    train_tokens: int
    """Targets in one epoch: the tokens of the training documents, each one's end included."""
    tokens_exact: bool
    """False: `train_tokens` is estimated from a sample of the documents."""
    is_one_text: bool
    """The documents are sections of one text, the held-out ones its last."""
    ignored_files: str
    """How many files of other kinds lie in the source's folder, unread."""
    validation_batches: grain.IterDataset = dataclasses.field(repr=False)
    local_rows: slice = dataclasses.field(repr=False)

    def describe(self) -> str:
        """One line for the start screen."""
        about = "" if self.tokens_exact else "about "
        unit = "sections of one text" if self.is_one_text else "documents"
        held_out = "last sections" if self.is_one_text else "documents"
        ignored = f"; files of other kinds, not read: {self.ignored_files}"
        return (
            f"{self.source}: {self.train_documents:,} {unit}, {about}{self.train_tokens:,} "
            f"tokens an epoch; {self.validation_documents:,} {held_out} held out; "
            f"{self.num_bytes / 1e6:,.1f} MB{ignored if self.ignored_files else ''}"
        )

    def validation(self, num_batches: int) -> Iterator[Batch]:
        """Yields the first batches of the held-out documents, the same ones on every call.

        At most `num_batches`, and no document twice; fewer if the held-out part is smaller, the
        last one filled up with rows of padding. All processes yield equally many: each takes its
        rows of the same global batches, which do not depend on the number of processes.
        """
        if num_batches < 1:
            raise ValueError(f"num_batches: expected a positive number, got {num_batches}")
        for batch in itertools.islice(self.validation_batches, num_batches):
            yield {name: array[self.local_rows] for name, array in batch.items()}


def _split_by_position(corpus: Corpus, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the first sections, to train on, and of the last ones, held out."""
    sections = np.arange(len(corpus))
    ends = np.cumsum(corpus.sizes)
    first_held_out = int(np.searchsorted(ends, (1 - fraction) * ends[-1], side="right"))
    first_held_out = min(max(first_held_out, 1), len(sections) - 1)
    if not first_held_out:
        raise ValueError(
            "DataConfig.source: expected a text of at least 2 lines, to hold the last ones out for "
            "validation, got 1; give a longer text"
        )
    return sections[:first_held_out], sections[first_held_out:]


def _split(corpus: Corpus, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the training and the held-out documents.

    A document's part follows from its text alone: it stays when others come, and equal documents
    lie on the same side. If a part would be empty it gets the document with the extreme hash.
    """
    digests = corpus.digests
    held_out = digests < np.uint64(fraction * 2.0**64)
    if not held_out.any():
        held_out = digests == digests.min()
    if held_out.all():
        held_out = digests != digests.max()
    if not held_out.any():
        raise ValueError(
            f"DataConfig.source: expected at least 2 different documents, to hold one out for "
            f"validation, got {len(digests)} with 1 text; add documents or split the file"
        )
    (train,), (validation,) = np.nonzero(~held_out), np.nonzero(held_out)
    # In the order of their hashes, the first few held-out documents are a fair sample of them.
    return train, validation[np.argsort(digests[validation], kind="stable")]


def _fingerprint(digests: np.ndarray) -> str:
    return hashlib.blake2b(digests.tobytes(), digest_size=8).hexdigest()


def _count_tokens(corpus: Corpus, indices: np.ndarray, tokenizer: Tokenizer) -> tuple[int, bool]:
    """Returns the targets in one epoch of the documents `indices`, and whether that is exact."""
    num_bytes = int(corpus.sizes[indices].sum())
    if isinstance(tokenizer, ByteTokenizer):
        return num_bytes + len(indices), True
    sampled_tokens = sampled_bytes = 0
    for index in indices[:: -(-len(indices) // _SAMPLED_DOCUMENTS)]:
        text = corpus[index][:_SAMPLED_CHARACTERS]
        sampled_tokens += len(tokenizer.encode(text))
        sampled_bytes += len(text.encode("utf-8"))
    if not sampled_tokens:
        raise ValueError(
            "DataConfig.tokenizer: expected tokens from the documents, got none for a sample of "
            "them; use a tokenizer that knows their script"
        )
    return round(num_bytes * sampled_tokens / sampled_bytes) + len(indices), False


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


def load_data(
    config: DataConfig,
    *,
    batch_size: int,
    vocab_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Opens the corpus (one pass over it) and builds the batches of this process.

    Args:
        config: source, tokenizer, row length T, share held out, packing.
        batch_size: rows of a batch over all processes; this one gets batch_size / process_count.
        vocab_size: the model's; every token id lies below it.
        seed: order of the training documents, a different one in every epoch.
        process_index: this process; it trains on its own documents.
        process_count: number of processes.

    Raises:
        ValueError: the corpus or the tokenizer cannot be used (one line that says what to do), or
            the sizes do not fit. Token ids outside the vocabulary raise where they are read.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    _check_sizes(tokenizer, config.tokenizer, batch_size=batch_size, vocab_size=vocab_size,
                 seed=seed, process_count=process_count)  # fmt: skip
    corpus = Corpus(config.source, text_field=config.text_field)
    split = _split_by_position if corpus.is_one_text else _split
    train, validation = split(corpus, config.validation_fraction)
    if len(train) < process_count:
        raise ValueError(
            f"DataConfig.source: expected a training document for each of the {process_count} "
            f"processes, got {len(train)}; add documents or use fewer processes"
        )
    train_tokens, tokens_exact = _count_tokens(corpus, train, tokenizer)
    rows = batch_size // process_count
    identity = {
        "documents": _fingerprint(corpus.digests[train]),
        "held_out": _fingerprint(corpus.digests[validation]),
        "tokenizer": tokenizer.fingerprint,
        "seq_len": config.seq_len,
        "packing_bins": config.packing_bins,
        "open_documents": config.open_documents,
        "batch_size": batch_size,
        "seed": seed,
        "process_index": process_index,
        "process_count": process_count,
    }
    local_train = _TokenSource(corpus, train[process_index::process_count], tokenizer, vocab_size)
    held_out = _TokenSource(corpus, validation, tokenizer, vocab_size)
    data = Data(
        tokenizer=tokenizer,
        train=TrainIterator(_train_batches(local_train, config, rows, seed), identity),
        source=config.source,
        fingerprint=_fingerprint(corpus.digests),
        train_documents=len(train),
        validation_documents=len(validation),
        num_bytes=int(corpus.sizes.sum()),
        train_tokens=train_tokens,
        tokens_exact=tokens_exact,
        is_one_text=corpus.is_one_text,
        ignored_files=corpus.ignored,
        validation_batches=pack(
            grain.MapDataset.source(held_out),
            config,
            batch_size=batch_size,
            seed=0,  # the run's seed does not change what is measured
            num_documents=len(held_out),
        ),
        local_rows=slice(process_index * rows, (process_index + 1) * rows),
    )
    if next(data.validation(1), None) is None:
        data.train.close()
        raise ValueError(
            f"DataConfig.source: expected tokens in the documents held out for validation, got "
            f"none in {len(validation)}; add documents or raise --data.validation-fraction"
        )
    return data
