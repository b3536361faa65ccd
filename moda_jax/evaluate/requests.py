"""What lm-evaluation-harness asks a model, answered without the harness.

Tokens of a context and its continuation, windows of a long text and what is left of a context that
is too long follow the harness's own adapter for Hugging Face models, so that scores compare.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moda_jax.data.tokenizer import Tokenizer, decode_continuation
from moda_jax.evaluate.scoring import Report, Row, Scorer, bucket_length
from moda_jax.evaluate.windows import text_rows
from moda_jax.model.generation import generate
from moda_jax.ops.checks import check_int

MAX_GEN_TOKENS = 256
"""Where a request does not say; the harness's default."""

_STOP_TOKENS = 64  # their number is padded to a multiple, so that few are compiled


class Likelihood(NamedTuple):
    """Of a continuation."""

    log_prob: float
    """Σ log p(token), natural logarithm."""
    is_greedy: bool
    """Every token of it is the likeliest one."""


class Requester:
    """A model that answers requests: `loglikelihood`, `loglikelihood_rolling`, `generate_until`.

    Args:
        scorer: of the model.
        tokenizer: the one that the model was trained with.
        max_length: most tokens that the model reads at a time.
        add_bos_token: contexts begin with the end-of-document token, as documents do in training
            here. The harness's default for models without a token of their own for it is False.
        say: hears, in a line, what was cut.
        track: makes the report of each kind of request: a name and their number go in.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        add_bos_token: bool = False,
        say: Callable[[str], None] = lambda line: None,
        track: Callable[[str], Report] = lambda name: lambda done, total: None,
    ) -> None:
        self._scorer, self._tokenizer = scorer, tokenizer
        self.max_length = check_int("max_length", max_length, 1)
        self._add_bos_token = add_bos_token
        self._say, self._track = say, track
        self.num_rows = 0
        """Sequences that the model read for log-probabilities; requests share some."""

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each (context, continuation), in order.

        A context that is too long loses its beginning. Raises ValueError for a continuation without
        tokens or with more than `max_length`.
        """
        pairs = encode_pairs(self._tokenizer, requests, add_bos_token=self._add_bos_token)
        sequences, counts, num_cut = [], [], 0
        for (context, continuation), request in zip(pairs, requests, strict=True):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"expected a continuation of 1 to max_length ({self.max_length}) tokens, got "
                    f"{len(continuation)} in {request[1][:80]!r}"
                )
            whole = np.concatenate((context, continuation))[-self.max_length - 1 :]
            num_cut += len(whole) < len(context) + len(continuation)
            sequences.append(whole)
            counts.append(len(continuation))
        if num_cut:
            self._say(
                f"{num_cut:,} of {len(requests):,} contexts lose their beginning: longer than "
                f"max_length, {self.max_length} tokens"
            )
        rows, places = shared_rows(sequences, counts)
        self.num_rows += len(rows)
        scores = self._scorer.score(rows, self._track("loglikelihood"))
        return [
            Likelihood(
                float(scores[row].log_prob[part].sum(dtype=np.float64)),
                bool(scores[row].is_greedy[part].all()),
            )
            for row, part in places
        ]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """log p of each whole text after the end-of-document token, in nats; 0 if it is empty.

        Texts longer than `max_length` are read in chunks, the last one as long as the others.
        """
        rows, lengths = [], []
        for ids in _encode(self._tokenizer, texts):
            prefix = self._tokenizer.eos_id
            new = list(text_rows(ids.tolist(), prefix, self.max_length, self.max_length))
            rows += new
            lengths.append(len(new))
        self.num_rows += len(rows)
        scores = iter(self._scorer.score(rows, self._track("loglikelihood_rolling")))
        return [
            float(sum(s.log_prob.sum(dtype=np.float64) for s in itertools.islice(scores, length)))
            for length in lengths
        ]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The continuation of each (context, settings), up to the first stop string or eos.

        Settings: until (a string or several), max_gen_toks, do_sample, temperature, top_k, top_p.
        The likeliest tokens are taken unless do_sample is true, or it is not given and the
        temperature is above 0. A context longer than max_length - max_gen_toks loses its beginning.

        Raises ValueError for other settings.
        """
        report = self._track("generate_until")
        settings = [_Generation.of(kwargs) for _, kwargs in requests]
        prompts: list[list[int]] = []
        contexts = _encode(self._tokenizer, [context for context, _ in requests])
        for ids, setting in zip(contexts, settings, strict=True):
            room = self.max_length - setting.max_gen_toks
            if room < 1:
                raise ValueError(
                    f"max_gen_toks: expected less than max_length, {self.max_length}, got "
                    f"{setting.max_gen_toks}"
                )
            first = [self._tokenizer.eos_id] if self._add_bos_token or not len(ids) else []
            prompts.append([*first, *ids.tolist()][-room:])
        groups: dict[_Generation, list[int]] = {}
        for number, setting in enumerate(settings):
            groups.setdefault(setting, []).append(number)
        texts = [""] * len(requests)
        done = 0
        for setting, members in groups.items():
            members.sort(key=lambda number: len(prompts[number]), reverse=True)
            stop_tokens = self._stop_tokens(setting.until)
            length = bucket_length(len(prompts[members[0]])) + setting.max_gen_toks
            size = self._scorer.batch_rows(length, len(members))
            while members:
                batch, members = members[:size], members[size:]
                # As many rows in every batch: fewer sizes are compiled, and a copy ends in time.
                padding = batch[-1:] * (size - len(batch))
                with jax.set_mesh(self._scorer.mesh):
                    found = generate(
                        self._scorer.model,
                        [prompts[number] for number in (*batch, *padding)],
                        max_new_tokens=setting.max_gen_toks,
                        temperature=setting.temperature,
                        top_k=setting.top_k,
                        top_p=setting.top_p,
                        stop_tokens=stop_tokens,
                    )
                for number, tokens in zip(batch, found, strict=False):
                    text = decode_continuation(self._tokenizer, prompts[number], tokens)
                    texts[number] = _cut(text, setting.until)
                done += len(batch)
                report(done, len(requests))
        return texts

    def _stop_tokens(self, until: tuple[str, ...]) -> list[int]:
        """Tokens after which a stop string has been generated for certain: those that hold one.

        Where a stop string is spread over several tokens, generation goes on and is cut later.
        """
        eos_id = self._tokenizer.eos_id
        vocabulary = range(self._tokenizer.vocab_size)
        texts = (self._tokenizer.decode([token]) for token in vocabulary) if until else ()
        found = [
            token
            for token, text in enumerate(texts)
            if token != eos_id and any(stop in text for stop in until)
        ]
        return [eos_id] * (1 + -(len(found) + 1) % _STOP_TOKENS) + found


class _Generation(NamedTuple):
    """Settings of a `generate_until` request."""

    until: tuple[str, ...]
    max_gen_toks: int
    temperature: float
    top_k: int | None
    top_p: float | None

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> "_Generation":
        known = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
        if unknown := sorted(set(kwargs).difference(known)):
            raise ValueError(f"expected settings among {', '.join(known)}, got {unknown}")
        until = kwargs.get("until") or ()
        temperature = kwargs.get("temperature")
        do_sample = kwargs.get("do_sample")
        if do_sample is None:
            do_sample = bool(temperature)
        if not do_sample:
            temperature = 0.0
        return cls(
            (until,) if isinstance(until, str) else tuple(filter(None, until)),
            check_int("max_gen_toks", kwargs.get("max_gen_toks", MAX_GEN_TOKENS), 1),
            1.0 if temperature is None else float(temperature),
            kwargs.get("top_k"),
            kwargs.get("top_p"),
        )


def _cut(text: str, until: Iterable[str]) -> str:
    """`text` before the first of the stop strings."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=None)]


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, add_bos_token: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids of each context and of its continuation.

    As the harness does: spaces at the context's end go to the continuation, both are tokenized
    together, and the continuation's tokens are those after as many as the context has alone. A
    context without tokens is the end-of-document token, before which nothing is known.
    """
    texts = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        texts.append((stripped, context[len(stripped) :] + continuation))
    contexts = list(dict.fromkeys(context for context, _ in texts))
    alone = dict(zip(contexts, _encode(tokenizer, contexts), strict=True))
    whole = _encode(tokenizer, [context + continuation for context, continuation in texts])
    found = []
    for (context, _), ids in zip(texts, whole, strict=True):
        count = len(alone[context])
        first = [tokenizer.eos_id] if add_bos_token or not count else []
        found.append((np.array([*first, *ids[:count]], np.int32), ids[count:].astype(np.int32)))
    return found


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    return tokenizer.encode_batch(texts) if texts else []


def shared_rows(
    sequences: Sequence[np.ndarray], counts: Sequence[int]
) -> tuple[list[Row], list[tuple[int, list[int]]]]:
    """Rows in which the last `counts` tokens of each sequence are predicted.

    What the model reads of a sequence is all but its last token. Where that is the beginning of
    what it reads of another, both share a row: the answers A to D of one question, for instance,
    or two answers that differ in their last word. What both ask is asked once.

    Returns the rows and, for each sequence, its row and which of the row's scores are its own.
    """
    # Big-endian ids sort as the sequences do, and those with one beginning are neighbours.
    spelled = [np.asarray(ids[:-1], ">u4").tobytes() for ids in sequences]
    rows: list[tuple[list[int], dict[tuple[int, int], int]]] = []
    places: list[tuple[int, list[int]]] = [(0, [])] * len(sequences)
    longest = None
    for number in sorted(range(len(sequences)), key=spelled.__getitem__, reverse=True):
        ids, count = sequences[number].tolist(), counts[number]
        if longest is None or not longest.startswith(spelled[number]):
            longest = spelled[number]
            rows.append((ids[:-1], {}))
        _, asked = rows[-1]
        first = len(ids) - count
        pairs = enumerate(ids[first:], start=first - 1)
        places[number] = len(rows) - 1, [asked.setdefault(pair, len(asked)) for pair in pairs]
    return [
        Row(tokens, [place for place, _ in asked], [target for _, target in asked])
        for tokens, asked in rows
    ], places
