"""The TPU benchmarks: the model of the kernels, and programs for chips that are not here."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from benchmarks import (
    hlo_cost,
    hlo_text,
    tpu_chips,
    tpu_kernels,
    tpu_operator,
    tpu_roofline,
    tpu_splash,
    tpu_train_step,
)
from benchmarks.tpu_kernels import Call
from moda_jax import moda_attention
from moda_jax.config import Config, ExecutionConfig, MeshConfig, MoDAConfig, ModelConfig
from moda_jax.depth import make_mechanism
from moda_jax.ops.sharding import make_mesh
from pallas_kernels import platforms
from pallas_kernels.mosaic_tpu import schedule

CALL = Call(tokens=1300, slots=5, heads=4, kv_heads=2, head_dim=64, batch=2)
V5E = tpu_chips.CHIPS["v5e"]


def works(call):
    return {kernel.name: kernel.work for part in tpu_kernels.launches(call) for kernel in part}


def blocks_with_work(tokens, q_block, k_block):
    """Pairs of blocks in which some query sees some key, from the mask itself."""
    mask = np.tri(tokens, dtype=bool)
    return sum(
        bool(mask[i : i + q_block, j : j + k_block].any())
        for i in range(0, tokens, q_block)
        for j in range(0, tokens, k_block)
    )


@pytest.mark.parametrize(("forward", "backward"), [((128, 256), (256, 128)), ((256, 512), None)])
def test_visited_blocks_are_those_of_the_mask(forward, backward):
    sizes = {"q_block": forward[0], "k_block": forward[1]}
    if backward is not None:
        sizes |= {"q_grad_block": backward[0], "k_grad_block": backward[1]}
    tpu_kernels.launches.cache_clear()
    with schedule.override(**sizes, q_span=1536):
        found = works(CALL)
        tiles = schedule.choose_tiles(schedule.CallShape(2, 1300, 1300, 2, 2, 64, 2))
    tpu_kernels.launches.cache_clear()
    backward = tiles.q_grad_block, tiles.k_grad_block
    for name, blocks in (("forward", forward), ("backward", backward)):
        expected = blocks_with_work(1300, *blocks) * 2 * 2  # rows and key heads
        assert found[f"moda_tokens_{name}"].pairs == expected


def test_a_kernel_in_a_loop_counts_as_often_as_it_runs():
    """A long sequence's dq is computed by spans of queries."""
    tpu_kernels.launches.cache_clear()
    with schedule.override(q_grad_block=128, k_grad_block=128, q_span=256):
        backward = tpu_kernels.launches(CALL)[1]
    tpu_kernels.launches.cache_clear()
    spans = [kernel.work.pairs for kernel in backward if kernel.name == "moda_tokens_backward"]
    expected = blocks_with_work(1300, 128, 128) * 2 * 2
    assert len(spans) == 6
    assert sum(spans) == pytest.approx(expected, abs=len(spans))  # shares are whole numbers


