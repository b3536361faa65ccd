"""The model's attention under a mesh: each device calls its backend on its own rows and heads."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import MeshConfig
from moda_jax.model.stack import run_stack
from moda_jax.ops import backends
from moda_jax.ops.sharded_attention import ShardedAttention, ShardedGathering
from moda_jax.ops.sharding import make_mesh
from pallas_kernels import xla
from tests.models import FLOAT32, SMALL, random_model
from tests.test_stack import batch
from tests.tolerances import RELATIVE, STACK

B, T, N, K, H, S = 8, 5, 4, 2, 6, 3

MESHES = {
    "data=8": (MeshConfig(data=8), (1, N, K)),
    "fsdp=8": (MeshConfig(fsdp=8), (1, N, K)),
    "fsdp=4 tensor=2": (MeshConfig(fsdp=4, tensor=2), (2, N // 2, K // 2)),
    "all": (MeshConfig(data=2, fsdp=2, tensor=2), (2, N // 2, K // 2)),
    "one device": (MeshConfig(), (B, N, K)),
}
"""The mesh, and the rows, query heads and key/value heads that one device gets."""


@pytest.fixture
def seen(monkeypatch):
    """Registers the backend "spy": xla, which notes the shapes of the calls traced for it."""
    calls = []

    def forward(operands, options):
        calls.append(("forward", shapes(operands)))
        return xla.forward(operands, options)

    def backward(operands, options, *arguments, depth=True):
        running = arguments[-1]
        calls.append(("backward", shapes(operands)))
        chex.assert_shape(running, operands.depth_key.shape)
        return xla.backward(operands, options, *arguments, depth=depth)

    spy = backends.Backend("spy", forward, backward, lambda *_: None, fast_on=("cpu",))
    monkeypatch.setattr(backends, "BACKENDS", backends.BACKENDS | {"spy": spy})
    return calls


def shapes(operands):
    return {name: x.shape for name, x in operands._asdict().items() if x is not None}


def inputs(rows=B):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    arrays = (
        normal(rows, T, N, H),
        normal(rows, T, K, H),
        normal(rows, T, K, H),
        normal(S, rows, T, K, H),
        normal(S, rows, T, K, H),
    )
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (rows, T)), axis=1), jnp.int32)
    running = (normal(S, rows, T, K, H), normal(S, rows, T, K, H))
    return arrays, segments, normal(rows, T, N, H), running


@jax.jit
def both_passes(arrays, segments, d_out, running, depth_length, position):
    call = ShardedAttention.of(
        *arrays,
        segment_ids=segments,
        depth_length=depth_length,
        query_offset=position,
        kv_length=position + T,
        implementation="spy",
    )
    out, lse = call.forward()
    return out, lse, call.gradients(out, lse, d_out, running)


@pytest.mark.parametrize("name", MESHES)
def test_each_device_attends_to_its_own_rows_and_heads(name, seen):
    mesh, (rows, heads, kv_heads) = MESHES[name]
    arguments = *inputs(), jnp.int32(S - 1), jnp.zeros(B, jnp.int32)
    expected = both_passes(*arguments)
    seen.clear()
    with jax.set_mesh(make_mesh(mesh)):
        got = both_passes(*arguments)
    key = (rows, T, kv_heads, H)
    local = {
        "query": (rows, T, heads, H),
        "key": key,
        "value": key,
        "depth_key": (S, *key),
        "depth_value": (S, *key),
        "depth_length": (),
        "query_segments": (rows, T),
        "key_segments": (rows, T),
        "query_offset": (rows,),
        "kv_length": (rows,),
    }
    assert seen == [("forward", local), ("backward", local)]
    jax.tree.map(assert_close, got, expected)
    for before, after in zip(arguments[3], got[2][3:], strict=True):
        np.testing.assert_array_equal(after[-1], before[-1])  # the invisible slot keeps its bits


def assert_close(got, expected):
    finite = jnp.isfinite(expected)
    np.testing.assert_array_equal(jnp.isfinite(got), finite)  # lse is -inf for padding
    scale = float(jnp.abs(jnp.where(finite, expected, 0)).max())
    error = jnp.abs(jnp.where(finite, got - expected, 0)).max()
    assert float(error) <= RELATIVE["float32"] * scale


def test_rows_that_no_mesh_divides_are_computed_everywhere(seen):
    arguments = *inputs(rows=3), jnp.int32(S), jnp.zeros(3, jnp.int32)
    expected = both_passes(*arguments)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2))):
        got = both_passes(*arguments)
    assert seen[-1][1]["query"] == (3, T, N // 2, H)
    jax.tree.map(assert_close, got, expected)


def test_heads_that_the_tensor_axis_does_not_divide():
    arrays, *_ = inputs()
    message = "num_kv_heads: expected a multiple of the mesh's tensor axis, 4, got 2; make mesh"
    with (
        jax.set_mesh(make_mesh(MeshConfig(tensor=4))),
        pytest.raises(ValueError, match=message) as caught,
    ):
        ShardedAttention.of(*arrays).forward()
    assert "\n" not in str(caught.value)


def test_the_reason_is_about_what_one_device_gets(monkeypatch):
    def unsupported_reason(operands, options, platform):
        return None if operands.query.shape[0] == 1 else "one row only"

    xla = backends.BACKENDS["xla"]
    picky = dataclasses.replace(xla, name="picky", unsupported_reason=unsupported_reason)
    monkeypatch.setattr(backends, "BACKENDS", backends.BACKENDS | {"picky": picky})
    call = ShardedAttention.of(*inputs()[0], implementation="picky")
    with pytest.raises(NotImplementedError, match="picky: one row only"):
        call.forward()
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
        assert jax.jit(call.forward)()[0].shape == (B, T, N, H)


def stack_gradient(mesh: MeshConfig, implementation: str):
    """The compiled gradient of a small stack under `mesh`."""
    execution = dataclasses.replace(FLOAT32, attention=implementation)
    spec, params = random_model(SMALL, execution).stack()
    x, tokens = batch(rows=8)

    def loss(params, x):
        return run_stack(spec, params, x, tokens).sum()

    with jax.set_mesh(make_mesh(mesh)):
        return jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile(), (params, x)


def test_a_stack_trains_per_shard(seen):
    compiled, arguments = stack_gradient(MeshConfig(fsdp=4, tensor=2), "spy")
    assert {kind for kind, _ in seen} == {"forward", "backward"}
    assert {call["query"] for _, call in seen} == {(2, 9, 2, 6)}
    assert {call["depth_key"] for _, call in seen} == {(8, 2, 9, 1, 6)}
    expected = stack_gradient(MeshConfig(), "xla")[0](*arguments)

    def check(got, expected):
        assert np.abs(got - expected).max() <= STACK * np.abs(expected).max()

    jax.tree.map(check, *map(jax.device_get, (compiled(*arguments), expected)))


def test_attention_exchanges_nothing_between_devices():
    arrays, segments, d_out, running = inputs()
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    rows, heads = ("data", "fsdp"), "tensor"
    token_spec = jax.NamedSharding(mesh, jax.P(rows))
    head_spec = jax.NamedSharding(mesh, jax.P(rows, None, heads))
    slot_spec = jax.NamedSharding(mesh, jax.P(None, rows, None, heads))

    def passes(arrays, segments, d_out, running):
        call = ShardedAttention.of(*arrays, segment_ids=segments)
        out, lse = call.forward()
        return call.gradients(out, lse, d_out, running)

    shardings = ((head_spec,) * 3 + (slot_spec,) * 2, token_spec, head_spec, (slot_spec,) * 2)
    with jax.set_mesh(mesh):
        lowered = jax.jit(passes, in_shardings=shardings).lower(arrays, segments, d_out, running)
    program = lowered.compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program


def test_memory_for_gathering_is_made_by_its_device():
    """XLA on a GPU would make what is not split for every device, then cut it."""
    arrays, segments, _, _ = inputs()
    gathered = ShardedGathering(backends.BACKENDS["xla"].gathering, 1.0)

    def make(arrays, segments):
        return gathered.empty(ShardedAttention.of(*arrays, segment_ids=segments), 3)

    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        closed = jax.make_jaxpr(make)(arrays, segments)
    (mapped,) = (eqn for eqn in closed.eqns if eqn.primitive.name == "shard_map")
    made = [x.aval.shape for eqn in mapped.params["jaxpr"].eqns for x in eqn.outvars]
    own = B // 4, T, N // 2, H
    assert made == [(3, *own), (3, *own), (3, B // 4, K // 2, 2 * T * N // K)]
    whole = (3, B, T, N, H), (3, B, T, N, H), (3, B, K, 2 * T * N // K)
    assert tuple(x.shape for x in closed.out_avals) == whole
