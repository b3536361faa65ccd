"""What a newcomer installs: the package's files, the command, and make's one-line refusals."""

import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder with the packages as a wheel has them."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    (moved, place), *others = given["package_dir"].items()
    assert not others
    for package in given["packages"]:
        source = package.replace(moved, place, 1) if package.startswith(moved) else package
        target = tmp_path / package.replace(".", "/")
        target.mkdir(parents=True)
        for file in (ROOT / source.replace(".", "/")).glob("*.py"):
            shutil.copy(file, target)
    return tmp_path


def test_an_installed_package_has_everything_it_runs(installed):
    python = {p.relative_to(installed) for p in installed.rglob("*.py")}
    for folder in ("moda_jax", "pallas_kernels"):
        assert {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*.py")} <= python
    code = (
        "import moda_jax.cli as cli; print(cli.__file__);"
        "print(cli.parse_config(['--steps', '3', 'tiny_mhc']).model.depth.name);"
        "print(cli.parse_config(['table6/row2']).name)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed, env=os.environ | {"PYTHONPATH": str(installed)}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    where, depth, name = result.stdout.split()
    assert Path(where).is_relative_to(installed)
    assert (depth, name) == ("mhc", "table6_row2")


def test_the_command_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["moda-jax"].partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("extras", ["cuda", "wandb,triton"])
def test_gpu_extras_on_an_older_python_name_a_newer_one(tmp_path, extras):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.11.7\nexit 1\n')
    python.chmod(0o755)
    # A make that runs the tests would hand its own settings down, and be named in the output.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(
        ["make", "train", f"EXTRAS={extras}", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"error: EXTRAS={extras} needs Python >= 3.12")
    assert f"{python} is Python 3.11.7" in line
    assert f"make train EXTRAS={extras} PYTHON=python3.12" in line
    assert not (tmp_path / "venv").exists()


def test_nothing_points_at_a_package_index():
    """moda-jax is on none: what installs it does so from a checkout."""
    names = ("README.md", "docs/**/*.md", "*/**/*.py", "CONTRIBUTING.md")
    for path in (path for pattern in names for path in ROOT.glob(pattern)):
        if path != Path(__file__) and not any(part[0] == "." for part in path.parts[1:]):
            text = path.read_text(encoding="utf-8")
            assert "install moda-jax" not in text.replace('"', "").replace("'", ""), path
