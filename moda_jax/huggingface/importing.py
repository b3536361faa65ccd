"""A Hugging Face checkpoint's folder into a run."""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moda_jax.config import Config, DataConfig, ModelConfig, to_json
from moda_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, read_tokenizer
from moda_jax.huggingface.config import read_integer, read_model_config
from moda_jax.huggingface.files import TensorFiles, check_new, fill_new, is_finite, read_json
from moda_jax.huggingface.weights import Parameter, parameters_of
from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.imported import NotImportable, write_imported
from moda_jax.train.memory import available_memory, gib
from moda_jax.train.owner import FolderOwner
from moda_jax.train.run_folder import CONFIG_FILE, write_settings
from moda_jax.train.saving import Saver

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
            missing, damaged, not finite or too large for memory or disk, or a run that is there
            already.
        SaveError: the checkpoint could not be written; as after any error, nothing is left.
        OSError: the same of the run's other files.
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
    check_new(directory)
    _check_room(parameters, tensors, directory)
    config = Config(
        name=directory.name,
        output_dir=str(directory.parent),
        model=model,
        data=DataConfig(
            tokenizer="bytes" if text.content is None else str(directory / TOKENIZER_FILE),
            eos_token=text.eos_token,
            seq_len=min(read_integer(settings, "max_position_embeddings", _SEQ_LEN), _SEQ_LEN),
        ),
    )
    count = sum(int(np.prod(parameter.shape)) for parameter in parameters)
    kind = settings["model_type"]
    say(f"{source}: {kind}, {count:,} parameters, tokenizer of {text.vocab_size:,}")
    run = {"config": to_json(config), "data": [{"identity": {"tokenizer": text.fingerprint}}]}
    arrays = _arrays(parameters, tensors)
    with fill_new(directory) as folder, FolderOwner(directory) as owner:
        with Saver(owner, Checkpoints(folder / "checkpoints", keep_last=1), say) as saver:
            saver.save_imported(run, lambda checkpoint: write_imported(checkpoint, arrays))
        _copy_files(source, folder, text)
        write_settings(folder, config, text)
    return config


def _arrays(
    parameters: Sequence[Parameter], tensors: TensorFiles
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters by name, one at a time. Raises NotImportable for what is not finite."""
    for parameter in parameters:
        array = np.empty(parameter.shape, _stored_dtype(parameter, tensors))
        parts = array if parameter.stacked else array[None]
        read = zip(parts, parameter.names, tensors.read(parameter.names), strict=True)
        for part, name, tensor in read:
            if not is_finite(tensor):
                raise NotImportable(f"tensor {name}: expected finite numbers, got NaN or infinity")
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
    if model.tie_embeddings and _HEAD in left:
        if not tensors.are_equal(_HEAD, "model.embed_tokens.weight"):
            raise ValueError(
                f"tensor {_HEAD}: expected the embedding, as the model ties them, got another "
                f"matrix; if it is the model's head, set tie_word_embeddings to false in "
                f"config.json"
            )
        left.remove(_HEAD)
    if left:
        first = sorted(left)[0]
        raise ValueError(
            f"tensor {first}: expected none of this name, as the model has no use for it; "
            f"there are {len(left)} such"
        )


_HEAD = "lm_head.weight"


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
    """The token of config.json's eos_token_id; None: it has none."""
    eos_id = declared_eos_id(settings)
    if eos_id is None:
        return None
    _, library = read_tokenizer(path)
    texts = {token: text for text, token in library.get_vocab(with_added_tokens=True).items()}
    if type(eos_id) is not int or eos_id not in texts:
        raise ValueError(
            f"config.json: eos_token_id: expected the id of a token of {path!r}, got {eos_id!r}; "
            f"--eos-token names another"
        )
    return texts[eos_id]


def declared_eos_id(settings: Mapping[str, Any]) -> Any:
    """The eos_token_id in the settings of config.json, the first of several; None: it has none."""
    declared = settings.get("eos_token_id")
    return next(iter(declared), None) if isinstance(declared, list) else declared


def _copy_files(source: Path, directory: Path, tokenizer: Tokenizer) -> None:
    """What describes another tokenizer than a byte's stays behind."""
    folder = directory / FILES_FOLDER
    folder.mkdir()
    for name in (CONFIG_FILE, *(() if tokenizer.content is None else TOKENIZER_FILES)):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
