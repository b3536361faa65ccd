"""Where a long document can be cut without changing a token: its sections are tokenized alone.

Only a cut of which that is certain is made. Three things together make it certain:

- every part of the tokenizer works locally: of the normalizers and pre-tokenizers only those that
  are known to (a fixed length, say, counts from the text's beginning), of regular expressions only
  those that neither look behind nor count other characters than digits;
- no token of the vocabulary, added ones included, reaches over such a place as the cut is at, so
  that no merge, no longest match and no best path does;
- around the cut, the tokens of both sides together are those of each side alone. With a regular
  expression that has to hold from several places on: what depends on how many words came before
  then shows.

A section grows until there is such a place; a document without one is one section.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moda_jax.data.tokenizer import JsonTokenizer, Tokenizer

SECTION_CHARACTERS = 1 << 16

_WINDOW = 256
_SEARCHED = 512
_TRIES = 8
_SHIFTS = 8

_LOCAL_NORMALIZERS = {
    "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled",
    "Prepend", "Replace", "Strip", "StripAccents",
}  # fmt: skip
_LOCAL_PRE_TOKENIZERS = {
    "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation",
    "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
}  # fmt: skip
_LOCAL_MODELS = {"BPE", "Unigram", "WordLevel", "WordPiece"}

_SPACES = " ▁"
_WORD_END = r"[\w!-/:-@\[-`{-~。、！？”’）]"
_LETTER = r"[^\W\d_]"


class _Place(NamedTuple):
    """A kind of place at which to cut."""

    text: re.Pattern[str]
    """Matches in a text; it is cut at the end of the match."""
    token: re.Pattern[str]
    """Matches in a token that reaches over such a place."""
    probe: str
    """A text with such a place,"""
    normal: re.Pattern[str]
    """and what normalizing it must leave."""
    dropped: int = 0
    """Characters before the cut that belong to no section: normalizing gives them back."""


_BEFORE_SPACE = _Place(
    re.compile(f"{_WORD_END}(?= {_LETTER})"),
    token=re.compile(rf"[^\s{_SPACES}][{_SPACES}]"),
    probe="ab cd",
    normal=re.compile(rf"ab[{_SPACES}]cd", re.IGNORECASE),
)
_PLACES = (
    _BEFORE_SPACE,
    _Place(
        re.compile(f"{_WORD_END}\n(?={_LETTER})"),
        token=re.compile(r"\n[^\s]"),
        probe="ab\ncd",
        normal=re.compile("ab\ncd", re.IGNORECASE),
    ),
    _BEFORE_SPACE._replace(text=re.compile(f"{_WORD_END} (?={_LETTER})"), dropped=1),
    _Place(
        re.compile(f"。(?={_LETTER})"),
        token=re.compile(r"[。\ufffd][\w\ufffd]"),
        probe="ab。cd",
        normal=re.compile("ab。cd", re.IGNORECASE),
    ),
)


def sections_of(tokenizer: Tokenizer) -> Callable[[Iterable[str]], Iterator[str]]:
    """A function that cuts a text, given in parts, into sections with the tokens of the whole.

    The sections' tokens, one after the other, are those of the whole text. A section has about
    SECTION_CHARACTERS, or more where the tokenizer leaves no certain place to cut.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return _cutter(tokenizer).sections
    return iter  # bytes: a part is as good as any


