"""What the pictures of one text are made of: the model's attention maps, with names."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from moda_jax.config import ModelConfig
from moda_jax.data.tokenizer import Tokenizer, decode_continuation
from moda_jax.depth import make_mechanism
from moda_jax.model.attention_maps import (
    MAX_BYTES,
    attention_maps,
    depth_labels,
    has_own_softmax,
    num_bytes,
    num_depth_slots,
)
from moda_jax.model.transformer import Transformer

MAX_PAGE_BYTES = 32 << 20
"""Of the weights in a page, one byte each in base64."""


@dataclasses.dataclass(frozen=True)
class TextAttention:
    """One text and where a model's attention looks in it; arrays are float32 but `visible`."""

    title: str
    """Names the model."""
    mechanism: str
    """Its way of using depth, in a few words, and what the pictures show of it."""
    tokens: list[str]
    """The text of each token, T of them."""
    layers: list[int]
    """Numbers of the layers that `weights` has."""
    heads: list[int]
    """And of the query heads."""
    slots: list[str]
    """Names of the depth slots, S of them."""
    weights: np.ndarray
    """[layers, heads, T, T + S]: sequence | depth slots."""
    visible: np.ndarray
    """[L, S] bool: slots that a layer sees."""
    mass: np.ndarray
    """[L, 1 + S]: mean over tokens and heads of the weight on the sequence | on each slot."""
    sink: np.ndarray
    """[L, 2]: mean over tokens but the first, and heads, of the weight on the first token: of all
    that attention sees, of its sequence part alone."""

    own_softmax: bool
    """Whether depth has a softmax of its own."""

    @property
    def is_joint(self) -> bool:
        """Whether sequence and depth share a softmax."""
        return bool(self.slots) and not self.own_softmax


def look(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    title: str,
    most_tokens: int | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> TextAttention:
    """Reads a document and keeps where each token looks.

    Args:
      model: of a run.
      tokenizer: its.
      text: the document; the token between documents is put before it, as in training.
      title: names the model in the pictures.
      most_tokens: only the first so many tokens; None: all.
      layers: numbers of those whose weights are kept; None: all.
      heads: of their query heads; None: all.

    Raises ValueError for a text without tokens, one that is too long, numbers that do not exist, or
    weights that are not finite.
    """
    config = model.config
    layers = list(range(config.num_layers)) if layers is None else list(layers)
    heads = list(range(config.num_heads)) if heads is None else list(heads)
    _check_numbers("--layers", layers, config.num_layers)
    _check_numbers("--heads", heads, config.num_heads)
    if most_tokens is not None and most_tokens < 2:
        raise ValueError(f"--tokens: expected a number >= 2, got {most_tokens}")
    ids = [tokenizer.eos_id, *tokenizer.encode(text)][:most_tokens]
    if len(ids) < 2:
        raise ValueError("--text: expected a text of at least one token, got none")
    _check_length(config, len(ids), len(layers), len(heads))
    maps = attention_maps(model, jnp.asarray(ids, jnp.int32), layers=layers, heads=heads)
    if not all(np.isfinite(x).all() for x in (maps.weights, maps.mass, maps.sink)):
        raise ValueError("expected attention weights, got NaN: the parameters are not finite")
    return TextAttention(
        title=title,
        mechanism=_describe(config),
        tokens=token_texts(tokenizer, ids),
        layers=layers,
        heads=heads,
        slots=depth_labels(config),
        weights=np.asarray(maps.weights),
        visible=np.asarray(maps.visible),
        mass=np.asarray(maps.mass).mean(axis=1),
        sink=np.asarray(maps.sink).mean(axis=1),
        own_softmax=has_own_softmax(config),
    )


def _check_numbers(option: str, chosen: Sequence[int], count: int) -> None:
    if not chosen or len({*chosen}) < len(chosen) or not all(0 <= x < count for x in chosen):
        raise ValueError(
            f"{option}: expected different numbers in 0 … {count - 1}, got {list(chosen)}"
        )


def _check_length(config: ModelConfig, length: int, num_layers: int, num_heads: int) -> None:
    def fits(length: int) -> bool:
        needed = num_bytes(config, length, num_layers=num_layers, num_heads=num_heads)
        slots = num_depth_slots(config)
        page = num_layers * num_heads * packed_bytes(length, slots) * 4 / 3
        return needed <= MAX_BYTES and page <= MAX_PAGE_BYTES

    if fits(length):
        return
    low, high = 0, length  # the first fits, the second does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    raise ValueError(
        f"--text: expected at most {low} tokens for {num_layers} layers and {num_heads} heads "
        f"(a page of {MAX_PAGE_BYTES >> 20} MiB), got {length}; --tokens {low} takes the first "
        f"ones, --layers and --heads choose fewer of those"
    )


def packed_bytes(length: int, num_slots: int) -> int:
    """Weights of a layer's head that a query can have: a triangle, and the depth slots."""
    return length * (length + 1) // 2 + length * num_slots


def _describe(config: ModelConfig) -> str:
    words = f"{config.depth.name}: {make_mechanism(config).describe()}"
    if has_own_softmax(config):
        return f"{words}. Sequence and depth have a softmax each: a row of either part sums to 1."
    if num_depth_slots(config):
        return f"{words}. One softmax: a row of both parts together sums to 1."
    return f"{words}. Its attention reads no depth slots: there is a sequence part only."


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token, after those before it; its number where it is no text by itself."""
    texts = []
    for place, token in enumerate(ids):
        before = ids[max(0, place - 8) : place]  # enough for a character of bytes
        text = decode_continuation(tokenizer, before, [token])
        if token == tokenizer.eos_id:
            text = "⟨end of document⟩"
        elif not text or "\ufffd" in text:
            text = f"⟨token {token}⟩"
        texts.append(text)
    return texts
