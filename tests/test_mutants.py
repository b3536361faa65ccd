"""Each one-line error of mutants.toml, made in a copy of the code, fails the test named for it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("benchmarks", "moda_jax", "pallas_kernels", "tests")

AREAS = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))
MUTANTS = {f"{area}-{name}": x for area, mutants in AREAS.items() for name, x in mutants.items()}
TESTS = {mutant["test"].split("::")[0]: mutant["test"] for mutant in MUTANTS.values()}
"""One of the named tests by file."""

FAILED_ASSERTION = re.compile(r"^FAILED .* - (AssertionError|assert |Failed: DID NOT RAISE)", re.M)
"""In pytest's summary. A NameError or a shape that does not fit would be no error worth finding."""


@pytest.fixture
def code(tmp_path):
    """A copy of the code, byte code included, since most of it stays as it is."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def run_fast_tests(tmp_path_factory):
    """A function (copy, *tests) -> pytest's exit status in the copy, and its output."""
    # Not this run's worker nor its path, and lines wide enough for a test's name and its error.
    ours = ("PYTEST_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {
        "COLUMNS": "400",
        # Hypothesis, which others depend on, brings a plugin that takes 2 seconds.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        # A program that an error did not change is compiled once; one run at a time writes here.
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "forked_pytest.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run(code, *tests):
            output = code / "output.txt"
            options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
            server.stdin.write(json.dumps([str(code), str(output), *options, *tests]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline()), output.read_text(encoding="utf-8")

        yield run
        server.stdin.close()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_line_is_there_once(name):
    mutant = MUTANTS[name]
    assert (ROOT / mutant["file"]).read_text(encoding="utf-8").count(mutant["old"]) == 1


@pytest.mark.slow
def test_a_copy_without_an_error_passes(code, run_fast_tests):
    """One of each file: that all pass here is what the fast set says; this, that a copy does."""
    status, output = run_fast_tests(code, *TESTS.values())
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_fails_a_fast_test(name, code, run_fast_tests):
    mutant = MUTANTS[name]
    path = code / mutant["file"]
    text = path.read_text(encoding="utf-8").replace(mutant["old"], mutant["new"])
    path.write_text(text, encoding="utf-8")
    status, output = run_fast_tests(code, mutant["test"])
    assert status == 1, output  # 0: it survives; 2 and more: no test was run
    assert FAILED_ASSERTION.search(output), output
