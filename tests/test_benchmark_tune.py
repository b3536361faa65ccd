"""The search for tile sizes and the table that it writes; no kernel runs here."""

import dataclasses
import types

import jax
import pytest

from benchmarks import tune, tune_mosaic_gpu, tune_search, tune_triton
from benchmarks.shapes import SHAPES, Shape
from pallas_kernels import platforms
from pallas_kernels.triton_gpu import tiles
from pallas_kernels.triton_gpu.tuned import Table, table_key


@dataclasses.dataclass(frozen=True)
class FakeTiles:
    block: int = 64
    stages: int = 2


GRID = {"block": (32, 64, 128, 256), "stages": (2, 3, 4)}
TIMES = {(64, 2): 2.0, (128, 2): 1.5, (128, 3): 1.2, (128, 4): 1.199, (256, 2): 1.6}


def neighbours(config):
    return tune_search.candidates(config, GRID)


def test_candidates_differ_in_one_field():
    assert neighbours(FakeTiles(128, 3)) == [
        FakeTiles(32, 3),
        FakeTiles(64, 3),
        FakeTiles(256, 3),
        FakeTiles(128, 2),
        FakeTiles(128, 4),
    ]


def test_search_goes_on_until_nothing_is_a_percent_faster():
    tried = []

    def cost(config):
        tried.append(config)
        return TIMES.get(dataclasses.astuple(config))

    best, lowest, first = tune_search.search(FakeTiles(), neighbours, cost)
    assert (best, lowest, first) == (FakeTiles(128, 3), 1.2, 2.0)  # 1.199 is within the scatter
    assert len(tried) == len(set(tried))  # a compilation each
    with pytest.raises(ValueError, match=r"own choice does not work: FakeTiles\(block=8"):
        tune_search.search(FakeTiles(block=8), neighbours, cost)


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TABLE", Table(tmp_path / "tuned.json"))
    return tiles.TABLE


@pytest.fixture
def gpu(pretend):
    pretend("gpu", types.SimpleNamespace(compute_capability="9.0"))


KEY = table_key("depth_forward", 64, 8, True, "sm_90")


def test_measured_sizes_are_read_back(table):
    assert table.lookup(KEY, FakeTiles()) == FakeTiles()
    table.write({KEY: {"config": {"block": 128}, "ms": 1.0, "default_ms": 2.0}})
    assert Table(table.path).lookup(KEY, FakeTiles(stages=3)) == FakeTiles(128, 3)
    assert (
        table.lookup(table_key("depth_forward", 64, 4, True, "sm_90"), FakeTiles()) == FakeTiles()
    )
    table.write({KEY: {"config": {"width": 1}}})
    with pytest.raises(ValueError, match="has width, FakeTiles does not; run benchmarks/tune.py"):
        table.lookup(KEY, FakeTiles())


@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
def test_command_tunes_what_it_can(backend, table, gpu, monkeypatch, capsys):
    """Configs are told apart by results, errors and time; a kernel that fails stops no other.

    What is faster is printed, and Triton's is written into its table.
    """

    def run(shape, config):
        if config.stages == 4:
            raise RuntimeError("no such kernel")
        return (lambda x: x + (config.block == 32)), (jax.numpy.ones(config.block),)

    def broken(shape, config):
        raise RuntimeError("compiler crashed")

    kernel = tune_search.TunedKernel(lambda _: FakeTiles(), {"stages": (3, 4)}, run)
    kernels = {"broken": kernel._replace(run=broken), "good": kernel}
    found = tune.TunedBackend(
        kernels, *((table, tiles.architecture()) if backend == "triton" else ())
    )
    monkeypatch.setitem(tune.BACKENDS, backend, lambda: found)
    durations = iter([2.0, 1.0])
    monkeypatch.setattr(tune_search, "milliseconds", lambda *args, **kwargs: next(durations))
    assert tune.main(["--backend", backend, "--rows", "T16K"]) == 1
    captured = capsys.readouterr()
    assert "broken at T16K: ValueError: the kernel's own choice does not work" in captured.err
    assert "stages=4): RuntimeError: no such kernel" in captured.out
    assert "good at T16K: 2.000 -> 1.000 ms" in captured.out
    if backend == "mosaic_gpu":
        assert not table.read()
        return
    (entry,) = table.read().items()
    assert entry[0] == table_key("good", 64, 8, True, "sm_90")
    assert entry[1]["config"] == {"block": 64, "stages": 3}


def test_a_config_with_other_results_is_left_out(capsys):
    def run(shape, config):
        return (lambda x: x * config.stages), (jax.numpy.ones(4),)

    kernel = tune_search.TunedKernel(lambda _: FakeTiles(), {"stages": (3,)}, run)
    best, *_ = tune_search.tune(kernel, SHAPES["T16K"], deadline=float("inf"))
    assert best == FakeTiles()
    assert "other results than the first config's" in capsys.readouterr().out


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Pallas Mosaic GPU needs JAX >= 0.11")
@pytest.mark.parametrize(
    "name", ["forward", "sequence_backward", "depth_forward", "depth_backward"]
)
def test_the_kernels_take_their_configs(name):
    """Traced for a GPU, so that names and signatures are those of the kernels."""
    kernel = tune_mosaic_gpu.kernels()[name]
    shape = Shape("small", 128, 2, 8, kv_heads=1, head_dim=64)
    default = kernel.default(shape)
    with platforms.compiling_for("gpu"):
        function, arguments = kernel.run(shape, default)
        assert jax.tree.leaves(jax.eval_shape(function, *arguments))
        assert tune_search.candidates(default, kernel.grid)


@pytest.mark.parametrize(
    "name",
    ["sequence_forward", "sequence_dkv", "sequence_dq", "depth_forward", "depth_backward"],
)
def test_the_triton_kernels_take_their_configs(name):
    """Only traced, so that the names are those of the kernels' calls."""
    pytest.importorskip("triton", reason="an optional extra")
    kernel = tune_triton.kernels()[name]
    shape = Shape("small", 128, 2, 8, kv_heads=1, head_dim=64)
    for config in (
        default := kernel.default(shape),
        *tune_search.candidates(default, kernel.grid)[:1],
    ):
        function, arguments = kernel.run(shape, config)
        assert jax.tree.leaves(jax.eval_shape(function, *arguments))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_command_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main([])
    assert stop.value.code == 2
    assert "needs a GPU" in capsys.readouterr().err
