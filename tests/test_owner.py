"""One run at a time writes to a folder; losing the folder is said in one line."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time

import jax
import pytest

from moda_jax.train import owner, processes
from moda_jax.train.owner import DEAD_AFTER_SECONDS, OWNER_FILE, FolderOwner


@pytest.fixture
def file_of(tmp_path):
    """Writes an owner file: this process's, but for `changes`, silent for `silent` seconds."""

    def write(*, silent=0.0, **changes):
        with FolderOwner(tmp_path):
            there = json.loads((tmp_path / OWNER_FILE).read_text())
        path = tmp_path / OWNER_FILE
        path.write_text(json.dumps(there | {"token": "another"} | changes))
        heartbeat = time.time() - silent
        os.utime(path, (heartbeat, heartbeat))
        return path

    return write


@pytest.fixture
def ended_process():
    """The id of a process that has ended, whose parent has not asked for its status yet."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield process.pid
    process.wait()


def test_a_second_run_is_refused_by_name(tmp_path):
    with FolderOwner(tmp_path):
        with pytest.raises(ValueError, match="is in use by process") as caught:
            FolderOwner(tmp_path)
        message = str(caught.value)
        for part in (str(tmp_path), f"process {os.getpid()} on ", " since 20", "last heartbeat"):
            assert part in message
        assert "\n" not in message
    assert not (tmp_path / OWNER_FILE).exists()
    with FolderOwner(tmp_path) as second:  # given free
        assert second.taken_from is None


def test_it_is_given_free_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), FolderOwner(tmp_path):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_dead_owner_is_succeeded(tmp_path, file_of, ended_process):
    file_of(pid=ended_process, silent=5)
    with FolderOwner(tmp_path) as successor:
        assert f"taken over from process {ended_process} on" in successor.taken_from
        assert "last heartbeat 5 s ago" in successor.taken_from
        assert [path.name for path in tmp_path.iterdir()] == [OWNER_FILE]


def test_another_process_with_the_same_id_is_not_the_owner(tmp_path, file_of):
    file_of(process_start="12")  # this process's id, and another start
    with FolderOwner(tmp_path) as successor:
        assert successor.taken_from is not None


@pytest.mark.parametrize("content", [{"machine": "another"}, None])
def test_another_machine_or_an_unreadable_file_is_judged_by_its_heartbeat(
    tmp_path, file_of, monkeypatch, content
):
    monkeypatch.setattr(owner, "_NEW_FILE_SECONDS", 0.05)

    def write(silent):
        path = file_of(**(content or {}))
        if content is None:
            path.write_bytes(b"")
        heartbeat = time.time() - silent
        os.utime(path, (heartbeat, heartbeat))

    write(DEAD_AFTER_SECONDS - 30)
    with pytest.raises(ValueError, match="in use by .* last heartbeat 90 s ago"):
        FolderOwner(tmp_path)
    (tmp_path / OWNER_FILE).unlink()
    write(DEAD_AFTER_SECONDS + 30)
    with FolderOwner(tmp_path) as successor:
        assert "last heartbeat 150 s ago" in successor.taken_from


@pytest.mark.parametrize("is_left_behind", [False, True])
def test_of_many_that_start_at_once_one_wins(tmp_path, file_of, ended_process, is_left_behind):
    if is_left_behind:
        file_of(pid=ended_process)
    barrier, owners, refused = threading.Barrier(8), [], []

    def start():
        barrier.wait()
        try:
            owners.append(FolderOwner(tmp_path))
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owners), len(refused)) == (1, 7)
    owners[0].check(now=True)
    owners[0].release()
    assert not list(tmp_path.iterdir())


def lose(tmp_path, name):
    """A folder and an owner that watches its subfolder too."""
    run = tmp_path / name
    (run / "checkpoints").mkdir(parents=True)
    holder = FolderOwner(run)
    holder.watch(run / "checkpoints")
    holder.check(now=True)
    return run, holder


def delete_subfolder(run):
    (run / "checkpoints").rmdir()


def replace_subfolder_by_a_file(run):
    delete_subfolder(run)
    (run / "checkpoints").write_text("")


def rename(run):
    run.rename(run.with_name("elsewhere"))


def replace(run):
    rename(run)
    (run / "checkpoints").mkdir(parents=True)


def remove_owner_file(run):
    (run / OWNER_FILE).unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (delete_subfolder, "run/checkpoints was deleted, renamed or replaced under the run"),
        (replace_subfolder_by_a_file, "run/checkpoints was deleted, renamed or replaced"),
        (rename, "run was deleted, renamed or replaced under the run"),
        (replace, "run was deleted, renamed or replaced under the run"),
        (remove_owner_file, "or its owner.json was removed"),
    ],
)
def test_a_lost_folder_is_one_line(tmp_path, fault, message):
    run, holder = lose(tmp_path, "run")
    fault(run)
    for _ in range(2):  # and it stays lost
        with pytest.raises(ValueError, match=f"{message}.*; the run was stopped") as caught:
            holder.check(now=True)
        assert "\n" not in str(caught.value)
    holder.release()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_made_read_only_is_one_line(tmp_path, monkeypatch, number):
    _, holder = lose(tmp_path, "run")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        expected = f"owner.json cannot be written any more: {os.strerror(number)}"
        with pytest.raises(ValueError, match=expected):
            holder.check(now=True)
    _, holder = lose(tmp_path, "other")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, _: path.name != "checkpoints")
        with pytest.raises(ValueError, match="other/checkpoints cannot be written to any more"):
            holder.check(now=True)
    holder.release()


def test_a_full_disk_does_not_lose_the_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with FolderOwner(tmp_path) as holder, monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        holder.check(now=True)


def test_a_folder_that_was_taken_over_meanwhile(tmp_path, file_of):
    with FolderOwner(tmp_path) as holder:
        path = tmp_path / OWNER_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "x", "pid": 77}))
        with pytest.raises(ValueError, match="was taken over by process 77 on "):
            holder.check(now=True)
    assert path.exists()  # the successor's


def test_the_heartbeat_is_written_and_notices_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "HEARTBEAT_SECONDS", 0.01)
    run, holder = lose(tmp_path, "run")
    os.utime(run / OWNER_FILE, (1, 1))
    end = time.monotonic() + 30
    while (run / OWNER_FILE).stat().st_mtime == 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert (run / OWNER_FILE).stat().st_mtime > 1
    rename(run)
    holder._thread.join(30)
    with pytest.raises(ValueError, match="was deleted, renamed or replaced"):
        holder.check()


def test_a_write_that_failed_since_the_folder_was_replaced_says_so(tmp_path):
    run, holder = lose(tmp_path, "run")
    failure = OSError("the checkpoint of step 8 could not be written")

    def save(*, is_replaced):
        with holder.guard():
            if is_replaced:
                (run / "checkpoints").rename(run / "gone")
                (run / "checkpoints").mkdir()  # as tensorstore does
            raise failure

    with pytest.raises(OSError, match="could not be written"):
        save(is_replaced=False)
    with pytest.raises(ValueError, match="run/checkpoints was deleted, renamed or replaced"):
        save(is_replaced=True)
    holder.release()


def test_the_first_process_owns_the_folder_for_all(tmp_path, monkeypatch):
    """The others take nothing, and learn of a refusal."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    outcome = {"result": None}
    monkeypatch.setattr(processes, "gather_json", lambda local: [outcome, local])
    FolderOwner(tmp_path).release()
    assert not list(tmp_path.iterdir())
    outcome = {"error": "runs/x is in use by process 7"}
    with pytest.raises(ValueError, match=re.escape(outcome["error"])):
        FolderOwner(tmp_path)
