"""Compiled programs on disk: what a start finds, what it removes, and folders it cannot use."""

import dataclasses
import os
import shutil
import threading
import zlib
from pathlib import Path

import chex
import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from moda_jax.train import compilation_cache
from moda_jax.train.compilation_cache import CompilationCache, tidy
from moda_jax.train.trainer import train
from tests.runs import (  # noqa: F401  (two are fixtures)
    config_fixture,
    corpus_fixture,
    final_state,
    make_small,
    renamed,
)

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


def settings():
    return {name: getattr(jax.config, name) for name in SETTINGS}


@pytest.fixture
def enabled():
    """JAX as outside of the tests."""
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path / "home"


def name_of(number):
    return f"jit_step-{number:064x}-cache"


def write(folder, number, *, size=100, time=None):
    content = zlib.compress(os.urandom(size))
    path = folder / name_of(number)
    path.write_bytes(content)
    if time is not None:
        os.utime(path, (time, time))
    return path


def test_a_run_resumed_with_kept_programs_is_bitwise_one_that_compiles(
    config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compilation_cache, "_MIN_COMPILE_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "1000")
    before = settings()
    folder = tmp_path / "kept"
    whole = dataclasses.replace(
        make_small(config), name="whole", steps=3, checkpoint_every=2, compilation_cache=str(folder)
    )
    jax.clear_caches()
    train(whole)
    out = capsys.readouterr().out
    assert f"kept in {folder} (empty)" in out
    assert "first step after" in out
    assert "that were found compiled" not in out
    assert any(path.name.startswith("jit__train_step-") for path in folder.iterdir())
    resumed = renamed(whole, "resumed")
    directory = Path(whole.output_dir, "resumed")
    shutil.copytree(directory.with_name("whole"), directory)
    shutil.rmtree(directory / "checkpoints" / "3")
    assert train(resumed).finished
    out = capsys.readouterr().out
    assert "resumed at step 2" in out
    assert " programs, " in out
    assert "that were found compiled" in out
    chex.assert_trees_all_equal(final_state(resumed), final_state(whole))
    assert settings() == before


def test_torn_entries_are_removed_and_other_files_stay(tmp_path):
    whole, torn = write(tmp_path, 1), write(tmp_path, 2)
    torn.write_bytes(torn.read_bytes()[:-10])
    (tmp_path / "notes-cache").write_text("mine")
    assert tidy(tmp_path) == {whole: whole.stat().st_size}
    assert not torn.exists()
    assert (tmp_path / "notes-cache").read_text() == "mine"


def test_an_entry_is_read_once(tmp_path, monkeypatch):
    write(tmp_path, 1, time=1)
    read = []
    monkeypatch.setattr(compilation_cache, "_is_whole", lambda content: not read.append(content))
    tidy(tmp_path)
    tidy(tmp_path)
    assert len(read) == 1


def test_what_was_not_used_for_longest_goes(tmp_path, monkeypatch):
    paths = [write(tmp_path, i, size=1000, time=100 + i % 2 * 10 + i) for i in range(4)]
    sizes = [path.stat().st_size for path in paths]
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", sizes[1] + sizes[3])
    assert set(tidy(tmp_path)) == {paths[1], paths[3]}
    assert not paths[0].exists()


def test_many_may_tidy_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 5000)
    for i in range(200):
        path = write(tmp_path, i)
        if i % 2:
            path.write_bytes(b"torn")
    failed = []
    barrier = threading.Barrier(4)

    def start():
        try:
            barrier.wait()
            tidy(tmp_path)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sum(tidy(tmp_path).values()) <= 5000


@pytest.mark.usefixtures("enabled")
def test_the_folder_of_the_user(home, monkeypatch, tmp_path):
    before = settings()
    with CompilationCache("auto") as cache:
        folder = home / ".cache" / "moda-jax" / "xla"
        assert cache.description == f"kept in {folder} (empty)"
        assert jax.config.jax_compilation_cache_dir == str(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
    assert settings() == before
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with CompilationCache("auto") as cache:
        assert cache.description.startswith(f"kept in {tmp_path / 'xdg' / 'moda-jax' / 'xla'} ")
    # Entries are code: none is run that another user may have written.
    (tmp_path / "xdg" / "moda-jax" / "xla").chmod(0o777)
    with CompilationCache("auto") as cache:
        assert cache.description.endswith("expected a folder that only this user may write to")
    assert settings() == before


@pytest.mark.usefixtures("enabled", "home")
def test_the_users_own_setting_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with CompilationCache("auto") as cache:
        assert cache.description.startswith("not kept by a run of several processes")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    before = settings()
    try:
        with CompilationCache("auto") as cache:
            assert cache.description == f"kept in {tmp_path / 'mine'} (JAX's own setting)"
            assert settings() == before
        with CompilationCache("off"):
            assert not jax.config.jax_enable_compilation_cache
        assert settings() == before
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    with CompilationCache("auto") as cache:
        assert cache.description == "not kept (JAX's own setting)"


def test_a_folder_that_cannot_be_used_is_said_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    before = settings()
    with CompilationCache(str(tmp_path / "file" / "cache")) as cache:
        assert cache.description == f"not kept: {tmp_path}/file/cache: Not a directory"
        assert settings() == before
    monkeypatch.setattr(Path, "touch", lambda path: (_ for _ in ()).throw(OSError(30, "read-only")))
    with CompilationCache(str(tmp_path / "cache")) as cache:
        assert cache.description == "not kept: read-only"
        assert settings() == before
