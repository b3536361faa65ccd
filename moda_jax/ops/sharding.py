"""Device mesh, logical-axis rules and the shardings that follow from them.

Arrays name their axes by meaning ("batch", "embed", "heads", ...); `RULES` says which mesh axes a
name is split over. A dimension that its mesh axes do not divide is replicated: correct, only less
spread (`Config` already rejects the dimensions for which that would be a surprise).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moda_jax.config import MeshConfig

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "head_dim": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over exactly data·fsdp·tensor of `devices` (default: all).

    One process may use a part of its devices; several processes must use all of theirs, since a
    process without a device in the mesh could not take part in the step.

    Raises:
        ValueError: more devices are asked for than there are, or, with several processes, fewer.
    """
    devices = jax.devices() if devices is None else devices
    shape = (config.data, config.fsdp, config.tensor)
    needed, present = math.prod(shape), len(devices)
    if needed > present or (needed < present and jax.process_count() > 1):
        raise ValueError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} needs {needed} "
            f"devices, {present} are here; change mesh.data, mesh.fsdp or mesh.tensor"
        )
    # An axis may be a part of a physical one: a tensor axis of 2 on a TPU slice of 4 x 4 x 4, too.
    placed = mesh_utils.create_device_mesh(
        shape, list(devices[:needed]), allow_split_physical_axes=True
    )
    return Mesh(placed, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def partition_spec(
    logical_axes: Sequence[str | None], shape: Sequence[int], axis_sizes: Mapping[str, int]
) -> PartitionSpec:
    """The spec of an array of `shape` whose axes are named `logical_axes`, by `RULES`.

    A mesh axis is used once per array (the first dimension that asks for it gets it) and only
    where it divides the dimension.

    Raises:
        ValueError: an unknown name, or not one name per array axis.
    """
    if len(logical_axes) != len(shape):
        raise ValueError(
            f"logical_axes: expected {len(shape)} names for shape {tuple(shape)}, "
            f"got {tuple(logical_axes)}"
        )
    entries: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for name, size in zip(logical_axes, shape, strict=True):
        mesh_axes = tuple(a for a in _mesh_axes(name) if axis_sizes.get(a, 1) > 1)
        parts = math.prod(axis_sizes[a] for a in mesh_axes)
        split = parts > 1 and size % parts == 0 and used.isdisjoint(mesh_axes)
        entries.append(mesh_axes if split else None)
        used.update(mesh_axes if split else ())
    return PartitionSpec(*entries)


def _mesh_axes(name: str | None) -> tuple[str, ...]:
    if name is not None and name not in RULES:
        raise ValueError(f"logical_axes: expected None or one of {sorted(RULES)}, got {name!r}")
    return () if name is None else RULES[name]


def compiler_axes(at_least: int = 2) -> dict[str, int]:
    """Sizes of the axes, of `at_least` so many devices, over which the compiler splits arrays.

    They are those of the current mesh (`jax.set_mesh`), but not the ones that are manual here,
    inside `shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and size >= at_least
    }


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`x` with the sharding that its logical axes have under the current mesh (`jax.set_mesh`).

    Without a mesh, or on a mesh of one device, `x` is returned as it is. Inside `shard_map` the
    manual axes are left alone.
    """
    sizes = compiler_axes()
    spec = partition_spec(logical_axes, x.shape, sizes)
    return jax.lax.with_sharding_constraint(x, spec) if sizes else x


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over (data, fsdp), everything else replicated: for arrays [B, ...]."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def per_row_shard(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(shared, *rows)` run by every part of the batch's mesh axes on its own rows.

    `shared` is whole everywhere, and its gradient is summed once, at the end. `rows` are arrays
    [B, ...]; the results' leading axes are concatenated. The compiler still splits what is inside
    over the other mesh axes. Where the rows are not split, this is `function`.
    """

    def run(shared: Any, *rows: jax.Array) -> Any:
        sizes = compiler_axes()
        split = partition_spec(("batch",), rows[0].shape[:1], sizes)[0]
        if split is None:
            return function(shared, *rows)
        spec = PartitionSpec(split)
        return jax.shard_map(
            function, in_specs=(PartitionSpec(), *[spec] * len(rows)), out_specs=spec,
            axis_names={split} if isinstance(split, str) else set(split), check_vma=False,
        )(shared, *rows)  # fmt: skip

    return run


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A tree like `state` with a NamedSharding in the place of every Param and every other array.

    Params (arrays or `ShapeDtypeStruct`s inside) are placed by their `logical_axes` metadata.
    An optimizer's moments are Params with the same metadata, because optax maps over the tree of
    Params, so they follow the parameters by construction. Arrays outside of a Param (counters) are
    replicated.

    Raises:
        ValueError: a Param without `logical_axes`, or with a wrong number of them.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = leaf.get_metadata().get("logical_axes")
        if axes is None:
            raise ValueError(f"{jax.tree_util.keystr(path)}: expected logical_axes, got none")
        return NamedSharding(mesh, partition_spec(axes, leaf.get_value().shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(
        sharding, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
