"""Text on its way to a terminal."""

import os
import re
import sys

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    """`text` with its control characters spelled out, but for line ends and tabs.

    A terminal obeys the raw ones: they move its cursor, set its title or turn its text around.
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, control characters spelled out; or else its class."""
    return escape_controls(" ".join(str(error).split())) or type(error).__name__


def discard_output() -> None:
    """After the reader of a pipe is gone: what is still printed, or buffered, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
