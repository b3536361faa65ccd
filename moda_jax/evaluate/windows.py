"""A long sequence in windows that a model can read, in which each token is predicted once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moda_jax.evaluate.scoring import Row
from moda_jax.ops.checks import check_int, fail


class Window(NamedTuple):
    """Positions of a sequence."""

    start: int
    """The first that the model reads,"""
    scored: int
    """the first of which it is asked what follows,"""
    end: int
    """and the end of both."""


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Windows of at most `window` positions over a sequence of `length`.

    Each position is asked once. The first window asks all of its own; each later one ends `stride`
    farther, asks what is new, and begins `window` before its end. So whatever a later window asks
    is predicted from at least `window - stride + 1` tokens, and the last window is as full as the
    others. With a stride of the whole window they are chunks.

    Raises ValueError unless 1 <= stride <= window.
    """
    window, stride = check_int("window", window, 1), check_int("stride", stride, 1)
    if stride > window:
        fail("stride", f"at most the window, {window}", stride)
    scored, end = 0, min(window, length)
    while scored < length:
        yield Window(max(end - window, 0), scored, end)
        scored, end = end, min(end + stride, length)


def text_rows(tokens: Sequence[int], prefix: int, window: int, stride: int) -> Iterator[Row]:
    """What has to be scored for the log-probability of `tokens` after the token `prefix`.

    Every token is a target once, the first included. Raises as `windows`.
    """
    sequence = [prefix, *tokens]
    for start, scored, end in windows(len(tokens), window, stride):
        yield Row(
            sequence[start:end], range(scored - start, end - start), sequence[scored + 1 : end + 1]
        )
