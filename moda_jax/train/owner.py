"""Who writes to a run's folder: one run at a time, which says so in a file and by a heartbeat."""

import dataclasses
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from moda_jax.train.errors import SaveError
from moda_jax.train.processes import on_main

OWNER_FILE = "owner.json"
HEARTBEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 120.0
"""An owner on another machine that was silent for so long is taken for dead; so is one on the same
machine whose process has ended, at once."""

_NEW_FILE_SECONDS = 1.0
"""For so long a file that holds nothing yet may be one that is just being written."""


@dataclasses.dataclass(frozen=True)
class _Owner:
    """What the file says."""

    host: str
    machine: str
    """Equal for processes that see each other's ids."""
    pid: int
    process_start: str | None
    """Tells a process from a later one with the same id."""
    since: str
    token: str
    """Of this ownership alone."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class _Watched(NamedTuple):
    """A folder as it was at first."""

    identity: tuple[int, int]
    is_writable: bool


class FolderLost(SaveError):
    """The run's folder was deleted, renamed, made read-only or taken over under the run."""


class FolderOwner:
    """The ownership of a run's folder, from construction to `release`.

    The file OWNER_FILE in it names the process; a thread touches the file every HEARTBEAT_SECONDS,
    so that its time is that of the last heartbeat. Touching needs no room on a full disk. With
    several processes the first one owns the folder for all of them.
    """

    def __init__(self, directory: Path) -> None:
        """Takes the run's folder `directory`.

        Raises:
            ValueError: another run is writing to it; on every process.
            OSError: it cannot be written to.
        """
        self._directory = directory
        self._watched: dict[Path, _Watched] = {}
        self._file = directory.absolute() / OWNER_FILE
        self._me = _myself()
        self._is_main = False
        self._problem: str | None = None
        self._stop = threading.Event()
        self.taken_from: str | None = on_main(self._take)
        """A line about the dead owner before this one, if its run did not end in order."""
        self.watch(directory)
        if self._is_main:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the folder free; nothing happens if it is not this run's any more."""
        if not self._is_main or self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(HEARTBEAT_SECONDS)  # not for ever on a network that is away
        try:
            if _read(self._file) == self._me:
                self._file.unlink()
        except OSError:
            pass  # the folder is gone, or cannot be written to: the process's end gives it free

    def watch(self, folder: Path) -> None:
        """Losing `folder`, which is in the run's folder, is losing that one, from now on."""
        if self._is_main:
            self._watched[folder.absolute()] = _Watched(_identity(folder), _is_writable(folder))

    def check(self, *, now: bool = False) -> None:
        """Raises FolderLost, one line, if the folder was lost since the last look.

        Args:
            now: looks itself, as before a save, instead of asking for the last heartbeat's result.
        """
        if now and self._is_main and self._problem is None:
            self._problem = self._find_problem()
        if self._problem is not None:
            raise FolderLost(f"{self._problem}; the run was stopped, what it had not saved is lost")

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Checks before something is written; a write that failed since the folder was lost then
        says that.
        """
        self.check(now=True)
        try:
            yield
        except OSError:
            # A write makes missing folders again. Only now: some file systems renumber files.
            self._problem = self._problem or self._find_replaced_folder()
            self.check(now=True)
            raise

    def _find_replaced_folder(self) -> str | None:
        for folder, before in self._watched.items():
            if not folder.is_dir() or _identity(folder) != before.identity:
                return _lost(folder)
        return None

    def _take(self) -> str | None:
        taken_from = None
        while not self._create():
            taken_from = self._remove_dead_owner() or taken_from
        self._is_main = True
        return taken_from

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(self._me), indent=2) + "\n")
        except OSError:  # a full disk: an empty file would pass for an owner
            self._file.unlink()
            raise
        return True

    def _remove_dead_owner(self) -> str | None:
        """Removes the file of a dead owner; a line about it. Raises ValueError if it is alive."""
        try:
            heartbeat = self._file.stat().st_mtime
            owner = _read_when_written(self._file)
        except FileNotFoundError:
            return None  # it was released in this moment
        silent = time.time() - heartbeat
        who = owner or "an unknown process"
        if _may_be_alive(owner, silent):
            raise ValueError(
                f"{self._directory} is in use by {who}, last heartbeat {_ago(silent)}; wait for "
                f"it or choose another --name (if it is no training run, remove {self._file})"
            )
        # Only one of several that come now can rename the file; and what it has renamed may
        # already be another's, who was quicker.
        dead = self._file.with_name(f"{OWNER_FILE}.{self._me.token}")
        try:
            os.rename(self._file, dead)
        except FileNotFoundError:
            return None
        if _read(dead) != owner:
            os.rename(dead, self._file)
            return None
        dead.unlink()
        return f"taken over from {who}, which ended without a word, last heartbeat {_ago(silent)}"

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS) and self._problem is None:
            self._problem = self._find_problem()

    def _find_problem(self) -> str | None:
        """Renews the heartbeat; says why the run can no longer write to its folder, if so."""
        for folder, before in self._watched.items():
            if not folder.is_dir():
                return _lost(folder)
            if before.is_writable and not _is_writable(folder):
                return f"{folder} cannot be written to any more"
        try:
            owner = _read(self._file)
            os.utime(self._file)
        except FileNotFoundError:
            return f"{_lost(self._directory)}, or its {OWNER_FILE} was removed"
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                return f"{self._file} cannot be written any more: {error.strerror}"
            return None  # a full disk or a network that is away may come back before the next save
        if owner not in (None, self._me):
            return f"{self._directory} was taken over by {owner}"
        return None


def _lost(folder: Path) -> str:
    return f"{folder} was deleted, renamed or replaced under the run"


def _is_writable(folder: Path) -> bool:
    """What the system says; some network file systems say no and let write nonetheless."""
    return os.access(folder, os.W_OK | os.X_OK)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _read(path: Path) -> _Owner | None:
    """The owner in a file; None if there is none in it."""
    try:
        return _Owner(**json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        return None


def _read_when_written(path: Path) -> _Owner | None:
    end = time.monotonic() + _NEW_FILE_SECONDS
    while (owner := _read(path)) is None and time.monotonic() < end:
        time.sleep(_NEW_FILE_SECONDS / 20)
    return owner


def _may_be_alive(owner: _Owner | None, silent: float) -> bool:
    if owner is not None and owner.machine == _machine():
        start = _process_start(owner.pid)
        return start is not None and start == owner.process_start
    return silent < DEAD_AFTER_SECONDS


def _myself() -> _Owner:
    return _Owner(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        token=uuid.uuid4().hex,
    )


def _machine() -> str:
    """The boot of this machine and the space of process ids: a container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()  # not Linux


def _process_start(pid: int) -> str | None:
    """When a process of this machine began, in ticks since the boot; None: there is none."""
    if not Path("/proc/self/stat").exists():
        return _running(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    state, start = fields[0], fields[19]
    return None if state in (b"Z", b"X") else start.decode()  # a zombie only waits for its parent


def _running(pid: int) -> str | None:
    """What other systems than Linux say without further help: whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's
    return "running"


def _ago(seconds: float) -> str:
    return f"{max(seconds, 0):.0f} s ago"
