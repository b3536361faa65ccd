"""A run's model into a folder that Hugging Face transformers opens."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tokenizers
from flax import nnx

from moda_jax.config import ModelConfig, from_json
from moda_jax.data.shards import write_json
from moda_jax.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer
from moda_jax.huggingface import modeling_source
from moda_jax.huggingface.config import MODA, model_type_of, write_model_config
from moda_jax.huggingface.files import (
    DTYPES,
    ShardWriter,
    check_new,
    fill_new,
    is_finite,
    read_json,
)
from moda_jax.huggingface.importing import FILES_FOLDER, TOKENIZER_FILES, declared_eos_id
from moda_jax.huggingface.weights import Parameter, parameters_of
from moda_jax.model.transformer import Transformer
from moda_jax.train.imported import is_imported, read_imported_array
from moda_jax.train.memory import available_memory, gib
from moda_jax.train.run_folder import CONFIG_FILE, load_folder_tokenizer
from moda_jax.train.trained import find_step, read_params, read_run, saved_tokenizer

SHARD_BYTES = 2 * 10**9

DType = Literal["float32", "bfloat16", "float16"]


def export_checkpoint(
    run: str | Path,
    directory: str | Path,
    *,
    step: int | Literal["newest", "best"] = "newest",
    dtype: DType | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = print,
) -> str:
    """Writes config.json, safetensors and the tokenizer of a run's model; returns the model type.

    A plain model goes to the type of transformers that computes it (olmo2, llama, qwen3). MoDA
    models, and plain ones that transformers lacks, go along with `modeling_moda.py`, which
    transformers opens with trust_remote_code=True. In memory are the parameters once and one file.

    Args:
        run: the run's folder.
        directory: a new or empty folder.
        step: of the checkpoint.
        dtype: of the tensors; None: as they are kept, which is float32 but for imported ones.
        shard_bytes: tensors of more bytes go to several files with an index.
        say: takes a line about what was written.

    Raises:
        ValueError: no such run or checkpoint, a damaged one, a mechanism that has no PyTorch model,
            a folder with files, too little memory, or numbers too large for `dtype`.
        OSError: the files could not be written.
    """
    run, directory = Path(run).expanduser().absolute(), Path(directory).expanduser()
    checkpoints = run / "checkpoints"
    if not checkpoints.is_dir():
        raise ValueError(f"expected a run's folder with checkpoints/ in it, got {str(run)!r}")
    checkpoint = checkpoints / str(find_step(checkpoints, step))
    saved = read_run(checkpoint)
    model = from_json(saved["config"]["model"])
    kind = model_type_of(model)
    tokenizer = load_folder_tokenizer(run, saved["config"]["data"], expected=saved_tokenizer(saved))
    check_new(directory)
    arrays = (
        _imported(model, checkpoint) if is_imported(checkpoint) else _trained(model, checkpoint)
    )
    with fill_new(directory) as folder:
        found: set[str] = set()
        writer = ShardWriter(folder, shard_bytes)
        for parameter, array in arrays:
            for name, part in _parts(parameter, array):
                tensor = part if dtype is None else _cast(name, part, dtype)
                found.add(tensor.dtype.name)
                writer.add(name, tensor)
        writer.close()
        stored = found.pop() if len(found) == 1 else "float32"
        settings = write_model_config(model, stored) | _token_settings(run, saved, tokenizer)
        write_json(folder / CONFIG_FILE, settings)
        _write_tokenizer(run, folder, tokenizer)
        if kind == MODA:
            shutil.copyfile(modeling_source(), folder / modeling_source().name)
    say(f"{directory}: {kind}, {stored}, step {checkpoint.name} of {run.name}")
    return kind


def _cast(name: str, part: np.ndarray, dtype: DType) -> np.ndarray:
    """Raises ValueError, naming the tensor, if a finite number is infinite in `dtype`."""
    with np.errstate(over="ignore"):  # which is what is looked for
        tensor = np.asarray(part, next(x for x in DTYPES.values() if x.name == dtype))
    if not is_finite(tensor) and np.any(too_large := np.isinf(tensor) & np.isfinite(part)):
        raise ValueError(
            f"tensor {name}: expected numbers that {dtype} holds, got up to "
            f"{float(np.abs(part[too_large]).max()):.4g}; use bfloat16 or float32"
        )
    return tensor


def _parts(parameter: Parameter, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors' names and views of our array."""
    parts = array if parameter.stacked else array[None]
    for name, part in zip(parameter.names, parts, strict=True):
        yield name, parameter.to_theirs(part)