def test_the_depth_kernels_move_each_array_once():
    query, _, _, depth, _ = CALL.arrays()
    size = {"query": query.size * 2, "rows": query.size // 64 * 4, "slots": 2 * depth.size * 2}
    forward, backward = (works(CALL)[f"moda_depth_{name}"] for name in ("forward", "backward"))
    assert forward.bytes_read == size["query"] + size["slots"]
    assert backward.bytes_written >= size["slots"]  # their gradients, and dq
    assert backward.bytes_read >= 2 * size["query"] + 2 * size["rows"] + size["slots"]
    in_stack = works(dataclasses.replace(CALL, grads_dtype="float32"))["moda_depth_backward"]
    assert in_stack.bytes_read - backward.bytes_read == 2 * size["slots"]  # float32, read again


def test_the_compiler_is_told_the_same_numbers():
    def run(arrays, d_out):
        attend = lambda *x: moda_attention(*x, implementation="mosaic_tpu")  # noqa: E731
        return jax.vjp(attend, *arrays)[1](d_out)

    arrays = CALL.arrays()
    with platforms.compiling_for("tpu"):
        jaxpr = jax.make_jaxpr(run)(arrays, arrays[0])
    numbers = r"CostEstimate\(flops=(\d+), transcendentals=(\d+), bytes_accessed=(\d+)"
    told = [tuple(map(int, found)) for found in re.findall(numbers, str(jaxpr))]
    known = [kernel.work for part in tpu_kernels.launches(CALL) for kernel in part]
    assert len(told) == len(known) == 4
    assert told == [
        (x.mxu_flops + x.vpu_ops, x.exps, x.bytes_read + x.bytes_written) for x in known
    ]


def test_a_kernel_takes_as_long_as_its_slowest_unit():
    work = schedule.Work(
        steps=10,
        pairs=10,
        bytes_read=819_000,
        bytes_written=0,
        mxu_flops=197_000_000,
        vpu_ops=1,
        exps=1,
    )
    wide, narrow = (tpu_kernels.roofline(work, V5E, head_dim) for head_dim in (128, 64))
    assert (wide.mxu, wide.hbm) == pytest.approx((1e-6, 1e-6))
    assert narrow.bound == narrow.mxu == pytest.approx(2e-6)  # half of the array idles
    assert narrow.limit == "mxu"
    launch = tpu_kernels.Launch("kernel", work)
    assert tpu_kernels.bound([launch] * 3, V5E, 64) == pytest.approx(6e-6)
    light = tpu_kernels.Launch("light", dataclasses.replace(work, mxu_flops=0))
    assert tpu_kernels.overlapped([launch, light], V5E, 64) == pytest.approx(2e-6)


def test_the_mean_kernel_is_the_mean_over_layers():
    model = ModelConfig(
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        depth=MoDAConfig(ffn_kv="none"),
    )
    execution = ExecutionConfig(attention="mosaic_tpu")
    mesh = MeshConfig(fsdp=2, tensor=2)
    config = Config("four", model, execution, mesh=mesh, batch_size=2)
    slots = make_mechanism(model).visible_slots()
    assert slots == [0, 1, 2, 3]  # the mean is no number of slots
    mean = tpu_kernels.mean_kernels(config, V5E)["moda_depth_backward"]
    layers = [works(tpu_kernels.layer_call(config, n))["moda_depth_backward"] for n in slots[1:3]]
    assert mean.hbm_bytes == np.mean([x.bytes_read + x.bytes_written for x in layers])
    xla = dataclasses.replace(config, execution=ExecutionConfig(attention="xla"))
    assert tpu_kernels.mean_kernels(xla, V5E) == {}


def test_splash_attention_visits_the_blocks_of_its_mask():
    call = Call(tokens=1536, slots=0, heads=4, kv_heads=2, head_dim=64, batch=2)
    expected = blocks_with_work(1536, 512, 512) * 4 * 2
    assert [kernel.work.pairs for kernel in tpu_splash.launches(call)] == [expected] * 3
    plain, fused = tpu_splash.launches(call)[1:], tpu_splash.launches(call, fused=True)[1:]
    assert sum(x.work.mxu_flops for x in plain) * 5 == sum(x.work.mxu_flops for x in fused) * 7


def test_roofline_smoke_run_writes_both_files(tmp_path, capsys):
    output = tmp_path / "deep" / "roofline"
    assert tpu_roofline.main(["--smoke", "--chips", "v5e,v6e", "--output", str(output)]) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    row = record["predictions"]["v6e"]["smoke"]
    assert row["moda"]["total"] > row["vanilla"]["total"] > row["vanilla"]["forward"] > 0
    more = row["moda"]["total"] - row["vanilla"]["total"]
    assert 0 < row["depth"]["total"] <= more + 1e-9  # the sequence part reads the depth part's o
    assert row["total overhead, overlapped"] <= row["total overhead"]
    text = output.with_suffix(".md").read_text()
    assert record["command"] in text
    assert text.count("| smoke | 1 | 256 | 4 | 2 | 64 | 3 |") == 2
    assert "## v6e" in capsys.readouterr().out


def test_unknown_topology():
    with pytest.raises(ValueError, match=r"expected one of v5e, v5p, v6e:SHAPE, got 'v9:2x2'"):
        tpu_chips.chip_of("v9:2x2")


# --- programs for chips that are not here ---------------------------------------------------------


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="pip install -e '.[tpu]' brings the compiler")


