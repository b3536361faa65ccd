"""The mosaic_tpu implementation: the shared suite, interpreted on the CPU; which blocks are moved.

`test_mosaic_tpu_compiled.py` compiles the same kernels for real chips.
"""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    CASES,
    HALF,
    Case,
    compile_quickly,
    differentiate,
    expected_results,
    make_problem,
    poison,
)
from attention_suite import AttentionSuite, assert_results_close

from moda_jax import explain_attention
from moda_jax.ops.attention import check
from pallas_kernels import mosaic_tpu, platforms
from pallas_kernels.mosaic_tpu import common, operator, schedule

not_on_gpu = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="runs on a TPU, or interpreted on the CPU"
)
FAST = ("window_static", "chunk_whole_sequence", "decode", "packed")
# In bfloat16, too, which changes casts and not which blocks are read: a case of each kernel.
ROUNDED = ("basic", "packed", "chunk", "depth_only", "decode")
# Several blocks each way, the last ones ragged, and two spans of queries for dq.
SMALL_TILES = {
    "q_block": 128,
    "k_block": 128,
    "q_grad_block": 128,
    "k_grad_block": 128,
    "q_span": 256,
    "depth_block": 128,
    "depth_heads": 1,
    "depth_grad_block": 128,
    "depth_grad_heads": 1,
}
MANY_BLOCKS = (
    Case("blocks_causal", q_len=300, batch=1, slots=3, depth_lengths=(2,)),
    Case("blocks_packed", q_len=300, segments="packed", slots=2),
    Case("blocks_full", q_len=300, k_len=200, batch=1, slots=2, options={"is_causal": False}),
    Case(
        "blocks_chunk",
        q_len=300,
        batch=1,
        heads=2,
        slots=2,
        segments="packed",
        options={"depth_chunk": 96},
        depth_lengths=(1,),
    ),
    Case(
        "blocks_decode",
        q_len=150,
        k_len=400,
        depth_tokens=250,
        query_offset=(7, 220),
        kv_length=(157, 370),
        slots=2,
        segments="pair",
        options={"depth_chunk": 64},
    ),
)


def narrowed(cases):
    """Without float16."""
    return tuple(
        dataclasses.replace(case, dtypes=tuple(x for x in case.dtypes if x in HALF))
        for case in cases
    )


@not_on_gpu
class TestMosaicTpu:
    """The part of the suite that fits into a quarter of a minute."""

    implementation = "mosaic_tpu"
    dtypes = ("float32",)
    cases = narrowed(case for case in CASES if case.name in FAST)
    pytest_generate_tests = AttentionSuite.pytest_generate_tests
    compiled = AttentionSuite.compiled
    test_equals_reference = AttentionSuite.test_equals_reference
    test_large_scores = AttentionSuite.test_large_scores


@not_on_gpu
@pytest.mark.slow
class TestMosaicTpuWhole(AttentionSuite):
    implementation = "mosaic_tpu"
    test_large_scores = None  # above
    test_packed_documents_are_as_if_alone = None  # follows from the cases, as exactly
    dtypes = HALF
    cases = tuple(
        dataclasses.replace(
            case,
            dtypes=tuple(
                dtype
                for dtype in case.dtypes
                if (case.name not in FAST if dtype == "float32" else case.name in ROUNDED)
            ),
        )
        for case in narrowed(CASES)
    )


def run_case(case: Case) -> None:
    problem = make_problem(case)
    run = compile_quickly(differentiate(case, "mosaic_tpu"))
    for length, expected in expected_results(case).items():
        arrays = {name: jnp.asarray(x) for name, x in poison(case, length).items()}
        got = run(arrays, problem.cotangents, problem.integers, length)
        assert_results_close(got, expected, "float32")


@not_on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", MANY_BLOCKS, ids=lambda case: case.name)
def test_many_blocks_equal_the_reference(case):
    with schedule.override(**SMALL_TILES):
        run_case(case)


