"""Python files that define what to run: configs and experiments."""

import contextlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moda_jax.terminal import one_line

_PACKAGE = Path(__file__).resolve().parent
SHIPPED = next(
    # An installed package has the configs inside, a checkout beside it.
    (place for folder in (_PACKAGE, _PACKAGE.parent) if (place := folder / "configs").is_dir()),
    _PACKAGE / "configs",
)
"""The folder of the configs that come along."""


def run_python_file(path: Path, what: str) -> dict[str, Any]:
    """The names that the Python file `path` defines when it is run.

    It may build on a shipped one, as `from configs.tiny import config`.

    Raises ValueError, which begins with `what` and names the file, for whatever it raises.
    """
    try:
        with _importable(SHIPPED.parent):
            return runpy.run_path(str(path))
    except Exception as error:
        detail = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{what} {str(path)!r} failed with {detail}") from error


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
