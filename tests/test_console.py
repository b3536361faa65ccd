"""Output that fails to print: characters are escaped, a reader that is gone ends no run."""

import errno
import io
import os
import sys

import pytest

from moda_jax.train.console import RunConsole


def test_characters_that_the_terminal_cannot_encode_are_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    RunConsole(steps=1, quiet=False).print("sample: 東京 \ud800")
    assert written.getvalue() == rb"sample: \u6771\u4eac \ud800" + b"\n"


@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_output_that_nobody_reads_is_said_once(monkeypatch, capfd, code):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(sys, "stdout", Gone())
    console = RunConsole(steps=1, quiet=False)
    for _ in range(2):
        console.print("a line")
    assert capfd.readouterr().err.count("output stops here, the run goes on") == 1
