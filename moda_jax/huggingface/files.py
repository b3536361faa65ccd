"""The tensors of a checkpoint's safetensors files, one at a time."""

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moda_jax.data.shards import write_json
from moda_jax.train.run_folder import CONFIG_FILE

SINGLE_FILE = "model.safetensors"
INDEX_FILE = f"{SINGLE_FILE}.index.json"

DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"),
          "BF16": np.dtype(jnp.bfloat16)}  # fmt: skip
"""The floating-point types that are read, by safetensors' names."""

_UNUSED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Constants that older versions of transformers saved."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, naming the file, if it holds none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise ValueError(f"{path}: expected JSON, got a damaged file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


_PARTIAL = "partial-"
"""Begins the name of the folder in which the files of a new folder are made."""


def check_new(directory: Path) -> None:
    """Raises ValueError unless `directory` is an empty folder, or nothing is there yet."""
    if not os.path.lexists(directory):
        return
    names = os.listdir(directory) if directory.is_dir() else []
    got = "one with files" if names else "no folder"
    if CONFIG_FILE not in names and any(name.startswith(_PARTIAL) for name in names):
        got = "an import or export that did not finish; remove it, unless it is still running"
    if names or not directory.is_dir():
        raise ValueError(f"{directory}: expected a new or empty folder, got {got}")


@contextlib.contextmanager
def fill_new(directory: Path) -> Iterator[Path]:
    """A folder whose content becomes that of `directory` at the end; after an error it is gone.

    It is inside of `directory`, which is made if need be: so on the same disk.
    """
    is_made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=directory) as partial:
            yield Path(partial)
            # config.json last: with it the folder counts as complete.
            for name in sorted(os.listdir(partial), key=lambda name: name == CONFIG_FILE):
                Path(partial, name).replace(directory / name)
    except BaseException:
        if is_made:
            with contextlib.suppress(OSError):  # another's files may be there meanwhile
                directory.rmdir()
        raise


def is_finite(tensor: np.ndarray) -> bool:
    """Looks at a row after the other: needs no array of booleans as large as the tensor."""
    return all(np.isfinite(row).all() for row in tensor)


class TensorFiles:
    """The tensors of a folder by name; a file is mapped into memory while it is read from."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if there are no safetensors, or one that is named is not there."""
        self._folder = folder
        self._file_of: dict[str, str] = {}
        self._spec: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        for file in self._files():
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    if name in self._file_of:
                        raise ValueError(
                            f"{folder / file}: expected each tensor once, got {name!r} here and in "
                            f"{self._file_of[name]}"
                        )
                    self._file_of[name] = file
                    part = tensors.get_slice(name)
                    self._spec[name] = self._dtype(name, part.get_dtype()), tuple(part.get_shape())
        self.file_size = max((folder / file).stat().st_size for file in self._file_of.values())
        """Bytes of the largest file."""

    def _files(self) -> Sequence[str]:
        index = self._folder / INDEX_FILE
        if not index.is_file():
            if (self._folder / SINGLE_FILE).is_file():
                return [SINGLE_FILE]
            found = sorted(path.name for path in self._folder.glob("*.bin"))
            pickled = f", got {', '.join(found)}, which are pickled and not read" if found else ""
            raise ValueError(f"{self._folder}: expected {SINGLE_FILE} or {INDEX_FILE}{pickled}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected a weight_map, got {weight_map!r:.40}")
        files = sorted(set(map(str, weight_map.values())))
        for file in files:
            if Path(file).name != file or not (self._folder / file).is_file():
                raise ValueError(f"{index}: expected files of this folder, got {file!r}")
        return files

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self._folder / file, framework="np")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self._folder / file}: expected a safetensors file, got a damaged one ({error})"
            ) from error

    def _dtype(self, name: str, dtype: str) -> np.dtype:
        if dtype not in DTYPES and not name.endswith(_UNUSED_SUFFIXES):
            raise ValueError(
                f"{self._folder}: tensor {name}: expected one of {', '.join(DTYPES)}, got {dtype}, "
                f"which is not implemented"
            )
        return DTYPES.get(dtype, DTYPES["F32"])

    @property
    def names(self) -> set[str]:
        """Of all tensors that a model has use for."""
        return {name for name in self._file_of if not name.endswith(_UNUSED_SUFFIXES)}

    def dtype(self, name: str) -> np.dtype:
        return self._spec[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._spec[name][1]

    def read(self, names: Sequence[str]) -> Iterator[np.ndarray]:
        """The tensors, each a view of its file, which is mapped only until the next one is read."""
        opened: str | None = None
        with contextlib.ExitStack() as stack:
            for name in names:
                file = self._file_of[name]
                if file != opened:
                    stack.close()
                    tensors = stack.enter_context(self._open(file))
                    opened = file
                yield tensors.get_tensor(name)

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two matrices hold the same numbers; some rows at a time are in memory."""
        if self.shape(name) != self.shape(other):
            return False
        with contextlib.ExitStack() as stack:
            first, second = (
                stack.enter_context(self._open(self._file_of[x])).get_slice(x)
                for x in (name, other)
            )
            edges = [*range(0, self.shape(name)[0], _COMPARED_ROWS), self.shape(name)[0]]
            return all(
                np.array_equal(first[start:end], second[start:end])
                for start, end in itertools.pairwise(edges)
            )


_COMPARED_ROWS = 1024


class ShardWriter:
    """Writes tensors into files of at most `shard_bytes` and, when it is closed, their index."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._waiting: dict[str, np.ndarray] = {}
        self._size = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """The tensor is copied if it is not contiguous."""
        if self._waiting and self._size + tensor.nbytes > self._shard_bytes:
            self._write()
        self._waiting[name] = np.ascontiguousarray(tensor)
        self._size += tensor.nbytes
        self._total += tensor.nbytes

    def _write(self) -> None:
        path = self._folder / f"shard-{len(self._shards)}.tmp"
        # transformers asks for this entry.
        save_file(self._waiting, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._waiting)))
        self._waiting, self._size = {}, 0

    def close(self) -> None:
        """Writes what waits, and gives the files their names, which have their count in them."""
        self._write()
        count = len(self._shards)
        if count == 1:
            self._shards[0][0].replace(self._folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, 1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            path.replace(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        write_json(
            self._folder / INDEX_FILE,
            {"metadata": {"total_size": self._total}, "weight_map": weight_map},
        )
