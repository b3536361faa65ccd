"""Checkpoints in a folder that this run owns; their failing is one line that says what is left."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.errors import SaveError
from moda_jax.train.owner import FolderOwner

_LOGGER = logging.getLogger("absl")


def _is_news(record: logging.LogRecord) -> bool:
    """False for the traceback that each of orbax's threads logs before its error is raised."""
    return record.exc_info is None or "orbax" not in record.pathname


class Saver:
    """Saves in the background; each method raises SaveError for what failed there.

    As a context manager it ends the background writing. `say` prints a line.
    """

    def __init__(
        self, owner: FolderOwner, checkpoints: Checkpoints, say: Callable[[str], None]
    ) -> None:
        self._owner, self._checkpoints, self._say = owner, checkpoints, say

    def save(self, *args: Any, **kwargs: Any) -> None:
        """`Checkpoints.save`."""
        with self._raising_save_errors():
            for step in self._checkpoints.forget_missing():
                self._say(f"checkpoint {step} was removed; the run goes on without it")
            self._checkpoints.save(*args, **kwargs)

    def save_imported(self, *args: Any) -> None:
        """`Checkpoints.save_imported`."""
        with self._raising_save_errors():
            self._checkpoints.save_imported(*args)

    def wait(self) -> None:
        """Waits for the writing to end: `latest_step` is what is on disk then."""
        with self._raising_save_errors():
            self._checkpoints.wait()

    def __enter__(self) -> "Saver":
        _LOGGER.addFilter(_is_news)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            self._checkpoints.close()
        except OSError as late:
            if error is None:
                raise _save_error(late) from late
            if not isinstance(error, SaveError):  # which is why
                self._say(str(late))
        finally:
            _LOGGER.removeFilter(_is_news)

    @contextlib.contextmanager
    def _raising_save_errors(self) -> Iterator[None]:
        try:
            with self._owner.guard():
                yield
        except OSError as error:
            raise _save_error(error) from error


def _save_error(error: OSError) -> SaveError:
    return SaveError(f"{error}; make room or repair the folder, then start the same command again")
