"""Vectors of the independent float64 NumPy model, as configs and parameters of ours."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moda_jax.config import DEPTH_CONFIGS, ExecutionConfig, ModelConfig
from moda_jax.model.transformer import Transformer

FOLDER = Path(__file__).parent / "golden" / "equations"
CASES = sorted(path.stem for path in FOLDER.glob("*.npz"))


class Case(NamedTuple):
    """One vector."""

    config: ModelConfig
    params: dict[str, np.ndarray]
    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    cotangent: np.ndarray
    logits: np.ndarray
    derivatives: dict[str, float]
    """Of sum(cotangent · logits) along cos(1 + arange(size)), by parameter."""


def load(name: str) -> Case:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        data = dict(file)
    c = json.loads(str(data["config"]))
    params = {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")}
    derivatives = {
        k.removeprefix("derivative/"): float(v) for k, v in data.items() if k.startswith("derivative")
    }
    config = ModelConfig(
        vocab_size=c["V"], num_layers=c["L"], embed_dim=c["D"], num_heads=c["N"],
        num_kv_heads=c["K"], head_dim=c["H"], mlp_dim=c["F"], norm_placement=c["placement"],
        qk_norm=c["qk_norm"], norm_eps=c["eps"], rope_theta=c["theta"], use_bias=c["bias"],
        depth=_depth(c),
    )
    rest = (data[k] for k in ("tokens", "segments", "positions", "cotangent", "logits"))
    return Case(config, params, *rest, derivatives)


def _depth(c: dict[str, Any]):
    name = {"residual": "residual", "dense": "dense", "moda": "moda", "mhc": "mhc"}.get(
        c["mechanism"], c["mechanism"]
    )
    settings: dict[str, Any] = {}
    if name == "moda":
        settings = {
            "attention_kv": "project" if c["row"] == 5 else "reuse",
            "ffn_kv": "none" if c["row"] == 3 else "project",
            "write_every": c["every"], "window": c["window"], "reserved": c["reserved"],
        }
    elif name in ("dense", "attention_residuals"):
        settings = {"form": c["form"]}
        if "num_blocks" in c and c["num_blocks"]:
            settings["num_blocks"] = c["num_blocks"]
    elif name in ("hyper_connections", "mhc"):
        settings = {"num_streams": c["n"]}
    return DEPTH_CONFIGS[name](**settings)


def named_params(model: Transformer) -> dict[str, Any]:
    """Our parameters' paths by the NumPy model's names, with a shape for each."""
    config = model.config
    layers = {
        "query": "layers/query/kernel", "key": "layers/key_value/key/kernel",
        "value": "layers/key_value/value/kernel", "out": "layers/out/kernel",
        "gate": "layers/mlp/gate/kernel", "up": "layers/mlp/up/kernel",
        "down": "layers/mlp/down/kernel",
    }
    names = {"embedding": "embedding", "final_norm": "final_norm/scale", "head": "head/kernel"}
    names |= layers
    if config.use_bias:
        names |= {f"{k}_bias": v.replace("kernel", "bias") for k, v in layers.items()}
        names["head_bias"] = "head/bias"
    norms = ["attention_norm", "mlp_norm"]
    norms += ["query_norm", "key_norm"] if config.qk_norm != "none" else []
    names |= {k: f"layers/{k}/scale" for k in norms}
    return names


_DEPTH = {
    "dense_scalar": "depth/weights", "dense_matrix": "depth/weights",
    "depth_query": "depth_layers/query/kernel",
    "depth_key": "depth_layers/key_value/key/kernel",
    "depth_value": "depth_layers/key_value/value/kernel",
    "hc_norm": "depth_layers/scale", "hc_mix": "depth_layers/mix",
    "hc_residual": "depth_layers/residual", "hc_out": "depth_layers/out",
    "hc_mix_bias": "depth_layers/mix_bias", "hc_residual_bias": "depth_layers/residual_bias",
    "hc_out_bias": "depth_layers/out_bias", "hc_scale": "depth_layers/gates",
    "mhc_pre": "depth_layers/pre", "mhc_post": "depth_layers/post",
    "mhc_residual": "depth_layers/residual", "mhc_pre_bias": "depth_layers/pre_bias",
    "mhc_post_bias": "depth_layers/post_bias", "mhc_residual_bias": "depth_layers/residual_bias",
    "mhc_scale": "depth_layers/gates",
} | {
    f"moda_{sub}_{kind}{tail}": f"depth/{sub}_kv/{kind}/{leaf}"
    for sub in ("attention", "ffn")
    for kind in ("key", "value")
    for tail, leaf in (("", "kernel"), ("_bias", "bias"))
}


def to_ours(model: Transformer, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by our path, in our shapes, from arrays by the NumPy model's names.

    Attention residuals keep the head's weights apart from the layers'.
    """
    shapes = dict(_flat(model))
    names = named_params(model) | _DEPTH
    ours = {}
    for name, array in params.items():
        if name in ("residual_query", "residual_norm"):
            leaf = {"residual_query": "query", "residual_norm": "scale"}[name]
            ours[f"depth_layers/{leaf}"] = array[:-1]
            ours[f"depth/head/{leaf}"] = array[-1]
        elif array.size:
            ours[names[name]] = array
    if set(ours) != set(shapes):
        raise ValueError(f"parameters: {sorted(set(ours) ^ set(shapes))}")
    return {path: array.reshape(shapes[path].shape) for path, array in ours.items()}


def _flat(model: Transformer):
    state = nnx.to_pure_dict(nnx.state(model))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        yield "/".join(str(key.key) for key in path), leaf


def build(case: Case, execution: ExecutionConfig | None = None, **changes: Any) -> Transformer:
    """Our model with the vector's parameters."""
    config = dataclasses.replace(case.config, **changes)
    execution = execution or ExecutionConfig(compute_dtype="float32", remat="full")
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), execution=execution))
    ours = to_ours(abstract, case.params)
    graph, state = nnx.split(abstract)

    leaves = [jnp.asarray(ours[path], leaf.dtype) for path, leaf in _flat(abstract)]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