def _imported(model: ModelConfig, checkpoint: Path) -> Iterator[tuple[Parameter, np.ndarray]]:
    for parameter in parameters_of(model):
        yield parameter, read_imported_array(checkpoint, parameter.name)


def _trained(model: ModelConfig, checkpoint: Path) -> Iterator[tuple[Parameter, np.ndarray]]:
    """From a training's checkpoint, all of whose parameters are read at once, into main memory."""
    shapes = nnx.state(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0))))
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) + SHARD_BYTES
    there = available_memory()
    if there is not None and needed > there:
        raise ValueError(
            f"{checkpoint}: the export needs {gib(needed)} of memory, got {gib(there)}"
        )
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    arrays = jax.tree.leaves(read_params(checkpoint, target))
    for parameter, array in zip(parameters_of(model), arrays, strict=True):
        yield parameter, np.asarray(array)


def _token_settings(run: Path, saved: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """What config.json says of special tokens and lengths: as it was imported, or as trained."""
    settings = _imported_settings(run)
    names = ["max_position_embeddings"]
    if tokenizer.content is not None:  # with "bytes" the ids that came stand for other tokens
        names += ["bos_token_id", "pad_token_id"]
    if not _has_own_eos(run, tokenizer):
        names.append("eos_token_id")
    default = {"max_position_embeddings": saved["config"]["data"]["seq_len"]}
    kept = {name: settings[name] for name in names if name in settings}
    return default | {"eos_token_id": tokenizer.eos_id} | kept


def _imported_settings(run: Path) -> dict[str, Any]:
    """The config.json that was imported; empty if none was."""
    original = run / FILES_FOLDER / CONFIG_FILE
    return read_json(original) if original.is_file() else {}


def _has_own_eos(run: Path, tokenizer: Tokenizer) -> bool:
    """Whether the run's documents end with another token than the imported files declare."""
    return declared_eos_id(_imported_settings(run)) != tokenizer.eos_id


def _write_tokenizer(run: Path, directory: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json, and what came with it or the little that transformers needs."""
    own: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {"eos_token": tokenizer.eos_token},
        "special_tokens_map.json": {"eos_token": tokenizer.eos_token},
        "generation_config.json": {"eos_token_id": tokenizer.eos_id},
    }
    if tokenizer.content is None:
        _bytes_as_library().save(str(directory / TOKENIZER_FILE))
    else:
        (directory / TOKENIZER_FILE).write_bytes(tokenizer.content)
    came = [name for name in TOKENIZER_FILES if (run / FILES_FOLDER / name).is_file()]
    for name in came:
        imported = run / FILES_FOLDER / name
        if name in own and _has_own_eos(run, tokenizer):
            write_json(directory / name, read_json(imported) | own[name])
        else:
            shutil.copyfile(imported, directory / name)
    if "tokenizer_config.json" not in came:
        eos = tokenizer.eos_token or _BYTES_EOS
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos,
                    "clean_up_tokenization_spaces": False}  # fmt: skip
        write_json(directory / "tokenizer_config.json", settings)


_BYTES_EOS = "<|endoftext|>"


def _bytes_as_library() -> tokenizers.Tokenizer:
    """`ByteTokenizer` as a tokenizer.json: a token for every byte, under the byte's number."""
    characters = _characters_of_bytes()
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={text: byte for byte, text in characters.items()}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(_BYTES_EOS, special=True)])
    assert tokenizer.token_to_id(_BYTES_EOS) == ByteTokenizer.eos_id
    return tokenizer


def _characters_of_bytes() -> dict[int, str]:
    """The characters that byte-level tokenizers write bytes with: printable ones as themselves."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: chr(256 + number) for number, byte in enumerate(others)}
    return {byte: chr(byte) for byte in printable} | shifted
