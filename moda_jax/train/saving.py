"""Checkpoints whose failing is one line that says what is left."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.errors import SaveError

_LOGGER = logging.getLogger("absl")


def _is_news(record: logging.LogRecord) -> bool:
    """False for the traceback that each of orbax's threads logs before its error is raised."""
    return record.exc_info is None or "orbax" not in record.pathname


class Saver:
    """Saves in the background; each method raises SaveError for what failed there.

    As a context manager it ends the background writing.
    """

    def __init__(self, directory: Path, checkpoints: Checkpoints) -> None:
        self._directory, self._checkpoints = directory, checkpoints

    def save(self, *args: Any, **kwargs: Any) -> None:
        """`Checkpoints.save`."""
        with self._naming_failures():
            self._checkpoints.save(*args, **kwargs)

    def wait(self) -> None:
        """Waits for the writing to end: `latest_step` is what is on disk then."""
        with self._naming_failures():
            self._checkpoints.wait()

    def __enter__(self) -> "Saver":
        _LOGGER.addFilter(_is_news)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            with self._naming_failures():
                self._checkpoints.close()
        except SaveError:
            if error is None:  # else one line is enough, and the error's names the checkpoint
                raise
        finally:
            _LOGGER.removeFilter(_is_news)

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of orbax and tensorstore, which have no common one
            latest = self._checkpoints.latest_step
            kept = "there is no complete one" if latest is None else (
                f"the newest complete one is of step {latest}")  # fmt: skip
            reason = " ".join(str(error).split())
            raise SaveError(
                f"{self._directory}: a checkpoint could not be written, {kept}; make room or "
                f"repair the folder, then start the same command again ({reason})"
            ) from error