@not_on_gpu
@pytest.mark.slow
def test_in_simulated_memory(capfd):
    """Copies between HBM and VMEM as a chip makes them; uninitialized memory is NaN.

    With chunks, packed documents and one depth length: what other cases have is among it.
    """
    case = next(case for case in MANY_BLOCKS if case.name == "blocks_chunk")
    case = dataclasses.replace(case, q_len=200, batch=1, heads=2, kv_heads=1)
    with schedule.override(**SMALL_TILES), common.simulated_memory():
        run_case(case)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


# --- which blocks are moved -----------------------------------------------------------------------


def count_fetches(grid, operand, scalars) -> int:
    """How often a pipeline fetches a block: whenever its index differs from the step before."""
    refs = types.SimpleNamespace(**{name: np.asarray(x) for name, x in scalars.items()})
    indices = [tuple(int(n) for n in operand.index(*ids, refs)) for ids in np.ndindex(*grid)]
    return 1 + sum(a != b for a, b in itertools.pairwise(indices))


@pytest.fixture
def launches(monkeypatch):
    """Every launch of a call that is not traced, with its operands; outputs are zeros."""
    seen = {}

    def launch(body, *, name, grid, scalars, inputs, outputs, work, **_):
        present = {key: x for key, x in inputs.items() if x.array is not None}
        seen.setdefault(name, []).append((grid, scalars, present, outputs, work))
        return {
            key: jnp.zeros(x.array.shape, x.array.dtype)
            for key, x in outputs.items()
            if x.array is not None
        }

    monkeypatch.setattr(common, "launch", launch)
    monkeypatch.setattr(operator, "_one_by_one", lambda function: function)
    return seen


def attention_operands(length, slots=3, **integers):
    query, keys = jnp.zeros((1, length, 4, 16)), jnp.zeros((1, length, 2, 16))
    depth = jnp.zeros((slots, 1, length, 2, 16))
    return check(query, keys, keys, depth, depth, **integers)


@pytest.mark.parametrize("causal", [True, False])
def test_work_counts_what_the_grid_fetches(launches, causal):
    """The bytes of the schedule, which a roofline uses, are those of the grid's index maps."""
    operands, options = attention_operands(512, is_causal=causal)
    with schedule.override(**SMALL_TILES | {"q_span": 512}), jax.disable_jit():
        out, lse = mosaic_tpu.forward(operands, options)
        mosaic_tpu.backward(operands, options, out, lse, out, None)
    assert len(launches) == 4
    for name, calls in launches.items():
        for grid, scalars, inputs, outputs, work in calls:
            moved = dict.fromkeys(("in", "out"), 0)
            for kind, group in (("in", inputs), ("out", outputs)):
                for operand in (x for x in group.values() if x.array is not None):
                    size = np.prod([n for n in operand.block if n]) * operand.array.dtype.itemsize
                    moved[kind] += size * count_fetches(grid, operand, scalars)
            assert work.bytes_written == moved["out"], name
            assert work.bytes_read == moved["in"], name
            assert work.steps == np.prod(grid), name


def test_invisible_slots_and_other_documents_are_not_fetched(launches):
    segments = jnp.repeat(jnp.arange(1, 5), 128)[None]
    operands, options = attention_operands(
        512, slots=9, depth_window=2, depth_reserved=1, segment_ids=segments
    )
    operands = operands._replace(depth_length=jnp.int32(6))
    with schedule.override(**SMALL_TILES), jax.disable_jit():
        mosaic_tpu.forward(operands, options)
    ((grid, scalars, inputs, *_),) = launches["moda_depth_forward"]
    assert count_fetches(grid, inputs["depth_key"], scalars) == 2 * 4 * 3  # heads, blocks, slots
    ((grid, scalars, inputs, *_),) = launches["moda_tokens_forward"]
    assert count_fetches(grid, inputs["key"], scalars) == 2 * 4  # heads, blocks: one pair each
    slots = {
        int(common.slot_index(n, scalars_of(launches, "moda_depth_forward"))) for n in range(9)
    }
    assert slots == {0, 4, 5}


