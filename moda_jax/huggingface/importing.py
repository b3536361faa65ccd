"""A Hugging Face checkpoint's folder into a run."""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moda_jax.config import Config, DataConfig, ModelConfig, to_json
from moda_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from moda_jax.huggingface.config import read_model_config
from moda_jax.huggingface.files import TensorFiles, read_json
from moda_jax.huggingface.weights import Parameter, parameters_of
from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.imported import write_imported
from moda_jax.train.memory import available_memory, gib
from moda_jax.train.owner import FolderOwner
from moda_jax.train.run_folder import CONFIG_FILE, write_settings

FILES_FOLDER = "huggingface"
"""In the run's folder: what came with the checkpoint and only an export has use for."""

TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

_SEQ_LEN = 1024
"""Target tokens of a row in the run's settings, at most."""


def import_checkpoint(
    source: str | Path,
    directory: str | Path,
    *,
    tokenizer: str | None = None,
    eos_token: str | None = None,
    ignore: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> Config:
    """Makes a run of the checkpoint in the folder `source`; returns the run's settings.

    Parameters are converted one after the other, through files that are mapped into memory: the
    most that is in memory is the largest of them (all layers' matrices of one kind), twice. They
    are kept in the type in which they were published, and are float32 where the run is loaded.

    Args:
        source: config.json, safetensors in one file or several with their index, tokenizer.json.
        directory: of the new run.
        tokenizer: path of a tokenizer.json, or "bytes"; None: the one in `source`.
        eos_token: ends documents; None: the checkpoint's.
        ignore: settings of config.json that are not looked at, though they are not known.
        say: takes lines about what is done.

    Raises:
        ValueError: a model type, setting, tensor or type that is not implemented, something that is
            missing, damaged or too large for memory or disk, or a run that is there already.
        OSError: the run could not be written.
    """
    source, directory = Path(source).expanduser(), Path(directory).expanduser()
    if not (source / CONFIG_FILE).is_file():
        raise ValueError(
            f"expected the folder of a Hugging Face checkpoint, with {CONFIG_FILE} in it, got "
            f"{str(source)!r}"
        )
    settings = read_json(source / CONFIG_FILE)
    model = read_model_config(settings, ignore)
    text = _find_tokenizer(source, tokenizer, eos_token, settings, model)
    tensors = TensorFiles(source)
    parameters = list(parameters_of(model))
    _check_tensors(model, parameters, tensors)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: expected a new folder for the run, got one with files")
    _check_room(parameters, tensors, directory)
    config = Config(
        name=directory.name,
        output_dir=str(directory.parent),
        model=model,
        data=DataConfig(
            tokenizer="bytes" if text.content is None else str(directory / TOKENIZER_FILE),
            eos_token=text.eos_token,
            seq_len=min(int(settings.get("max_position_embeddings") or _SEQ_LEN), _SEQ_LEN),
        ),
    )
    count = sum(int(np.prod(parameter.shape)) for parameter in parameters)
    kind = settings["model_type"]
    say(f"{source}: {kind}, {count:,} parameters, tokenizer of {text.vocab_size:,}")
    directory.mkdir(parents=True, exist_ok=True)
    with FolderOwner(directory):
        _copy_files(source, directory)
        run = {"config": to_json(config), "data": [{"identity": {"tokenizer": text.fingerprint}}]}
        with Checkpoints(directory / "checkpoints", keep_last=1) as checkpoints:
            arrays = _arrays(parameters, tensors)
            checkpoints.save_imported(run, lambda folder: write_imported(folder, arrays))
        write_settings(directory, config, text)
    return config


def _arrays(
    parameters: Sequence[Parameter], tensors: TensorFiles
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters by name, one at a time."""
    for parameter in parameters:
        dtype = _stored_dtype(parameter, tensors)
        if not parameter.stacked:
            (tensor,) = tensors.read(parameter.names)
            yield parameter.name, np.ascontiguousarray(parameter.to_ours(tensor), dtype)
            continue
        array = np.empty(parameter.shape, dtype)
        for part, tensor in zip(array, tensors.read(parameter.names), strict=True):
            part[...] = parameter.to_ours(tensor)
        yield parameter.name, array


def _stored_dtype(parameter: Parameter, tensors: TensorFiles) -> np.dtype:
    """Of the parameter's tensors; float32 if they differ."""
    found = {tensors.dtype(name) for name in parameter.names}
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


def _check_tensors(
    model: ModelConfig, parameters: Sequence[Parameter], tensors: TensorFiles
) -> None:
    """Raises ValueError, naming the tensor, unless all are there and no others."""
    left = tensors.names
    for parameter in parameters:
        for name in parameter.names:
            if name not in left:
                raise ValueError(f"tensor {name}: expected it in the checkpoint, got none")
            left.remove(name)
            if tensors.shape(name) != parameter.their_shape:
                raise ValueError(
                    f"tensor {name}: expected shape {parameter.their_shape} by config.json, got "
                    f"{tensors.shape(name)}"
                )
    if model.tie_embeddings:
        left.discard("lm_head.weight")  # transformers does not read it either
    if left:
        first = sorted(left)[0]
        raise ValueError(
            f"tensor {first}: expected none of this name, as the model has no use for it; "
            f"there are {len(left)} such"
        )


def _check_room(parameters: Sequence[Parameter], tensors: TensorFiles, directory: Path) -> None:
    """Raises ValueError if memory or disk are too small, before anything is written."""
    sizes = [
        int(np.prod(parameter.shape)) * _stored_dtype(parameter, tensors).itemsize
        for parameter in parameters
    ]
    there, needed = available_memory(), 2 * max(sizes)  # the array, and the mapped pages of it
    if there is not None and needed > there:
        raise ValueError(
            f"{directory}: the import needs {gib(needed)} of memory, twice its largest parameter "
            f"({parameters[sizes.index(max(sizes))].name}), got {gib(there)}"
        )
    above = next(folder for folder in directory.absolute().parents if folder.exists())
    free = shutil.disk_usage(above).free
    if sum(sizes) > free:
        raise ValueError(
            f"{directory}: the import needs {gib(sum(sizes))} on the disk, got {gib(free)}"
        )


def _find_tokenizer(
    source: Path,
    name: str | None,
    eos_token: str | None,
    settings: dict[str, Any],
    model: ModelConfig,
) -> Tokenizer:
    if name is None:
        name = str(source / TOKENIZER_FILE)
        if not os.path.isfile(name):
            raise ValueError(
                f"{source}: expected {TOKENIZER_FILE} in it, got none; say --tokenizer FILE, or "
                f"--tokenizer bytes"
            )
    if eos_token is None and name != "bytes":
        eos_token = _declared_eos(name, settings)
    tokenizer = load_tokenizer(name, eos_token)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"config.json: vocab_size: expected at least the {tokenizer.vocab_size} tokens of "
            f"{name!r}, got {model.vocab_size}"
        )
    return tokenizer


def _declared_eos(path: str, settings: dict[str, Any]) -> str | None:
    """The token of config.json's eos_token_id, the first of several; None: it has none."""
    declared = settings.get("eos_token_id")
    ids = declared if isinstance(declared, list) else [declared]
    if not ids or ids[0] is None:
        return None
    # Whatever ends documents by name would do to open the file: only the token's text is asked for.
    vocabulary = read_json(Path(path)).get("added_tokens") or []
    texts = {token.get("id"): token.get("content") for token in vocabulary}
    return texts.get(ids[0])


def _copy_files(source: Path, directory: Path) -> None:
    folder = directory / FILES_FOLDER
    folder.mkdir()
    for name in (CONFIG_FILE, *TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
