"""Folders in Hugging Face's format and small runs, for tests."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import load_file, save_file

from moda_jax.config import Config, DataConfig
from moda_jax.data.tokenizer import ByteTokenizer
from moda_jax.train.checkpoint import Checkpoints
from moda_jax.train.run_folder import write_settings
from tests.models import FLOAT32

GOLDEN_FOLDER = Path(__file__).parent / "golden"
WORDS = ("<s>", "</s>", "a", "b", "c")


def golden(name):
    """The settings, the tensors by name, and the rest of a golden file."""
    with np.load(GOLDEN_FOLDER / f"{name}.npz", allow_pickle=False) as file:
        case = dict(file)
    settings = json.loads(case.pop("config").item())
    settings.pop("made_by")
    tensors = {key: case[key] for key in case if key.endswith(".weight") and "/" not in key}
    return settings, tensors, case


def write_tokenizer(path):
    """Five words, the first two special."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path))


def write_checkpoint(folder, settings, tensors, *, shards=1, tokenizer=True):
    """The folder of a checkpoint; `shards` files with an index if there are several."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names = sorted(tensors)
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[number::shards]}
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer:
        write_tokenizer(folder / "tokenizer.json")
    return folder


def read_tensors(folder):
    """All tensors of a folder, by name."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def save_run(folder, model):
    """A run's folder with a training's checkpoint of random parameters."""
    config = Config("run", model=model.config, execution=FLOAT32, data=DataConfig(seq_len=16))
    state = nnx.state(model)

    class State:
        params, step, optimizer = state, jnp.int32(3), {}

    with Checkpoints(folder / "checkpoints", keep_last=1) as checkpoints:
        data = {"identity": {"tokenizer": "bytes"}}
        checkpoints.save(3, State, data=data, config=config, validation_loss=None)
    write_settings(folder, config, ByteTokenizer())
    return folder
