"""The mosaic_gpu implementation: the shared suite, interpreted on the CPU, compiled on a Hopper.

Copies of whole blocks of slots exist on the GPU only.
"""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import pytest
from attention_cases import CASES, smaller
from attention_suite import AttentionSuite

from moda_jax import explain_attention
from moda_jax.config import Config, ExecutionConfig, MeshConfig, ModelConfig
from moda_jax.depth import make_mechanism
from moda_jax.ops.attention import check
from moda_jax.ops.sharding import batch_sharding, make_mesh
from moda_jax.train.train_step import make_train_functions
from pallas_kernels import mosaic_gpu, platforms
from pallas_kernels.mosaic_gpu import common

needs_mosaic = pytest.mark.newer_jax(reason="Pallas Mosaic GPU needs JAX >= 0.11")
HALF = ("bfloat16", "float16")
TAKEN = [case for case in CASES if case.query_offset is None and case.kv_length is None]
ON_GPU = platforms.current() == "gpu"
FAST = ("one_token", "packed", "window_static", "depth_only", "chunk_whole_sequence")


def narrowed(cases):
    """Without float32; float16 where the case has it, in the interpreter in one with slots."""
    names = [case.name for case in TAKEN if "float16" in case.dtypes] if ON_GPU else ["basic"]
    return tuple(dataclasses.replace(c, dtypes=HALF[: 1 + (c.name in names)]) for c in cases)


@pytest.fixture
def races(capfd):
    """The interpreter looks for races between copies, warpgroups and products; it only prints."""
    with common.race_detection():
        yield
    printed = "".join(capfd.readouterr())
    assert "RACE DETECTED" not in printed, printed


@needs_mosaic
@pytest.mark.usefixtures("races")
class TestMosaicGpu:
    """The part of the suite that fits into a minute.

    Cases with several rows and key heads are here only: the interpreter runs one after another.
    """

    implementation = "mosaic_gpu"
    dtypes = HALF
    cases = narrowed(case for case in TAKEN if case.name in FAST)
    pytest_generate_tests = AttentionSuite.pytest_generate_tests
    compiled = AttentionSuite.compiled
    test_equals_reference = AttentionSuite.test_equals_reference
    test_large_scores = AttentionSuite.test_large_scores


@needs_mosaic
@pytest.mark.slow
@pytest.mark.usefixtures("races")
class TestMosaicGpuWhole(AttentionSuite):
    implementation = "mosaic_gpu"
    dtypes = HALF
    cases = narrowed(
        TAKEN if ON_GPU else [smaller(case) for case in TAKEN if case.name not in FAST]
    )
    test_large_scores = None  # above
    if not ON_GPU:
        sized = staticmethod(smaller)
        test_packed_documents_are_as_if_alone = None  # follows from the cases, as exactly


def arrays(**changes):
    shapes = {"query": (1, 16, 4, 64), "key": (1, 16, 2, 64), "value": (1, 16, 2, 64)}
    dtype = changes.pop("dtype", jnp.bfloat16)
    return {name: jax.ShapeDtypeStruct(s, dtype) for name, s in shapes.items()} | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": jnp.float32}, "bfloat16 and float16, not float32"),
        ({"query_offset": jax.ShapeDtypeStruct((1,), jnp.int32)}, "training and prefill"),
        ({"query": jax.ShapeDtypeStruct((1, 0, 4, 64), jnp.bfloat16)}, "at least one token"),
    ],
)
@needs_mosaic
def test_unsupported_reasons(changes, reason):
    choice = explain_attention(**arrays(**changes))
    assert reason in choice.unsupported_reasons["mosaic_gpu"]


def test_other_chips_are_not_supported(pretend):
    operands, options = check(*(jnp.zeros((1, 8, 2, 64), jnp.bfloat16),) * 3)
    assert "NVIDIA GPU" in mosaic_gpu.unsupported_reason(operands, options, "tpu")
    chip = types.SimpleNamespace(compute_capability="8.0", device_kind="NVIDIA A100")
    pretend("gpu", chip)
    assert "9.0 (H100, H200), NVIDIA A100 has 8.0" in mosaic_gpu.unsupported_reason(
        operands, options, "gpu"
    )


@needs_mosaic
@pytest.mark.parametrize(("mode", "block"), [("add", "auto"), ("gather", 1), ("gather", 2)])
def test_sharded_train_step_lowers_for_gpus(mode, block):
    """fsdp x tensor: the kernels are there, and add into the gradient cache in place, or gather."""
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices, real or virtual")
    model = ModelConfig(
        vocab_size=512,
        num_layers=4,
        embed_dim=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=256,
    )
    execution = ExecutionConfig(
        attention="mosaic_gpu", slot_gradients=mode, slot_gradient_block=block
    )
    config = Config(
        name="sharded",
        model=model,
        execution=execution,
        mesh=MeshConfig(fsdp=2, tensor=2),
        batch_size=4,
    )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), platforms.compiling_for("gpu"):
        functions = make_train_functions(config, mesh)
        rows = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=batch_sharding(mesh))
        batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), rows)
        step = functions.train_step.trace(functions.abstract_state, batch)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @mosaic_gpu\w*\([^\n]*", text)
    in_place = [call for call in calls if call.count("output_operand_alias<") == 2]
    if mode == "gather":  # for the block's slots, then for each layer's
        gathering = [call for call in calls if "moda_depth_gather" in call]
        assert len(gathering) == block
        assert not in_place
        assert all("4x512x128x" in call for call in gathering)  # of 4 layers, local rows and heads
        return
    assert len(in_place) == 1
    assert "moda_sequence_dq" in in_place[0]
    slots = make_mechanism(model).capacity  # the last layer's, too
    assert all(f"{slots}x512x64x" in call for call in in_place)  # local rows and heads
