"""What reaches the terminal, and output that cannot: it ends no run."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moda_jax.config import Config, ExecutionConfig, ModelConfig
from moda_jax.model.execution import WARNING, Resolved, describe_execution
from moda_jax.ops.sharding import make_mesh
from moda_jax.terminal import escape_controls
from moda_jax.train.console import RunConsole


def test_control_characters_are_spelled_out(capsys):
    """Escape sequences, carriage returns and right-to-left marks; not line ends and tabs."""
    RunConsole(steps=1, quiet=False).print("a\x1b]0;title\x07b\r\n\tc\x9b2J\u202ed [red]東🙂")
    assert capsys.readouterr().out == (
        "a\\x1b]0;title\\x07b\\r\n        c\\x9b2J\\u202ed [red]東🙂\n"
    )


@pytest.mark.parametrize("attention", ["auto", "xla"])
def test_a_gpu_run_without_a_kernel_says_so_in_red(pretend, monkeypatch, attention):
    pretend("gpu")
    config = Config(
        name="run",
        model=ModelConfig(num_layers=2),
        execution=ExecutionConfig(attention=attention, remat="full", compute_dtype="bfloat16"),
    )
    shown = describe_execution(config, Resolved(config.execution, {}))
    assert (WARNING in shown) == (attention == "auto")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    RunConsole(steps=1, quiet=False).show_start(
        config,
        make_mesh(config.mesh),
        data_size="",
        execution=shown,
        directory=Path(),
        start="from scratch",
        compilation_cache="not kept",
    )
    red = re.findall(r"\x1b\[1;31m([^\x1b]*)", sys.stdout.getvalue())
    text = " ".join(line.strip() for line in red)
    expected = "slow: attention falls to xla, which was not built for gpu (mosaic_gpu: needs "
    assert text[: len(expected)] == (expected if attention == "auto" else "")


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


def test_characters_that_the_terminal_cannot_encode_are_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    RunConsole(steps=1, quiet=False).print("sample: 東京 \ud800")
    assert written.getvalue() == rb"sample: \u6771\u4eac \ud800" + b"\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_output_that_nobody_reads_is_said_once(monkeypatch, capfd, code):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(sys, "stdout", Gone())
    console = RunConsole(steps=1, quiet=False)
    for _ in range(2):
        console.print("a line")
    assert capfd.readouterr().err.count("output stops here, the run goes on") == 1
