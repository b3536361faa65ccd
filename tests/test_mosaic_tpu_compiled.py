"""The mosaic_tpu kernels compiled ahead of time for real chips, on a machine that has none.

libtpu is the compiler that runs on a TPU: what passes here has layouts that the chip knows, fits
its VMEM, and is aliased as it says. That the results are right is shown in the interpreter.
"""

import contextlib
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from moda_jax import moda_attention
from moda_jax.config import Config, MeshConfig, ModelConfig
from moda_jax.depth import make_mechanism
from moda_jax.ops import backends
from moda_jax.ops.sharding import batch_sharding, make_mesh
from moda_jax.train.train_step import make_train_functions
from pallas_kernels import platforms
from pallas_kernels.mosaic_tpu import common, schedule, tiles
from pallas_kernels.operands import Operands, Options

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu has wheels for x86-64 Linux only"
)
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@functools.cache
def devices(chip: str):
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices


def compile_for(chip: str, function, arrays, **jit):
    """Compiles function(*arrays) with [..., tokens, heads, H] as [..., heads, H, tokens] in memory.

    In a model XLA chooses that layout itself for what these kernels read. An argument in another
    one would show here as copies of the whole cache.
    """

    def leaf(x):
        sharding = SingleDeviceSharding(devices(chip)[0])
        return Format(tokens_in_lanes(len(x.shape)), sharding) if len(x.shape) > 3 else sharding

    formats = jax.tree.map(leaf, arrays)
    with platforms.compiling_for("tpu"):
        out = jax.tree.map(leaf, jax.eval_shape(function, *arrays))
        lowered = jax.jit(function, in_shardings=formats, out_shardings=out, **jit).lower(*arrays)
        return lowered.compile()


def tokens_in_lanes(rank: int) -> Layout:
    return Layout((*range(rank - 3), rank - 2, rank - 1, rank - 3))


def call_shapes(
    *, length, slots, head_dim=64, heads=16, kv_heads=8, batch=1, dtype=jnp.bfloat16, k_len=None
):
    """(query, key, value, depth_key, depth_value)."""
    query = jax.ShapeDtypeStruct((batch, length, heads, head_dim), dtype)
    keys = jax.ShapeDtypeStruct((batch, k_len or length, kv_heads, head_dim), dtype)
    depth = jax.ShapeDtypeStruct((slots, batch, length, kv_heads, head_dim), dtype)
    return query, keys, keys, depth, depth


def value_and_gradients(arrays, integers, **options):
    """(o, lse) and the gradients of all arrays; the cotangents are the outputs."""

    def attend(arrays):
        return moda_attention(*arrays, **integers, **options, return_lse=True)

    out, pullback = jax.vjp(attend, arrays)
    return out, pullback(out)[0]


def rows_bytes(query) -> int:
    """Bytes of one float32 array of the query's shape."""
    return 4 * query.size


def whole_copies(compiled, shape) -> list[str]:
    """Instructions that copy or transpose an array of the depth cache's shape, in any layout."""
    sizes = sorted(shape)
    found = re.findall(
        r"= \w+\[([\d,]+)\]\S* (copy|transpose|pad|concatenate)\(", compiled.as_text()
    )
    return [op for dims, op in found if sorted(map(int, dims.split(","))) == sizes]


def check_memory(compiled, arrays, record_property) -> None:
    memory = compiled.memory_analysis()
    report = {
        name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp")
    }
    record_property("memory", report)
    print(report)
    # The depth part's o, dq, dk and dv in float32, and some of them twice for their layouts: what
    # does not depend on S. One copy of K or V of the slots would be more.
    cache = arrays[3].size * arrays[3].dtype.itemsize
    assert report["temp"] < min(6 * rows_bytes(arrays[0]), cache)
    assert not whole_copies(compiled, arrays[3].shape)


def test_forward_and_gradient_compile(record_property):
    """Head size 64, several blocks, a traced length, and no copy of the cache."""
    arrays = call_shapes(length=1024, slots=36)
    integers = {"depth_length": jax.ShapeDtypeStruct((), jnp.int32)}
    compiled = compile_for("v5e", value_and_gradients, (arrays, integers))
    check_memory(compiled, arrays, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "length", "slots", "head_dim"),
    [
        (chip, *shape)  # each chip with both lengths, both numbers of slots and both head sizes
        for i, chip in enumerate(CHIPS)
        for shape in (
            ((4096, 36, 64), (16384, 72, 128)),
            ((4096, 72, 128), (16384, 36, 64)),
        )[i % 2]
    ],
)
def test_real_shapes(chip, length, slots, head_dim, record_property):
    arrays = call_shapes(length=length, slots=slots, head_dim=head_dim)
    integers = {"depth_length": jax.ShapeDtypeStruct((), jnp.int32)}
    compiled = compile_for(chip, value_and_gradients, (arrays, integers))
    check_memory(compiled, arrays, record_property)