class _Cutter:
    """Knows a tokenizer's places; studying a vocabulary takes a while, so it is kept."""

    def __init__(self, tokenizer: JsonTokenizer) -> None:
        self._tokenizer = tokenizer
        self._places: Sequence[_Place] | None = None
        self._shifts = 1

    def sections(self, parts: Iterable[str]) -> Iterator[str]:
        held: list[str] = []  # of the section that grows; nothing in it is a place to cut
        text = ""
        for part in _in_pieces(parts):
            text += part
            while len(text) > SECTION_CHARACTERS + _WINDOW:
                found = self._find(text)
                if found is None:
                    # A window's worth stays: a place in what comes is checked with it.
                    held.append(text[: -2 * _WINDOW])
                    text = text[-2 * _WINDOW :]
                    break
                end, start = found
                yield "".join((*held, text[:end]))
                held, text = [], text[start:]
        if held or text:
            yield "".join((*held, text))

    def _find(self, text: str) -> tuple[int, int] | None:
        """The end of a section that begins with `text`, and the start of the next, if any."""
        if self._places is None:
            self._places, self._shifts = self._study()
        end = len(text) - _WINDOW
        for place in self._places:
            # The last places first: they lie in the region that no section has tried before.
            for start in (max(end - _SEARCHED, _WINDOW), _WINDOW):
                found = [match.end() for match in place.text.finditer(text, start, end)]
                if found:
                    break
            for cut in found[: -_TRIES - 1 : -1]:
                if self._is_certain(text, cut - place.dropped, cut):
                    return cut - place.dropped, cut
        return None

    def _is_certain(self, text: str, end: int, start: int) -> bool:
        """Whether the tokens before `end` and those from `start` on are all those around."""
        right = text[start : start + _WINDOW]
        first = max(end - _WINDOW, 0)
        lefts = [text[first:end]]
        for _ in range(1, self._shifts):
            space = text.find(" ", first + 1, end)
            if space < 0:
                break
            first = space
            lefts.append(text[first:end])
        whole = [left + text[end:start] + right for left in lefts]
        try:
            found = self._tokenizer.encode_batch([right, *lefts, *whole])
        except ValueError:  # which tokenizing the section will say, with the document's name
            return False
        count = len(lefts)
        return all(
            np.array_equal(np.concatenate((alone, found[0])), together)
            for alone, together in zip(found[1 : 1 + count], found[1 + count :], strict=True)
        )

    def _study(self) -> tuple[Sequence[_Place], int]:
        """The places that this tokenizer's parts and vocabulary leave, and the shifts to check."""
        assert self._tokenizer.content is not None
        content = json.loads(self._tokenizer.content)
        normalizers = list(_flatten(content.get("normalizer"), "normalizers"))
        pre_tokenizers = list(_flatten(content.get("pre_tokenizer"), "pretokenizers"))
        parts = [*normalizers, *pre_tokenizers]
        patterns = [part.get("pattern") or {} for part in parts]
        expressions = [pattern["Regex"] for pattern in patterns if "Regex" in pattern]
        is_local = (
            content["model"].get("type") in _LOCAL_MODELS
            and not content["model"].get("dropout")
            and {part["type"] for part in normalizers} <= _LOCAL_NORMALIZERS
            and {part["type"] for part in pre_tokenizers} <= _LOCAL_PRE_TOKENIZERS
            and all(part.get("replacement", "▁") == "▁" for part in pre_tokenizers)
            and all(map(_is_local_expression, expressions))
            # The scores of a path add up from a word's beginning, rounded: words must be short.
            and (content["model"]["type"] != "Unigram" or self._splits_words())
        )
        if not is_local:
            return (), 1
        library = self._tokenizer.library
        tokens = list(library.get_vocab(with_added_tokens=True))
        is_bytes = any(part["type"] == "ByteLevel" for part in parts)
        tokens += [pattern["String"] for pattern in patterns if "String" in pattern]
        vocabulary = _join(tokens, is_bytes)

        def is_usable(place: _Place) -> bool:
            probe = place.probe
            if library.normalizer is not None:
                probe = library.normalizer.normalize_str(probe)
            normal = _join([probe], is_bytes)
            found = place.token.finditer(vocabulary)
            return bool(place.normal.search(normal)) and all("\0" in match[0] for match in found)

        return tuple(filter(is_usable, _PLACES)), _SHIFTS if expressions else 1

    def _splits_words(self) -> bool:
        splitter = self._tokenizer.library.pre_tokenizer
        return splitter is not None and len(splitter.pre_tokenize_str("ab cd")) > 1


@functools.lru_cache(maxsize=4)
def _cutter(tokenizer: JsonTokenizer) -> _Cutter:
    return _Cutter(tokenizer)


def _in_pieces(parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        for start in range(0, len(part), SECTION_CHARACTERS):
            yield part[start : start + SECTION_CHARACTERS]


def _flatten(part: dict[str, Any] | None, members: str) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for member in part[members]:
            yield from _flatten(member, members)
    else:
        yield part


def _is_local_expression(expression: str) -> bool:
    """Whether a match depends on nothing far away: digits may be counted, in groups of three say.

    Lookbehind, back references and counting anything but digits are refused.
    """
    rest = re.sub(r"(\\p\{N[dlo]?\}|\\d|\[0-9\])\{\d*,?\d*\}", "", expression)
    return re.search(r"\{\d|\(\?<[=!]|\\[GKkgA]|\\[1-9]|\(\?[(&RP]", rest) is None


def _byte_characters() -> dict[int, int]:
    """The character with which byte-level tokens spell each byte, to the byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: byte for byte in shown} | {256 + i: byte for i, byte in enumerate(hidden)}


_BYTE_CHARACTERS = _byte_characters()
_SPELLING = frozenset(map(chr, _BYTE_CHARACTERS))


def _join(tokens: list[str], is_bytes: bool) -> str:
    """The texts of tokens between NULs: one string is searched faster than many.

    Of a byte-level tokenizer parts of characters become U+FFFD, and its other tokens stay.
    """
    others = [token.replace("\0", "\1") for token in tokens]
    if not is_bytes:
        return "\0".join(others)
    spelled = [token for token in others if _SPELLING.issuperset(token)]
    others = [token for token in others if not _SPELLING.issuperset(token)]
    # NUL is no part of a longer character, so that tokens are told apart as well in bytes.
    content = "\0".join(spelled).translate(_BYTE_CHARACTERS | {256: 1}).encode("latin-1")
    return "\0".join([content.decode("utf-8", "replace"), *others])
