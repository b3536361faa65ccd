"""What reaches the terminal."""

import os
import subprocess
import sys

import pytest

from moda_jax.terminal import escape_controls
from moda_jax.train.console import RunConsole


def test_control_characters_are_spelled_out(capsys):
    """Escape sequences, carriage returns and right-to-left marks; not line ends and tabs."""
    RunConsole(steps=1, quiet=False).print("a\x1b]0;title\x07b\r\n\tc\x9b2J\u202ed [red]東🙂")
    assert capsys.readouterr().out == (
        "a\\x1b]0;title\\x07b\\r\n        c\\x9b2J\\u202ed [red]東🙂\n"
    )


def test_a_run_goes_on_when_nobody_reads_its_output():
    code = (
        "import os; from moda_jax.train.console import RunConsole;"
        "console = RunConsole(steps=1, quiet=False); console.print('one'); console.print('two');"
        "os.write(2, b'went on')"
    )
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"went on")


@pytest.mark.parametrize("text", ["def f(x):\n\treturn 'ü'", "👩‍🔬 \u00a0"])
def test_text_stays(text):
    assert escape_controls(text) == text
