"""Tokenizers: text to token ids and back.

`ByteTokenizer` needs no file; `load_tokenizer` also reads any local `tokenizer.json` with the
tokenizers library. Nothing is ever downloaded.
"""

import hashlib
import itertools
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tokenizers

TOKENIZER_FILE = "tokenizer.json"
"""The name under which a run's folder keeps a tokenizer that needs a file."""

# In order of preference: a BERT-like file has both [SEP] and others, GPT-like ones only the first.
_END_OF_DOCUMENT_TOKENS = (
    "<|endoftext|>", "<|end_of_text|>", "<|endofdoc|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>",
    "[EOS]", "<EOD>", "<|im_end|>", "[SEP]",
)  # fmt: skip


class Tokenizer(Protocol):
    """What data loading and generation ask of a tokenizer."""

    vocab_size: int
    """Every token id lies in [0, vocab_size)."""
    eos_id: int
    """The token between documents, which therefore also stands before each one."""
    eos_token: str | None
    """Its text, which `load_tokenizer` takes; None: the tokenizer has no choice."""
    fingerprint: str
    """Equal for equal tokenizers; a checkpoint compares it."""
    content: bytes | None
    """Of the file that `load_tokenizer` needs to make it again; None: it needs none."""

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, without any begin or end token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of each text, [its tokens], in an unsigned type that holds every id."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text; ids that stand for no text are left out."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte; id 256 ends a document."""

    vocab_size = 257
    eos_id = 256
    eos_token: str | None = None
    fingerprint = "bytes"
    content: bytes | None = None

    def encode(self, text: str) -> list[int]:
        """Returns the UTF-8 bytes of `text`, without an end-of-document token."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the UTF-8 bytes of each text, uint8."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text; ids that are no bytes are left out, broken UTF-8 becomes U+FFFD.

        A model's vocabulary may be larger than 257, so a sample can hold any id.
        """
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A `tokenizer.json` of the tokenizers library.

    Truncation, padding and the post-processor's extra tokens are off: a document is encoded whole
    and its ends are marked by data loading. `vocab_size` is the largest id + 1, added tokens
    included. A special token spelled out in a text is read as that token, as the library does.
    """

    def __init__(self, path: str, eos_token: str | None = None) -> None:
        """Raises ValueError if `path` is no such file or has no such end-of-document token."""
        content, self._tokenizer = read_tokenizer(path)
        self._path = path
        self.content: bytes | None = content
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.eos_id = _find_eos_id(path, self._tokenizer, eos_token)
        self.eos_token: str | None = self._tokenizer.id_to_token(self.eos_id)
        identity = content + self.eos_id.to_bytes(4, "little")
        self.fingerprint = hashlib.blake2b(identity, digest_size=8).hexdigest()

    @property
    def library(self) -> tokenizers.Tokenizer:
        """The object of the tokenizers library, with the settings above."""
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, without any begin or end token.

        Raises ValueError if the tokenizer has no token for a part of it, not even "unknown".
        """
        return self._encode_batch([text])[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of each text, uint16, or uint32 above 65,536 tokens."""
        dtype = np.promote_types(np.min_scalar_type(self.vocab_size - 1), np.uint16)
        return [np.array(encoding.ids, dtype) for encoding in self._encode_batch(texts)]

    def _encode_batch(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        # The fast call skips the character offsets, which nobody reads here.
        try:
            return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"DataConfig.tokenizer: {self._path!r} cannot encode {texts[0][:40]!r}...: "
                f"{' '.join(str(error).split())}; use a tokenizer that covers the text"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text; special tokens and unknown ids are left out."""
        return self._tokenizer.decode([i for i in ids if 0 <= i < self.vocab_size])


def decode_continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that `tokens` add after `prompt`.

    What a token stands for can depend on those before it: many tokenizers strip the space of the
    first one, and a character's bytes may be spread over several. So both are decoded together.
    """
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode([*prompt, *tokens])
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return whole[sum(1 for _ in pairs) :]


class TextStream:
    """The text of `decode_continuation`, piece by piece as tokens come, in whole characters.

    A character's bytes may be spread over several tokens: they are held back until it is whole.
    What turns out to be no character, or is cut off by the end, becomes U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # The tokens that were shown last, then those that are held back: what a token stands for
        # can depend on the one before it, not on all of them.
        self._shown, self._held = list(prompt), list[int]()

    def push(self, token: int) -> str:
        """The text that can be shown now that `token` has come; empty while it must wait."""
        self._held.append(token)
        text = self._text(self._held)
        if text and not text.endswith(_BROKEN):
            return self._show(len(self._held))
        if len(self._held) > _MOST_HELD:
            # No character has more than four bytes: those before the last three are broken.
            return self._show(len(self._held) - 3)
        return ""

    def finish(self) -> str:
        """The text that was held back, now that no more tokens come."""
        return self._show(len(self._held))

    def _show(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        text = self._text(shown)
        if text:
            self._shown = shown
        else:
            self._shown = self._shown + shown
        return text

    def _text(self, tokens: list[int]) -> str:
        """What `tokens` add to the tokens that were shown."""
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + tokens)[len(before) :]


_BROKEN = "\ufffd"
"""What decoders put in the place of bytes that are no character."""
_MOST_HELD = 16


def read_tokenizer(path: str) -> tuple[bytes, tokenizers.Tokenizer]:
    """The content of a tokenizer.json, and the object of the tokenizers library.

    Raises ValueError if it is missing, is not one, or holds no vocabulary.
    """
    try:
        content = pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(
            f'DataConfig.tokenizer: expected "bytes" or the path of a tokenizer.json, '
            f"got {path!r}: {error.strerror}"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception for what it cannot parse
        raise ValueError(
            f"DataConfig.tokenizer: expected a tokenizer.json of the tokenizers library, "
            f"got {path!r}: {' '.join(str(error).split())}"
        ) from error
    if not tokenizer.get_vocab(with_added_tokens=True):
        raise ValueError(f"DataConfig.tokenizer: expected a vocabulary, got none in {path!r}")
    return content, tokenizer


def _find_eos_id(path: str, tokenizer: tokenizers.Tokenizer, eos_token: str | None) -> int:
    if eos_token is not None:
        if (eos_id := tokenizer.token_to_id(eos_token)) is None:
            raise ValueError(
                f"DataConfig.eos_token: expected a token of {path!r}, got {eos_token!r}; "
                f"change --data.eos-token"
            )
        return eos_id
    # Among the added tokens only: an ordinary "</s>" may be text (HTML).
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    for name in _END_OF_DOCUMENT_TOKENS:
        if name in added:
            return added[name]
    raise ValueError(
        f"DataConfig.eos_token: expected one of {', '.join(_END_OF_DOCUMENT_TOKENS)} among the "
        f"added tokens of {path!r} to end a document, got {sorted(added)}; name one of its tokens "
        f"with --data.eos-token"
    )


def load_tokenizer(name: str, eos_token: str | None = None) -> Tokenizer:
    """Returns the tokenizer of `DataConfig.tokenizer`: "bytes" or the path of a tokenizer.json.

    `eos_token` ends a document in a tokenizer.json; None: the first of the usual names it has.

    Raises ValueError if the file is missing, is not one, or cannot end a document.
    """
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(name, eos_token)
