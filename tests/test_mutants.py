"""Each one-line error of mutants.toml, made in a copy of the code, fails the test named for it."""

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


def run_fast_tests(code, *tests):
    """pytest's exit status in the copy, and its output."""
    # Not this run's worker, and lines wide enough for a test's name and its error.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", "not slow", *tests],
        cwd=code,
        env=environment | {"COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", MUTANTS)
def test_the_line_is_there_once(name):
    mutant = MUTANTS[name]
    assert (ROOT / mutant["file"]).read_text(encoding="utf-8").count(mutant["old"]) == 1


@pytest.mark.slow
def test_all_pass_without_an_error(code):
    status, output = run_fast_tests(code, *sorted({mutant["test"] for mutant in MUTANTS.values()}))
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_fails_a_fast_test(name, code):
    mutant = MUTANTS[name]
    path = code / mutant["file"]
    text = path.read_text(encoding="utf-8").replace(mutant["old"], mutant["new"])
    path.write_text(text, encoding="utf-8")
    status, output = run_fast_tests(code, mutant["test"])
    assert status == 1, output  # 0: it survives; 2 and more: no test was run
    assert FAILED_ASSERTION.search(output), output