def scalars_of(launches, name):
    return np.asarray(launches[name][0][1]["slots"])


@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize("causal", [True, False])
def test_needed_and_unmasked_are_what_the_mask_says(causal, chunk):
    causal = causal or chunk is not None
    rng = np.random.default_rng(0)
    for _ in range(300):
        q_start, k_start = rng.integers(0, 100, 2)
        q_stop, k_stop = q_start + rng.integers(0, 40), k_start + rng.integers(0, 40)
        q, k = np.arange(q_start, q_stop)[:, None], np.arange(k_start, k_stop)
        mask = np.broadcast_to(True, (q.size, k.size))
        if causal:
            mask = mask & (k <= q)
        first = last = None
        if chunk is not None:
            mask = mask & (k >= q // chunk * chunk)
            first, last = q_start // chunk * chunk, (q_stop - 1) // chunk * chunk
        bounds = q_start, q_stop, k_start, k_stop
        assert schedule.needed(*bounds, causal=causal, lowest=first) == mask.any()
        if mask.any():
            assert schedule.unmasked(*bounds, causal=causal, lowest=last) == mask.all()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (8, 2), (8, 8), (1, 32), (40, 1)])
def test_tiles_fit(kv_heads, group, head_dim, itemsize):
    for length in (1, 129, 4096, 65536):
        shape = schedule.CallShape(2, length, length, kv_heads, group, head_dim, itemsize)
        if group * head_dim * itemsize > 2**13:
            continue  # 32 heads of 256 on one key head do not fit, see below
        tiles = schedule.choose_tiles(shape)
        assert max(schedule.vmem_need(shape, tiles).values()) <= schedule.VMEM_BYTES
        spans = schedule.query_spans(length, tiles)
        assert [stop for _, stop in spans[:-1]] == [start for start, _ in spans[1:]]
        assert spans[-1][1] * tiles.q_grad_block >= length


def test_tiles_that_do_not_fit_are_named():
    shape = schedule.CallShape(1, 512, 512, 1, 64, 256, 4)
    with pytest.raises(ValueError, match="mosaic_tpu .*: expected blocks of at most"):
        schedule.choose_tiles(shape)
    small = schedule.CallShape(1, 512, 512, 4, 1, 64, 2)
    with schedule.override(depth_heads=3), pytest.raises(ValueError, match="divisor of 4, got 3"):
        schedule.choose_tiles(small)


# --- unsupported calls ----------------------------------------------------------------------------


def shapes(dtype=jnp.bfloat16, heads=4, length=16, head_dim=64):
    query = jax.ShapeDtypeStruct((1, length, heads, head_dim), dtype)
    keys = jax.ShapeDtypeStruct((1, length, 2, head_dim), dtype)
    return {"query": query, "key": keys, "value": keys}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": jnp.float16}, "float32 and bfloat16, not float16"),
        ({"head_dim": 257}, "head sizes up to 256, not 257"),
        ({"length": 0}, "at least one row and one token"),
        ({"heads": 256, "head_dim": 256}, "bytes of VMEM"),
    ],
)
def test_unsupported_reasons(changes, reason):
    assert reason in explain_attention(**shapes(**changes)).unsupported_reasons["mosaic_tpu"]


def test_is_the_choice_for_a_tpu_and_no_other():
    with platforms.compiling_for("cpu"):
        assert explain_attention(**shapes()).name != "mosaic_tpu"
    with platforms.compiling_for("tpu"):
        choice = explain_attention(**shapes())
        assert (choice.name, choice.is_slow) == ("mosaic_tpu", False)
    with platforms.compiling_for("gpu"):
        assert "need a TPU" in explain_attention(**shapes()).unsupported_reasons["mosaic_tpu"]
