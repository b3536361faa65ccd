"""Tokenizers: round trips, the end-of-document token, and errors that say what to do."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moda_jax.config import DataConfig
from moda_jax.data.tokenizer import ByteTokenizer, decode_continuation, load_tokenizer
from tests.corpora import FUZZ

TEXT = "def f(x):\n\treturn x  # naïve, 東京 🙂\r\n"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """The bytes of a small byte-level BPE's file."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT * 4], trainer)
    return tokenizer.to_str().encode()


@pytest.fixture
def save_tokenizer(tmp_path):
    """Trains a small byte-level BPE with the given special tokens; returns its path."""

    def save(*special_tokens, post_processor=None, truncation=None):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=list(special_tokens),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([TEXT * 4], trainer)
        if post_processor:
            tokenizer.post_processor = post_processor
        if truncation:
            tokenizer.enable_truncation(truncation)
            tokenizer.enable_padding(length=truncation)
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        return str(path)

    return save


def test_bytes_round_trip():
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(TEXT)
    assert ids == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("") == []


def test_bytes_decode_takes_any_id():
    """A model with a larger vocabulary can sample ids that are no bytes."""
    assert ByteTokenizer().decode([256, 104, 319, 105, -1, 256]) == "hi"
    assert ByteTokenizer().decode(list("é".encode())[:1]) == "\ufffd"


def test_json_round_trip(save_tokenizer):
    tokenizer = load_tokenizer(save_tokenizer("<|endoftext|>"))
    ids = tokenizer.encode(TEXT)
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id, 10**6, -1]) == TEXT
    assert max(ids) < tokenizer.vocab_size <= 300
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("text", [TEXT * 3, ""])
def test_a_documents_tokens_are_compact(save_tokenizer, text):
    for tokenizer in (ByteTokenizer(), load_tokenizer(save_tokenizer("<eos>"))):
        other, tokens = tokenizer.encode_batch(["a", text])
        assert tokens.dtype == other.dtype
        assert tokens.dtype in (np.uint8, np.uint16)
        assert tokens.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(("largest", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_the_type_of_tokens_holds_every_id(tmp_path, largest, dtype):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "last": largest}))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = load_tokenizer(str(tmp_path / "tokenizer.json")).encode_batch(["last"])[0]
    assert (tokens.dtype, tokens.tolist()) == (dtype, [largest])


@pytest.mark.parametrize(
    "special_tokens",
    [
        ["<pad>", "<|endoftext|>"],
        ["<s>", "</s>"],
        ["<eos>"],
        ["[PAD]", "[CLS]", "[SEP]"],
        ["[SEP]", "<|end_of_text|>"],
    ],
)
def test_end_of_document_is_found_by_its_usual_names(save_tokenizer, special_tokens):
    tokenizer = load_tokenizer(save_tokenizer(*special_tokens))
    assert tokenizer.eos_id == len(special_tokens) - 1


def test_end_of_document_missing(save_tokenizer):
    with pytest.raises(ValueError, match=r"one of <\|endoftext\|>.*got \['<pad>'\]; name one"):
        load_tokenizer(save_tokenizer("<pad>"))


def test_end_of_document_by_name(save_tokenizer):
    path = save_tokenizer("<pad>", "<end>", "</s>")
    named = load_tokenizer(path, "<end>")
    assert (named.eos_id, load_tokenizer(path).eos_id) == (1, 2)
    assert named.fingerprint != load_tokenizer(path).fingerprint
    assert load_tokenizer(path, "x").decode([load_tokenizer(path, "x").eos_id]) == "x"  # any token
    with pytest.raises(
        ValueError, match=r"eos_token: expected a token of .*got '<none>'; change --"
    ):
        load_tokenizer(path, "<none>")
    with pytest.raises(ValueError, match="DataConfig.eos_token: expected None with the byte"):
        DataConfig(eos_token="<end>")


def test_settings_of_the_file_that_would_change_documents_are_off(save_tokenizer):
    """Truncation would drop text silently; a post-processor would add tokens inside rows."""
    template = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = load_tokenizer(save_tokenizer("<s>", "</s>", post_processor=template, truncation=8))
    ids = tokenizer.encode(TEXT * 5)
    assert tokenizer.decode(ids) == TEXT * 5
    assert not {0, 1} & set(ids)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_continuation_keeps_its_first_space(tmp_path, scheme):
    """Decoded alone, as SentencePiece's, it would lose it."""
    vocab = {"</s>": 0, "▁def": 1, "▁main": 2, "▁": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    prompt = [loaded.eos_id, *loaded.encode("def")]
    assert decode_continuation(loaded, prompt, loaded.encode(" main")) == " main"


def test_a_continuation_completes_a_character():
    first, last = "é".encode()
    assert decode_continuation(ByteTokenizer(), [256, 97, first], [last, 98]) == "éb"
    assert decode_continuation(ByteTokenizer(), [256], [97]) == "a"


def test_vocab_size_covers_sparse_ids(tmp_path, save_tokenizer):
    """Published files leave gaps before their added tokens: the count is not the largest id."""
    content = json.loads(pathlib.Path(save_tokenizer("<eos>")).read_text(encoding="utf-8"))
    content["model"]["vocab"]["sparse"] = 999
    sparse = tmp_path / "sparse.json"
    sparse.write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(str(sparse)).vocab_size == 1000


def test_fingerprint_follows_the_content(save_tokenizer):
    first = load_tokenizer(save_tokenizer("<eos>")).fingerprint
    assert first == load_tokenizer(save_tokenizer("<eos>")).fingerprint
    assert first != load_tokenizer(save_tokenizer("</s>")).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"path of a tokenizer\.json, got .*missing\.json': No such file"),
        ("{not json", r"expected a tokenizer\.json of the tokenizers library, got"),
        ('{"model": 1}', r"expected a tokenizer\.json of the tokenizers library, got"),
    ],
)
def test_unusable_files_are_one_line_errors(tmp_path, content, message):
    path = tmp_path / "missing.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(str(path))
    assert "\n" not in str(error.value)


@given(st.data())
@FUZZ
def test_a_damaged_file_is_an_error_or_a_tokenizer(pristine, tmp_path_factory, data):
    """A value of the JSON is another, or bytes are: what loads, encodes or says why not."""
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.json"
    if data.draw(st.booleans()):
        content = bytearray(pristine)
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    else:
        whole = json.loads(pristine)
        part = whole[data.draw(st.sampled_from(["model", "pre_tokenizer", "decoder"]))]
        name = data.draw(st.sampled_from(sorted(part)))
        part[name] = data.draw(st.sampled_from([None, -1, 10**18, "x", "BPE", [], {}, True, 0.5]))
        content = bytearray(json.dumps(whole).encode())
    path.write_bytes(content)
    try:
        tokenizer = load_tokenizer(str(path))
        (ids,) = tokenizer.encode_batch([TEXT])
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017  (what loads is no error)
        return
    assert ids.max(initial=0) < tokenizer.vocab_size
