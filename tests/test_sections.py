"""Sections of a long document: their tokens are the whole document's, whatever the tokenizer."""

import functools
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from moda_jax.data import sections
from moda_jax.data.tokenizer import JsonTokenizer, load_tokenizer

TEXT = (
    'The quick brown fox jumps over the lazy dog. He said: "no, it\'s 12345 of them!"\n'
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich\n\n"
    "    def f(x):\n\treturn x  # naïve 東京は日本の首都です。人口は多い。 🙂 e\u0301a\u0308\r\n"
)
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior)


def trained(model, trainer, *, pre_tokenizer=None, normalizer=None, added=()):
    tokenizer = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([TEXT] * 8, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens(list(added))
    return tokenizer


def bpe(**parts):
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), *TEXT, "▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 300,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=["<unk>"],
    )
    return trained(models.BPE(unk_token="<unk>"), trainer, **parts)


def word_piece(**parts):
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, show_progress=False, special_tokens=["[UNK]"]
    )
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, **parts)


def word_level(**parts):
    trainer = trainers.WordLevelTrainer(show_progress=False, special_tokens=["[UNK]"])
    return trained(models.WordLevel(unk_token="[UNK]"), trainer, **parts)


def unigram(**parts):
    trainer = trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>"
    )
    return trained(models.Unigram(), trainer, **parts)


LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
LINE = tokenizers.AddedToken("fox jumps", normalized=True)
STRIPPING = tokenizers.AddedToken("<mask>", lstrip=True, rstrip=True)

TOKENIZERS = {
    "gpt2": lambda: bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2_prefix": lambda: bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "cl100k": lambda: bpe(
        pre_tokenizer=pre_tokenizers.Sequence(
            [split(CL100K), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    ),
    "bert": lambda: word_piece(
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(), normalizer=normalizers.BertNormalizer()
    ),
    "word_level": lambda: word_level(pre_tokenizer=pre_tokenizers.Whitespace()),
    "metaspace_nfc": lambda: bpe(
        pre_tokenizer=pre_tokenizers.Metaspace(), normalizer=normalizers.NFC()
    ),
    "metaspace_first": lambda: bpe(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
    "unigram": lambda: unigram(
        pre_tokenizer=pre_tokenizers.Metaspace(), normalizer=normalizers.NFKC()
    ),
    "stripping": lambda: bpe(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        added=[STRIPPING],
    ),
    "pairs_of_words": lambda: word_piece(pre_tokenizer=split(r"\S+ \S+")),
    "lines": lambda: bpe(pre_tokenizer=split("\n", "merged_with_previous"), normalizer=LLAMA),
}
"""With certain places to cut; "lines" among them only if no token was learnt over a space."""

WHOLE = {
    "no_pre_tokenizer": lambda: bpe(),
    "fixed_length": lambda: bpe(pre_tokenizer=pre_tokenizers.FixedLength(5)),
    "counting": lambda: bpe(pre_tokenizer=split(".{5}")),
    "looking_behind": lambda: bpe(pre_tokenizer=split(r"(?<=a)\s")),
    "added_over_space": lambda: bpe(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        added=[LINE, "a\nb", tokenizers.AddedToken("。a")],
    ),
    "deleted_spaces": lambda: bpe(normalizer=normalizers.Replace(" ", "")),
    "unigram_of_whole_texts": lambda: unigram(normalizer=LLAMA),
    "stripped": lambda: bpe(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        normalizer=normalizers.Strip(),
    ),
}
"""Without: the document is one section."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Tokenizers by their names above."""
    folder = tmp_path_factory.mktemp("tokenizers")

    @functools.cache
    def load(name) -> JsonTokenizer:
        path = folder / f"{name}.json"
        (TOKENIZERS | WHOLE)[name]().save(str(path))
        return load_tokenizer(str(path), "<|endoftext|>")

    return load


@pytest.fixture(autouse=True)
def short_sections(monkeypatch):
    monkeypatch.setattr(sections, "SECTION_CHARACTERS", 600)
    monkeypatch.setattr(sections, "_WINDOW", 100)


def cut(tokenizer, text, part=250):
    parts = [text[i : i + part] for i in range(0, len(text), part)]
    return list(sections.sections_of(tokenizer)(parts))


def check(tokenizer, text):
    """Compares the sections' ids with the whole text's; returns the sections."""
    found = cut(tokenizer, text)
    ids = [i for section in found for i in tokenizer.encode(section)]
    assert ids == tokenizer.encode(text)
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_sections_have_the_ids_of_the_whole(loaded, name):
    found = check(loaded(name), TEXT * 30)
    if name != "lines":
        assert len(found) > 5
        assert max(map(len, found)) < 1500


@pytest.mark.parametrize("name", WHOLE)
def test_without_a_certain_place_the_document_stays_whole(loaded, name):
    assert len(check(loaded(name), TEXT * 30)) == 1


words = st.one_of(
    st.sampled_from(TEXT.split(" ")),
    st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "▁", "<mask>", "。", "\0"]),
    st.text(max_size=6),
    st.sampled_from(
        [*"a1é\u0301東ﷺﬁ¨'\u1100\u1161", "12345", "e\u0301", "<|endoftext|>", "'s", "..."]
    ),
)
texts = st.lists(words, min_size=1, max_size=60).flatmap(
    lambda chosen: st.builds(
        lambda repeats, joint: (joint.join(chosen) + joint) * repeats,
        st.integers(1, 12),
        st.sampled_from(["", " ", " ", "\n"]),
    )
)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(text=texts.filter(lambda text: not re.search("[\ud800-\udfff]", text)))
@pytest.mark.parametrize("name", [*TOKENIZERS, *WHOLE])
def test_any_text_keeps_its_ids(loaded, name, text):
    check(loaded(name), text)


def test_bytes_are_cut_anywhere():
    text = "abc" * 400
    found = cut(load_tokenizer("bytes"), text, part=500)
    assert [len(section) for section in found] == [500, 500, 200]
    assert "".join(found) == text
