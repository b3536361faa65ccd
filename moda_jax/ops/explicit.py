"""Meshes with explicit axes (`jax.sharding.AxisType.Explicit`): types say how arrays are split."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from moda_jax.ops.checks import fail
from pallas_kernels.operands import Operands, num_kv_heads

_TOKENS, _ROWS = ("batch", None), ("batch",)
_QUERY = (*_TOKENS, "heads", None)
_KEY = (*_TOKENS, "kv_heads", None)
_DEPTH = (None, *_KEY)
OPERAND_AXES: dict[str, tuple[str | None, ...]] = {
    "query": _QUERY,
    "key": _KEY,
    "value": _KEY,
    "depth_key": _DEPTH,
    "depth_value": _DEPTH,
    "depth_length": (),
    "query_segments": _TOKENS,
    "key_segments": _TOKENS,
    "query_offset": _ROWS,
    "kv_length": _ROWS,
}
"""Logical axes of a call's operands."""


def spec_of(x: Any) -> PartitionSpec:
    """How x is split over explicit axes, one entry an array axis; nothing for a NumPy array."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
    return PartitionSpec(*spec, *[None] * (x.ndim - len(spec)))


def explicit_axes() -> tuple[str, ...]:
    """The current mesh's explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def left_to_the_compiler(function: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """`function` of arrays, its explicit axes automatic inside: there the compiler splits."""
    axes = explicit_axes()
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=out_specs) if axes else function


def per_explicit_shard(function: Callable[[Operands], Any], operands: Operands) -> Any:
    """function(operands) -> (o, lse), run by every device on the rows and heads that it has.

    They are the query's; what is split otherwise is split anew. Nothing is exchanged by attention.

    Raises:
      ValueError: tokens or head dimensions of an operand are split, or key heads do not divide.
    """
    mesh = jax.typeof(operands.query).sharding.mesh
    axes = {
        n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit
    }
    arrays = {name: x for name, x in operands._asdict().items() if x is not None}
    if not axes or all(entry is None for x in arrays.values() for entry in spec_of(x)):
        return function(operands)
    batch, _, heads, _ = spec_of(operands.query)
    names = {"batch": batch, "heads": heads, "kv_heads": heads, None: None}
    specs: Any = {}
    for name, x in arrays.items():
        for axis, logical in enumerate(OPERAND_AXES[name]):
            if logical is None and spec_of(x)[axis] is not None:
                fail(
                    name,
                    f"axis {axis} whole on every device; call jax.sharding.reshard before",
                    f"one split over {spec_of(x)[axis]!r}",
                )
        specs[name] = PartitionSpec(*(names[logical] for logical in OPERAND_AXES[name]))
    parts = 1
    for axis in heads if isinstance(heads, tuple) else (heads,):
        parts *= 1 if axis is None else mesh.shape[axis]
    if num_kv_heads(operands) % parts:
        fail("key", f"heads that {parts} devices of axis {heads!r} divide", num_kv_heads(operands))
    placed = {name: jax.sharding.reshard(x, specs[name]) for name, x in arrays.items()}
    query = specs["query"]
    # Kernels do not say over which axes their results vary, so that cannot be checked.
    return jax.shard_map(
        lambda arrays: function(Operands(**_with_none(arrays))),
        in_specs=(specs,),
        out_specs=(query, PartitionSpec(*query[:3])),
        axis_names=axes,
        check_vma=False,
    )(placed)


def _with_none(arrays: dict[str, Any]) -> Any:
    return dict.fromkeys(Operands._fields) | arrays
