"""Rows of Parquet files and of Hugging Face datasets on disk, by pyarrow (the extra `parquet`)."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moda_jax.data.files import readable

_BATCH_ROWS = 32  # held in memory at a time, however long they are
_BUFFER_BYTES = 1 << 20


class Row(NamedTuple):
    """One row's text, not converted yet."""

    number: int
    """In the file, from 0."""
    read: Callable[[], str | None]
    """Raises UnicodeDecodeError if it is not UTF-8."""
    consumed: int
    """Bytes of the column read up to this row, about."""


def list_saved_dataset(folder: Path) -> list[Path] | None:
    """The .arrow files of a dataset that `save_to_disk` wrote, in order; None for other folders.

    Raises ValueError for a dictionary of datasets, which has a folder for each split, and for a
    damaged state.json.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise ValueError(
            f"DataConfig.source: expected one split of the Hugging Face dataset {str(folder)!r}, "
            f"got all of them; name one of its folders: {', '.join(names)}"
        )
    state = folder / "state.json"
    if not state.is_file() or not (folder / "dataset_info.json").is_file():
        return None
    try:
        content = json.loads(state.read_bytes())
        names = [file["filename"] for file in content["_data_files"]]
        indirect = content.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"DataConfig.source: expected the state of a Hugging Face dataset in {state}, got "
            f"{type(error).__name__}: {error}; save the dataset again"
        ) from error
    if indirect:
        raise ValueError(
            f"DataConfig.source: expected a dataset without an indices mapping in {folder}, got "
            f"one; call its flatten_indices() and save it again"
        )
    return [folder / name for name in names]


def list_row_groups(path: Path, column: str) -> list[int]:
    """Bytes of each row group's `column` in a Parquet file, unpacked."""
    with readable(path), _open_parquet(path) as file:
        _check_column(path, file.schema_arrow, column)
        metadata = file.metadata
        return [
            sum(
                group.column(i).total_uncompressed_size
                for i in range(group.num_columns)
                if group.column(i).path_in_schema == column
            )
            for group in map(metadata.row_group, range(metadata.num_row_groups))
        ]


def list_record_batches(path: Path, column: str) -> list[int]:
    """Bytes of each record batch's `column` in an Arrow file."""
    pyarrow = _import_pyarrow(path)
    with readable(path), pyarrow.memory_map(str(path)) as content:
        schema, batches = _open_batches(path, content)
        _check_column(path, schema, column)
        return [batch.column(column).nbytes for batch in batches]


def parquet_rows(path: Path, start: int, end: int, column: str) -> Iterator[Row]:
    """The rows of the row groups [start, end)."""
    with _open_parquet(path) as file:
        number = sum(file.metadata.row_group(i).num_rows for i in range(start))
        batches = file.iter_batches(
            batch_size=_BATCH_ROWS, row_groups=range(start, end), columns=[column]
        )
        yield from _rows(path, batches, number, column)


def stream_rows(path: Path, start: int, end: int, column: str) -> Iterator[Row]:
    """The rows of the record batches [start, end)."""
    pyarrow = _import_pyarrow(path)
    with pyarrow.memory_map(str(path)) as content:
        number = 0
        wanted = []
        _, batches = _open_batches(path, content)
        for i, batch in enumerate(batches):
            if i >= end:
                break
            if i < start:
                number += batch.num_rows
            else:
                wanted.append(batch)  # a view of the mapped file, not a copy
        yield from _rows(path, wanted, number, column)


def _rows(path: Path, batches: Any, number: int, column: str) -> Iterator[Row]:
    pyarrow = _import_pyarrow(path)
    consumed = 0
    try:
        for batch in batches:
            values = batch.column(column)
            for i, value in enumerate(values):
                yield Row(
                    number + i, value.as_py, consumed + values.nbytes * (i + 1) // len(values)
                )
            number += len(values)
            consumed += values.nbytes
    except pyarrow.ArrowException as error:
        raise OSError(" ".join(str(error).split())) from error


def _open_parquet(path: Path) -> Any:
    pyarrow = _import_pyarrow(path)
    try:
        # Without pre-buffering a row group is read as its rows are asked for.
        return importlib.import_module("pyarrow.parquet").ParquetFile(
            path, buffer_size=_BUFFER_BYTES, pre_buffer=False
        )
    except pyarrow.ArrowException as error:
        raise OSError(" ".join(str(error).split())) from error


def _open_batches(path: Path, content: Any) -> tuple[Any, Iterator[Any]]:
    """The schema and the record batches of an Arrow file, in stream or in file format."""
    pyarrow = _import_pyarrow(path)
    ipc = importlib.import_module("pyarrow.ipc")
    try:
        try:
            reader = ipc.open_stream(content)
            return reader.schema, iter(reader)
        except pyarrow.ArrowInvalid:
            content.seek(0)
            file = ipc.open_file(content)
            return file.schema, map(file.get_batch, range(file.num_record_batches))
    except pyarrow.ArrowException as error:
        raise OSError(" ".join(str(error).split())) from error


def _check_column(path: Path, schema: Any, column: str) -> None:
    pyarrow = _import_pyarrow(path)
    names = list(schema.names)
    if names.count(column) == 1:
        kind = schema.field(column).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        types = pyarrow.types
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            return
        found = f"type {schema.field(column).type}"
    else:
        found = f"columns {sorted(names)}"
    raise ValueError(
        f"DataConfig.text_field: expected a string column {column!r} in {path}, got {found}; set "
        f"--data.text-field (of moda-jax prepare: --text-field)"
    )


def _import_pyarrow(path: Path) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise ValueError(
            f"DataConfig.source: {path} needs the package pyarrow: python -m pip install pyarrow "
            f"(the extra `parquet`)"
        ) from None
