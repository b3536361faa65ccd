"""Tiny OLMo 2, Llama and Qwen3 models against Hugging Face transformers' numbers.

`golden/make_transformers.py` wrote the numbers; nothing here imports torch.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax.config import ExecutionConfig, ModelConfig, ResidualConfig
from moda_jax.model.transformer import Transformer
from moda_jax.train.losses import next_token_loss
from tests.attention_suite import assert_close
from tests.tolerances import GOLDEN

FOLDER = Path(__file__).parent / "golden"

CASES = ("olmo2", "llama", "llama_tied", "qwen3")

NORMS = {
    "olmo2": {"norm_placement": "reordered", "qk_norm": "full"},
    "llama": {"norm_placement": "pre", "qk_norm": "none"},
    "qwen3": {"norm_placement": "pre", "qk_norm": "head"},
}
"""By transformers' model type."""

FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}
"""Our config's fields: transformers'."""

WEIGHTS = {
    "embedding": "model.embed_tokens",
    "layers.query.kernel": "self_attn.q_proj",
    "layers.key_value.key.kernel": "self_attn.k_proj",
    "layers.key_value.value.kernel": "self_attn.v_proj",
    "layers.out.kernel": "self_attn.o_proj",
    "layers.query_norm.scale": "self_attn.q_norm",
    "layers.key_norm.scale": "self_attn.k_norm",
    "layers.mlp.gate.kernel": "mlp.gate_proj",
    "layers.mlp.up.kernel": "mlp.up_proj",
    "layers.mlp.down.kernel": "mlp.down_proj",
    "final_norm.scale": "model.norm",
    "head.kernel": "lm_head",
}
"""Our parameters: transformers' modules. A layer's are stacked here and numbered there."""

LAYER_NORMS = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "reordered": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""The modules of `layers.attention_norm` and `layers.mlp_norm`, by our norm placement."""


def build(case):
    """(shapes, merge): the parameters without values, and what makes a model of those with."""
    fields = {ours: case["config"][theirs] for ours, theirs in FIELDS.items()}
    fields |= NORMS[case["config"]["model_type"]]
    config = ModelConfig(**fields, depth=ResidualConfig())
    execution = ExecutionConfig(compute_dtype="float32")
    shapes = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), execution=execution))
    graph, shapes = nnx.split(shapes)
    return shapes, lambda state: nnx.merge(graph, state)


def load(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        case = dict(file)
    return case | {"config": json.loads(case["config"].item())}


def dotted(path):
    return ".".join(entry.key for entry in path if hasattr(entry, "key"))


def their_names(case, ours):
    """Transformers' names of our parameter: one, or one for each layer."""
    placement = NORMS[case["config"]["model_type"]]["norm_placement"]
    layer_norms = ("layers.attention_norm.scale", "layers.mlp_norm.scale")
    table = WEIGHTS | dict(zip(layer_norms, LAYER_NORMS[placement], strict=True))
    if not ours.startswith("layers."):
        return [f"{table[ours]}.weight"]
    count = case["config"]["num_hidden_layers"]
    return [f"model.layers.{layer}.{table[ours]}.weight" for layer in range(count)]


def ours_from_theirs(case, ours, shape):
    """Theirs are [outputs, inputs] with heads and their entries in one axis."""
    weights = [case[name] for name in their_names(case, ours)]
    return np.stack([w.T if ours.endswith("kernel") else w for w in weights]).reshape(shape)


def theirs_from_ours(case, ours, array):
    """Transformers' names: their parts of our array."""
    parts = {}
    names = their_names(case, ours)
    for name, part in zip(names, np.asarray(array).reshape(len(names), -1), strict=True):
        shape = case[name].shape
        parts[name] = (
            part.reshape(shape[::-1]).T if ours.endswith("kernel") else part.reshape(shape)
        )
    return parts


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_are_those_of_transformers(name):
    case = load(name)
    shapes, merge = build(case)
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(ours_from_theirs(case, dotted(path), leaf.shape)), shapes
    )
    tokens = jnp.asarray(case["tokens"])
    batch = {
        "tokens": tokens,
        "targets": jnp.asarray(case["targets"]),
        "segment_ids": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    }

    def mean_loss(state):
        model = merge(state)
        return next_token_loss(model, batch, z_loss=0.0)[0] / tokens.size, model(tokens)

    (loss, logits), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(state)
    assert_close("logits", logits, case["logits"], GOLDEN)
    assert_close("loss", loss, case["loss"], GOLDEN)

    got = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        got |= theirs_from_ours(case, dotted(path), leaf)
    assert {f"grad/{weight}" for weight in got} == {key for key in case if key.startswith("grad/")}
    for weight, grad in got.items():
        assert_close(f"gradient of {weight}", grad, case[f"grad/{weight}"], GOLDEN)
