"""Vectors of the independent float64 NumPy model (golden/equations), as models of ours."""

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

PATHS = {
    "embedding": "embedding",
    **{name: f"layers/{name}/kernel" for name in ("query", "out")},
    **{name: f"layers/key_value/{name}/kernel" for name in ("key", "value")},
    **{name: f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down")},
    **{
        f"{name}_norm": f"layers/{name}_norm/scale" for name in ("attention", "mlp", "query", "key")
    },
    "key_pair_norm": "layers/pair_scale",
    "final_norm": "final_norm/scale",
    "head": "head/kernel",
    "dense_scalar": "depth/weights",
    "dense_matrix": "depth/weights",
    "depth_query": "depth_layers/query/kernel",
    **{f"depth_{name}": f"depth_layers/key_value/{name}/kernel" for name in ("key", "value")},
    **{
        f"moda_{sublayer}_{name}": f"depth/{sublayer}_kv/{name}/kernel"
        for sublayer in ("attention", "ffn")
        for name in ("key", "value")
    },
    "hc_norm": "depth_layers/scale",
    **{f"hc_{name}": f"depth_layers/{name}" for name in ("mix", "residual", "out")},
    "hc_scale": "depth_layers/gates",
    **{f"mhc_{name}": f"depth_layers/{name}" for name in ("pre", "post", "residual")},
    "mhc_scale": "depth_layers/gates",
}
"""Our parameters by the NumPy model's names; biases and attention residuals: see `to_ours`."""


class Case(NamedTuple):
    """One vector, float64; what stands at padding of the logits means nothing."""

    config: ModelConfig
    params: dict[str, np.ndarray]
    """By the NumPy model's names, in its shapes."""
    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    cotangent: np.ndarray
    logits: np.ndarray
    derivatives: dict[str, float]
    """Of sum(cotangent · logits) along cos(1 + arange(size)), by parameter."""


def load(name: str) -> Case:
    """The vector of that file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        data = dict(file)

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}

    c = json.loads(str(data["config"]))
    config = ModelConfig(
        vocab_size=c["V"],
        num_layers=c["L"],
        embed_dim=c["D"],
        num_heads=c["N"],
        num_kv_heads=c["K"],
        head_dim=c["H"],
        mlp_dim=c["F"],
        norm_placement=c["placement"],
        qk_norm=c["qk_norm"],
        norm_eps=c["eps"],
        rope_theta=c["theta"],
        use_bias=c["bias"],
        depth=DEPTH_CONFIGS[c["mechanism"]](**_depth_settings(c)),
    )
    names = ("tokens", "segments", "positions", "cotangent", "logits")
    derivatives = {name: float(d) for name, d in part("derivative/").items()}
    return Case(config, part("param/"), *(data[name] for name in names), derivatives)


def _depth_settings(c: dict[str, Any]) -> dict[str, Any]:
    if c["mechanism"] != "moda":
        names = {"form": "form", "num_blocks": "num_blocks", "n": "num_streams"}
        return {ours: c[theirs] for theirs, ours in names.items() if theirs in c}
    return {
        "attention_kv": "project" if c["row"] == 5 else "reuse",
        "ffn_kv": "none" if c["row"] == 3 else "project",
        "write_every": c["every"],
        "window": c["window"],
        "reserved": c["reserved"],
        "key_norm": "reader" if c.get("reader") else "writer",
    }


def to_ours(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by our paths from arrays by the NumPy model's names; linear."""
    ours = {}
    for name, array in arrays.items():
        if name in ("residual_query", "residual_norm"):  # the last one is the head's
            leaf = {"residual_query": "query", "residual_norm": "scale"}[name]
            ours |= {f"depth_layers/{leaf}": array[:-1], f"depth/head/{leaf}": array[-1]}
        elif name.endswith("_bias"):
            path = PATHS[name.removesuffix("_bias")]
            is_linear = path.endswith("kernel")
            ours[path.replace("kernel", "bias") if is_linear else f"{path}_bias"] = array
        elif array.size:  # layers that write no slots have no projections
            ours[PATHS[name]] = array
    return ours


def path_of(path: tuple[Any, ...]) -> str:
    """The parameter at a path of JAX's in a module's state or in its pure dict."""
    return "/".join(str(key.key) for key in path if hasattr(key, "key"))


def build(case: Case, execution: ExecutionConfig, dtype: str = "float32") -> Transformer:
    """Our model with the vector's parameters."""

    def make():
        return Transformer(case.config, rngs=nnx.Rngs(0), execution=execution)

    graph, state = nnx.split(nnx.eval_shape(make))
    arrays = to_ours(case.params)

    def fill(path, leaf):
        return jnp.asarray(arrays.pop(path_of(path)).reshape(leaf.shape), dtype)

    state = jax.tree_util.tree_map_with_path(fill, state)
    if arrays:
        raise ValueError(f"parameters: expected none that we do not have, got {sorted(arrays)}")
    return nnx.merge(graph, state)


def directional_derivatives(case: Case, gradients: dict[str, Any]) -> dict[str, float]:
    """What `case.derivatives` are, from gradients like `nnx.to_pure_dict`'s."""
    ours = {path_of(p): g for p, g in jax.tree_util.tree_leaves_with_path(gradients)}
    result = {}
    for name, array in case.params.items():
        direction = np.cos(1 + np.arange(array.size)).reshape(array.shape)
        result[name] = sum(
            float(np.vdot(np.asarray(ours[path], np.float64), part))
            for path, part in to_ours({name: direction}).items()
        )
    return result
