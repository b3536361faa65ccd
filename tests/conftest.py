"""Runs before any test module imports JAX: the devices that the tests see.

Tests run on the CPU unless JAX_PLATFORMS says otherwise, and there on 8 virtual devices, so that
every mesh is tested without hardware. What is not sharded runs on one of them as usual. Triton's
kernels run in Triton's interpreter there. What JAX compiles is kept where a test says so, never in
the home of the user.
"""

import os
import zlib
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    _flags += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in _flags:
    # Tests compile much and run little, and machine code that is not optimised takes half the time.
    _flags += " --xla_backend_optimization_level=0"
if "xla_backend_extra_options" not in _flags:
    # With JAX 0.10 XLA's older emitters halve that again. Not --xla_cpu_use_fusion_emitters=false:
    # libtpu and later versions do not know that flag, and end the process when they see it.
    _flags += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
if "xla_cpu_parallel_codegen_split_count" not in _flags:
    # One LLVM module a program, not one for each of up to 32 threads: a worker has one core, see
    # below, and more modules mean more memory maps and a tenth more time.
    _flags += " --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = _flags.strip()
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated

    # A process for each core keeps to its own: threads of one that run at once wait for Python's
    # lock, and Mosaic GPU's interpreter, a thread for each warpgroup, takes half as long again.
    _worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    _cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ()
    if 1 < len(_cores) <= int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")):
        os.sched_setaffinity(0, {_cores[int(_worker) % len(_cores)]})

    # libtpu, as a compiler for chips that are not here: it asks no metadata server which chip this
    # is, lets several processes load it at once (pytest-xdist), and writes no log files.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")

import jax  # noqa: E402
import pytest  # noqa: E402

from pallas_kernels.mosaic_gpu import operator  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--newer-pair",
        action="store_true",
        help="what an older JAX skips, slow or not, and a quarter of the other fast tests",
    )


def pytest_collection_modifyitems(config, items):
    if jax.__version_info__ < (0, 11):
        for item in items:
            if mark := item.get_closest_marker("newer_jax"):
                item.add_marker(pytest.mark.skip(reason=mark.kwargs["reason"]))
    if not config.getoption("--newer-pair"):
        return
    kept, others = [], []
    for item in items:
        # A test's name decides, so that a new test does not change which others run.
        fourth = zlib.crc32(item.nodeid.encode()) % 4 == 0
        wanted = fourth and not item.get_closest_marker("slow")
        (kept if wanted or item.get_closest_marker("newer_jax") else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept


@pytest.fixture
def pretend(monkeypatch):
    """A function that makes another backend, and other devices, the default ones of a test.

    What was concluded from them is forgotten: a mosaic_gpu call that is compiled later in the same
    process must find the backend supported again.
    """

    def set_default(backend, *devices):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        if devices:
            monkeypatch.setattr(jax, "devices", lambda: list(devices))
        operator._device_unsupported_reason.cache_clear()

    yield set_default
    operator._device_unsupported_reason.cache_clear()


@pytest.fixture(autouse=True)
def room_for_machine_code():
    """Compiled programs are forgotten before their memory maps reach Linux's limit of 65530.

    A process beyond it dies of a segmentation fault, in whatever it compiles next; a stack's
    gradient takes some 600.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
