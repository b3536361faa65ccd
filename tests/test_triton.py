"""The triton implementation: the shared suite, compiled on a GPU, else in Triton's interpreter."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    CASES,
    Case,
    compile_quickly,
    differentiate,
    make_problem,
    smaller,
    to_float64,
)
from attention_suite import AttentionSuite, assert_results_close

from moda_jax.ops.attention import check
from pallas_kernels import platforms, triton_gpu
from pallas_kernels.triton_gpu import launch, tiles
from pallas_kernels.triton_gpu.tiles import TileConfig
from pallas_kernels.triton_gpu.tuned import Table, table_key

_SMALL = check(*(jnp.zeros((1, 8, 2, 64), jnp.float16),) * 3)
UNSUPPORTED = triton_gpu.unsupported_reason(*_SMALL, platforms.current())
needs_triton = pytest.mark.skipif(UNSUPPORTED is not None, reason=str(UNSUPPORTED))
# In the interpreter a thousand tokens take minutes, and go through the same loops as a hundred.
TAKEN = tuple(
    case
    for case in CASES
    if case.query_offset is None
    and case.kv_length is None
    and (case.q_len < 1000 or platforms.current() == "gpu")
)
ON_GPU = platforms.current() == "gpu"
DTYPES = ("float32", "float16", "bfloat16") if ON_GPU else ("float32", "float16")
FAST = ("one_token", "packed", "depth_only", "chunk_window")


@needs_triton
class TestTriton:
    """The part of the suite that the interpreter does in less than a minute.

    Several rows and key heads are here only: the interpreter runs them one after another.
    """

    implementation = "triton"
    dtypes = DTYPES
    cases = tuple(case for case in TAKEN if case.name in FAST)
    pytest_generate_tests = AttentionSuite.pytest_generate_tests
    compiled = AttentionSuite.compiled
    test_equals_reference = AttentionSuite.test_equals_reference
    test_large_scores = AttentionSuite.test_large_scores


@needs_triton
@pytest.mark.slow
class TestTritonWhole(AttentionSuite):
    implementation = "triton"
    dtypes = DTYPES
    cases = (
        tuple(
            dataclasses.replace(case, dtypes=tuple(dict.fromkeys((*case.dtypes, *DTYPES[1:]))))
            for case in TAKEN
        )
        if ON_GPU
        else tuple(
            dataclasses.replace(smaller(case), dtypes=DTYPES[case.name in FAST : len(case.dtypes)])
            for case in TAKEN
        )
    )
    test_large_scores = None  # above
    if not ON_GPU:
        sized = staticmethod(smaller)


@needs_triton
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter, at the first document
def test_blocks_of_other_documents_are_not_touched():
    """The first document fills whole blocks with NaN: masking alone would give 0 times NaN."""
    case = Case("documents", q_len=96, batch=1, heads=2, kv_heads=1, slots=2)
    problem, border = make_problem(case), 32
    first = (np.arange(96) < border)[:, None]
    arrays = {name: np.where(first[..., None], np.nan, x) for name, x in problem.arrays.items()}
    d_out, d_lse = problem.cotangents
    cotangents = np.where(first[..., None], np.nan, d_out), np.where(first, np.nan, d_lse)
    segments = {"segment_ids": np.where(first[:, 0], 1, 2).astype(np.int32)[None]}
    packed = compile_quickly(differentiate(case, "triton"))(
        {name: jnp.float32(x) for name, x in arrays.items()}, cotangents, segments, None
    )

    def second(name: str, x):
        return x[:, :, border:] if name.startswith("depth") else x[:, border:]

    alone = compile_quickly(differentiate(case, "reference"))(
        {name: jnp.float32(second(name, x)) for name, x in problem.arrays.items()},
        [x[:, border:] for x in problem.cotangents],
        {},
        None,
    )
    grads = {name: second(name, x) for name, x in packed[2].items()}
    got = packed[0][:, border:], packed[1][:, border:], grads
    assert_results_close(got, to_float64(alone), "float32")


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """`tiles.choose` for an H100, with a table of one entry a kernel, for 8 heads."""
    monkeypatch.setattr(tiles, "TABLE", Table(tmp_path / "tuned.json"))
    monkeypatch.setattr(tiles, "architecture", lambda: "sm_90")
    for kernel in ("sequence_dq", "depth_forward"):
        config = dataclasses.asdict(TileConfig(16, 32, 1, 4))
        tiles.TABLE.write({table_key(kernel, 64, 8, True, "sm_90"): {"config": config}})

    def choose(kernel, **changed):
        call = {"head_dim": 64, "group": 8, "is_causal": True, "dtype": jnp.bfloat16} | changed
        with platforms.compiling_for("gpu"):
            return tiles.choose(kernel, **call)

    return choose


def test_measured_tiles_are_taken_where_they_fit(choose):
    measured = TileConfig(16, 32, 1, 4)
    assert choose("sequence_dq") == choose("depth_forward") == measured
    assert choose("sequence_dq", is_causal=False) == measured
    for unlike in ({"head_dim": 128}, {"dtype": jnp.float32}):
        assert choose("sequence_dq", **unlike) != measured
    assert choose("sequence_dkv") == tiles._HALF["sequence_dkv", 64]


def test_a_sequence_kernel_takes_the_nearest_group_that_was_measured(choose):
    assert choose("sequence_dq", group=3) == TileConfig(16, 32, 1, 4)
    assert choose("sequence_dq", group=40) == TileConfig(64, 32, 1, 4)  # a token's heads fit
    assert choose("depth_forward", group=3) == tiles._HALF["depth_forward", 64]
    entry = {"config": {"keys": 128}}
    tiles.TABLE.write({table_key("sequence_dq", 64, 1, True, "sm_90"): entry})
    assert [choose("sequence_dq", group=group).keys for group in (1, 2, 3, 6)] == [128, 128, 32, 32]


def test_the_table_is_of_these_kernels():
    for key, entry in Table(tiles.TABLE.path).read().items():
        kernel, head_dim, group, *_ = key.split()
        assert (kernel, int(head_dim[1:])) in tiles._HALF
        assert TileConfig(**entry["config"]).rows >= tiles.padded(int(group[1:]))


@pytest.fixture
def installed(monkeypatch):
    """Versions by package, in place of what is installed; packages not there are missing."""
    versions = {"triton": "3.7.1", "jax-triton": "0.3.1", "jax": "0.11.2"}

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch.tiles, "architecture", lambda: "sm_80")
    launch._version_unsupported_reason.cache_clear()
    yield versions
    launch._version_unsupported_reason.cache_clear()


def test_what_to_install_is_said(installed):
    assert launch.unsupported_reason("gpu") is None
    del installed["jax-triton"]
    launch._version_unsupported_reason.cache_clear()
    assert launch.unsupported_reason("gpu") == (
        'jax-triton is not installed: pip install -e ".[triton]"'
    )


@pytest.mark.parametrize(
    ("package", "version", "window"),
    [
        ("triton", "3.5.1", ">=3.6,<3.8"),
        ("triton", "3.8.0", ">=3.6,<3.8"),
        ("jax-triton", "0.4.0", ">=0.3.1,<0.4"),
        ("jax", "0.10.2", ">=0.11,<0.13"),
    ],
)
def test_versions_outside_the_window_are_not_supported(installed, package, version, window):
    installed[package] = version
    assert launch.unsupported_reason("gpu") == (
        f'works with {package}{window}, this is {version}: pip install -e ".[triton]"'
    )


def test_the_extra_installs_what_the_backend_takes():
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    extra = project["project"]["optional-dependencies"]["triton"]
    assert set(extra) == {launch.requirement(package) for package in launch.WINDOW}


def test_platforms_without_such_kernels_are_not_supported(installed, monkeypatch):
    assert launch.unsupported_reason("tpu") == "Triton kernels need a GPU"
    assert "on a CPU, TRITON_INTERPRET=1" in launch.unsupported_reason("cpu")
    monkeypatch.setattr(launch.tiles, "architecture", lambda: "sm_75")
    assert (
        launch.unsupported_reason("gpu")
        == "needs compute capability 8.0 or later, this GPU is sm_75"
    )
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    assert launch.unsupported_reason("cpu") is None
    assert "for the interpreter" in launch.unsupported_reason("gpu")


def test_everything_imports_without_triton():
    code = """
import sys
sys.modules["triton"] = sys.modules["jax_triton"] = None
import jax.numpy as jnp, moda_jax
x = jnp.ones((1, 4, 2, 16))
print(moda_jax.explain_attention(x, x, x).unsupported_reasons["triton"])
"""
    # On a GPU the call would be taken: what is installed, the metadata say.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
