"""Mesh, logical-axis rules, and what they do to arrays; 8 virtual CPU devices."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moda_jax.config import MeshConfig
from moda_jax.ops.sharding import (
    batch_sharding,
    constrain,
    make_mesh,
    partition_spec,
    state_shardings,
)

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def test_mesh_uses_exactly_the_devices_asked_for():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()[:4]


def test_mesh_too_large():
    with pytest.raises(ValueError, match="data=3 fsdp=1 tensor=5 needs 15 devices, 8 are here"):
        make_mesh(MeshConfig(data=3, tensor=5))


def test_several_processes_must_use_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="needs 4 devices, 8 are here"):
        make_mesh(MeshConfig(data=4))


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("batch", None, None), (8, 5, 4), P(("data", "fsdp"), None, None)),
        (("layers", "embed", "heads", "head_dim"), (3, 4, 2, 8), P(None, ("fsdp",), ("tensor",))),
        (("vocab", "embed"), (320, 4), P(("tensor",), ("fsdp",))),
        (("vocab", "embed"), (321, 4), P(None, ("fsdp",))),  # 321 is odd: replicated
        (("batch", "embed"), (8, 4), P(("data", "fsdp"), None)),  # fsdp is taken by the batch
        (("batch",), (2,), P(None)),  # 2 rows over 4 shards: replicated, not split in part
    ],
)
def test_partition_spec(axes, shape, expected):
    spec = partition_spec(axes, shape, SIZES)
    padded = tuple(expected) + (None,) * (len(shape) - len(expected))
    assert tuple(spec) == padded


def test_partition_spec_rejects_unknown_names_and_wrong_counts():
    with pytest.raises(ValueError, match="'width'"):
        partition_spec(("width",), (4,), SIZES)
    with pytest.raises(ValueError, match="expected 2 names"):
        partition_spec(("embed",), (4, 4), SIZES)


def test_constrain_without_mesh_is_the_identity_but_still_checks():
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", None) is x
    with pytest.raises(ValueError, match="expected 2 names"):
        constrain(x, "batch")


def test_constrain_under_a_mesh(mesh):
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(2 * x, "batch", "mlp"))(jnp.ones((8, 4)))
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 2)}


def test_constrain_leaves_manual_axes_alone(mesh):
    def body(x):
        return constrain(x, "batch", "mlp")

    with jax.set_mesh(mesh):
        y = jax.jit(jax.shard_map(body, in_specs=P("data"), out_specs=P("data")))(jnp.ones((8, 4)))
    assert y.shape == (8, 4)


def test_batch_sharding(mesh):
    x = jax.device_put(jnp.ones((8, 3)), batch_sharding(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}


class _Layer(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((3, 4, 6)), logical_axes=("layers", "embed", "mlp"))
        self.b = nnx.Param(jnp.ones(4), logical_axes=("embed",))


def test_optimizer_state_follows_the_parameters(mesh):
    params = nnx.state(_Layer())
    state = (params, optax.adamw(1e-3).init(params))
    placed = jax.device_put(state, state_shardings(state, mesh))
    shapes = [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(placed)]
    # b and w; then Adam's count, mu (b, w), nu (b, w)
    assert shapes == [(2,), (3, 2, 3), (), (2,), (3, 2, 3), (2,), (3, 2, 3)]


def test_state_shardings_needs_logical_axes(mesh):
    class Bare(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(4))

    with pytest.raises(ValueError, match="'w'.*expected logical_axes, got none"):
        state_shardings(nnx.state(Bare()), mesh)