SEGMENTS = jax.ShapeDtypeStruct((1, 1000), jnp.int32)
ROW = jax.ShapeDtypeStruct((1,), jnp.int32)
VARIANTS = {
    "packed": ({"length": 1000}, {"segment_ids": SEGMENTS}, {}),
    "full": ({"length": 1024}, {}, {"is_causal": False}),
    "chunk": ({"length": 1000}, {"segment_ids": SEGMENTS}, {"depth_chunk": 64}),
    "window": ({"length": 1024}, {}, {"depth_window": 4, "depth_reserved": 2}),
    "float32": ({"length": 1024, "dtype": jnp.float32}, {}, {}),
    "head_256": ({"length": 1024, "head_dim": 256, "heads": 8, "kv_heads": 4}, {}, {}),
    "head_24": ({"length": 300, "head_dim": 24}, {}, {}),
    "many_heads": ({"length": 1024, "heads": 32, "kv_heads": 1, "head_dim": 128}, {}, {}),
    "group_1": ({"length": 4096, "heads": 8}, {}, {}),
    "group_3": ({"length": 1100, "heads": 24}, {}, {}),
    "two_rows": ({"length": 1024, "batch": 2}, {}, {}),
    "decode": ({"length": 1, "k_len": 2100}, {"query_offset": ROW, "kv_length": ROW}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_compile(variant):
    sizes, integers, options = VARIANTS[variant]
    arrays = call_shapes(slots=9, **sizes)
    integers = integers | {"depth_length": jax.ShapeDtypeStruct((), jnp.int32)}
    run = functools.partial(value_and_gradients, **options)
    text = compile_for("v5e", run, (arrays, integers)).as_text()
    assert "moda_tokens_forward" in text
    assert "moda_tokens_backward" in text


@pytest.mark.slow
def test_a_cache_in_another_layout_is_copied(monkeypatch):
    """So that `whole_copies` is known to find what the other tests say is not there."""
    monkeypatch.setitem(globals(), "tokens_in_lanes", lambda rank: Layout(tuple(range(rank))))
    arrays = call_shapes(length=1024, slots=9)
    compiled = compile_for("v5e", value_and_gradients, (arrays, {}))
    assert whole_copies(compiled, arrays[3].shape)


@pytest.mark.slow
def test_depth_only_compiles():
    query, _, _, *depth = call_shapes(length=1024, slots=9)

    def run(query, *depth):
        return value_and_gradients((query, None, None, *depth), {})

    text = compile_for("v5e", run, (query, *depth)).as_text()
    assert "moda_tokens_forward" not in text
    assert "moda_depth_backward" in text


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_running_gradients_are_added_in_place(dtype, chunk, record_property):
    """One cache of gradients goes in, the same memory comes out, and there is no second one."""
    arrays = call_shapes(length=1024, slots=36, batch=2)
    grads = tuple(jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays[3:])
    backend, options = backends.BACKENDS["mosaic_tpu"], Options(0.125, depth_chunk=chunk)
    query, lse = arrays[0], jax.ShapeDtypeStruct(arrays[0].shape[:3], jnp.float32)

    def run(arrays, length, out, lse, d_out, grads):
        operands = Operands(*arrays, depth_length=length)
        return backend.gradients(operands, options, out, lse, d_out, None, grads)

    shapes = arrays, jax.ShapeDtypeStruct((), jnp.int32), query, lse, query, grads
    compiled = compile_for("v5e", run, shapes, donate_argnums=5)
    check_memory(compiled, arrays, record_property)
    size = sum(x.size * x.dtype.itemsize for x in grads)
    assert compiled.memory_analysis().alias_size_in_bytes >= size


@pytest.mark.slow
def test_a_block_beyond_vmem_does_not_compile(monkeypatch):
    """The limit that the other tests keep is one that the compiler enforces."""
    monkeypatch.setattr(tiles, "check_tiles", lambda *_: None)
    arrays = call_shapes(length=4096, slots=2)
    sizes = {"q_block": 2048, "k_block": 2048}
    with schedule.override(**sizes), pytest.raises(jax.errors.JaxRuntimeError, match="(?i)vmem"):
        compile_for("v5e", value_and_gradients, (arrays, {}))


def sharded_step(chip: str):
    """A training step of a small model, fsdp 2 x tensor 2, compiled for four chips."""
    model = ModelConfig(
        vocab_size=512,
        num_layers=4,
        embed_dim=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=256,
    )
    config = Config(name="sharded", model=model, mesh=MeshConfig(fsdp=2, tensor=2), batch_size=4)
    mesh = make_mesh(config.mesh, devices(chip))
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(platforms.compiling_for("tpu"))
        functions = make_train_functions(config, mesh)
        rows = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=batch_sharding(mesh))
        batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), rows)
        step = functions.train_step.trace(functions.abstract_state, batch)
        return model, step.lower().compile()


@pytest.mark.slow
def test_sharded_train_step_compiles():
    """`attention=None` takes these kernels, each chip with its own rows and heads, in place.

    test_benchmark_tpu.py compiles such a step for v5e.
    """
    model, compiled = sharded_step("v5p")
    calls = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
    in_place = [
        line
        for line in calls
        if "moda_depth_backward" in line and "output_to_operand_aliasing" in line
    ]
    assert len(in_place) == 1
    slots = make_mechanism(model).capacity  # the last layer's, too
    local = (slots, 2, 1, 64, 256)  # rows and key heads of a chip, tokens in the lanes
    assert all(f"f32[{','.join(map(str, local))}]" in line for line in in_place)
    assert not whole_copies(compiled, local)
    # Both caches begin as uninitialized memory.
    made = re.findall(r"= bf16\[([\d,]+)\]\S* (broadcast|custom-call)\(", compiled.as_text())
    kinds = [op for dims, op in made if sorted(map(int, dims.split(","))) == sorted(local)]
    assert kinds == ["custom-call"] * 2


def test_the_interpreter_is_not_asked_when_compiling():
    with platforms.compiling_for("cpu"):
        assert common.interpreter() is True
    with platforms.compiling_for("tpu"):
        assert common.interpreter() is False
