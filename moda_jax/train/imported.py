"""The parameters of an imported checkpoint: a safetensors file for each, in our layout.

A run that is trained saves its parameters with orbax, which holds two more copies of all of them
while it writes. An import may be as large as the machine's memory, and its parameters come one
after the other: so each has a file of its own here, in the type in which it was published, and is
read into the memory of the devices that need it.
"""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from moda_jax.train.memory import available_memory, gib

_SUFFIX = ".safetensors"


class NotImportable(ValueError):
    """What is read cannot be a model's parameter; no write has failed."""


def is_imported(folder: Path) -> bool:
    """Whether the checkpoint in `folder` was imported, and not saved by a training."""
    return any((folder / "params").glob(f"*{_SUFFIX}"))


def write_imported(folder: Path, parameters: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes parameters, by dotted names, into a checkpoint's folder; holds one at a time."""
    (folder / "params").mkdir()
    for name, array in parameters:
        save_file({name: array}, folder / "params" / f"{name}{_SUFFIX}")


def read_imported_array(folder: Path, name: str) -> np.ndarray:
    """A parameter as it was published, a view of its file."""
    with safe_open(folder / "params" / f"{name}{_SUFFIX}", framework="np") as tensors:
        return tensors.get_tensor(name)


def read_imported(folder: Path, target: nnx.State) -> nnx.State:
    """The parameters of the imported checkpoint in `folder`, placed as `target` says.

    Args:
        folder: of the checkpoint, checkpoints/STEP.
        target: jax.ShapeDtypeStruct of each parameter, with its sharding.

    Raises MemoryError, before anything is read, if they do not fit into this machine's memory.
    """
    leaves, structure = jax.tree.flatten_with_path(target)
    _check_memory(folder, [leaf for _, leaf in leaves])
    arrays = [_read(folder, _name(path), leaf) for path, leaf in leaves]
    return jax.tree.unflatten(structure, arrays)


def _read(folder: Path, name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
    array = read_imported_array(folder, name)
    assert array.shape == target.shape
    assert target.sharding is not None
    return jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: np.asarray(array[index], target.dtype)
    )


def _name(path: tuple) -> str:
    """Without the entry that stands for the value inside of a Param."""
    return ".".join(str(key.key) for key in path if hasattr(key, "key"))


def _check_memory(folder: Path, leaves: list[jax.ShapeDtypeStruct]) -> None:
    """Devices that are this machine's processor hold the parameters in its memory."""
    there = available_memory()
    if there is None:
        return
    needed = 0
    for leaf in leaves:
        assert leaf.sharding is not None
        on_cpu = [d for d in leaf.sharding.addressable_devices if d.platform == "cpu"]
        shard = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        needed += len(on_cpu) * shard * leaf.dtype.itemsize
    if needed > there:
        raise MemoryError(
            f"{folder}: its parameters need {gib(needed)} in {leaves[0].dtype}, and {gib(there)} "
            f"of this machine's memory are available"
        )
