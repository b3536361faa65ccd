"""What reaches the terminal."""

import pytest

from moda_jax.terminal import escape_controls
from moda_jax.train.console import RunConsole


def test_control_characters_are_spelled_out(capsys):
    """Escape sequences, carriage returns and right-to-left marks; not line ends and tabs."""
    RunConsole(steps=1, quiet=False).print("a\x1b]0;title\x07b\r\n\tc\x9b2J\u202ed [red]東🙂")
    assert capsys.readouterr().out == (
        "a\\x1b]0;title\\x07b\\r\n        c\\x9b2J\\u202ed [red]東🙂\n"
    )


@pytest.mark.parametrize("text", ["def f(x):\n\treturn 'ü'", "👩‍🔬 \u00a0"])
def test_text_stays(text):
    assert escape_controls(text) == text