@pytest.mark.parametrize(("slice_of", "fsdp"), [("v5e:4x4", 8), ("v5p:4x4x4", 32)])
def test_a_mesh_axis_may_be_a_part_of_a_slices_axis(libtpu, slice_of, fsdp):
    mesh = make_mesh(MeshConfig(fsdp=fsdp, tensor=2), tpu_chips.devices(slice_of))
    assert mesh.devices.shape == (1, fsdp, 2)
    pairs = np.array([[chip.coords for chip in pair] for pair in mesh.devices[0]])
    assert (np.abs(pairs[:, 0] - pairs[:, 1]).sum(axis=1) == 1).all()  # neighbours share the heads


def test_operator_smoke_run_writes_both_files(libtpu, tmp_path):
    output = tmp_path / "operator"
    assert tpu_operator.main(["--smoke", "--chips", "v5e", "--output", str(output)]) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    programs = {(x["variant"], x["part"]): x for x in record["programs"]}
    assert len(programs) == 7
    kernels = programs["moda", "gradient"]["kernels"]
    assert set(kernels) == set(works(tpu_roofline.SMOKE["smoke"]))
    reported = programs["moda", "gradient"]["reported_flops"]
    assert reported > sum(x.mxu_flops for x in works(tpu_roofline.SMOKE["smoke"]).values())
    assert programs["splash + depth", "forward"]["moved_bytes"] > 0
    assert record["command"] in output.with_suffix(".md").read_text()


def test_programs_that_fail_are_named(libtpu, capsys):
    configs = ["missing", "moda_700m_row4"]
    arguments = ["--smoke", "--topologies", "v5e:2x2", "--configs", ",".join(configs)]
    assert tpu_train_step.main([*arguments, "--tensor", "3"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert any(line.startswith("missing on v5e:2x2: No module named") for line in errors)
    expected = "moda_700m_row4 on v5e:2x2: data, tensor: expected divisors of 4 chips, got 1, 3"
    assert expected in errors


@pytest.mark.slow
def test_train_step_smoke_run(libtpu, tmp_path):
    output = tmp_path / "steps"
    arguments = ["--smoke", "--topologies", "v5e:2x2", "--rows", "2", "--seq-len", "1024"]
    configs = "moda_700m_row4/slot_gradients=add,olmo2_700m_36"
    arguments += ["--configs", configs, "--hlo", str(tmp_path / "hlo")]
    assert tpu_train_step.main([*arguments, "--output", str(output)]) == 0
    moda, vanilla = json.loads(output.with_suffix(".json").read_text())["steps"]
    assert moda["kernels"]["moda_depth_backward"]["calls"] == 3  # layers
    assert moda["kernels"]["moda_tokens_forward"]["calls"] == 3
    assert set(vanilla["kernels"]) == {"moda_tokens_forward", "moda_tokens_backward"}
    for step in (moda, vanilla):
        assert step["argument_bytes"] > 12 * step["parameters"] / 4  # weights, two moments
        assert 1 < step["flops"] / step["model_flops"] < 2
        assert not step["unknown_loops"]
    assert moda["seconds"] > vanilla["seconds"]
    assert "moda_700m_row4" in output.with_suffix(".md").read_text()
    (program,) = (tmp_path / "hlo").glob("moda_700m_row4*.txt")
    assert cache_copies(program.read_text()) == []


def cache_copies(text):
    """Instructions that copy something as large as the running gradient cache."""
    module = hlo_text.parse(text)
    cache = (4, 2, 1024, 1, 64)  # slots, rows, tokens, key heads of a chip, head size
    return [
        x.name
        for computation in module.computations.values()
        for x in computation.instructions.values()
        if x.opcode in ("copy", "copy-start") and sorted(x.arrays[0].dims) == sorted(cache)
    ]


@pytest.mark.slow
def test_counts_agree_with_the_compilers_own(libtpu):
    """Loops once, as it counts; what is not a product is the difference."""
    args = tpu_train_step._arguments().parse_args(
        ["--smoke", "--rows", "2", "--seq-len", "1024", "--attention", "xla"]
    )
    devices = tpu_chips.devices("v5e:2x2")
    compiled = tpu_train_step.compile_step(
        tpu_train_step.adapt("moda_700m_row4/slot_gradients=add", len(devices), args), devices
    )
    ours = hlo_cost.count(compiled.as_text(), loops=False).flops
    assert ours == pytest.approx(compiled.cost_analysis()["flops"], rel=0.15)
    assert cache_copies(compiled.as_text()) == []
