"""config.json of a Hugging Face checkpoint into a `ModelConfig`, and back.

Whatever is not known to leave the function as it is, is refused by its name: a checkpoint that
loads computes what transformers computes.
"""

from collections.abc import Collection, Mapping
from typing import Any

from moda_jax.config import MoDAConfig, ModelConfig, ResidualConfig, from_json, to_json

MODA = "moda"
"""The model type of `modeling_moda.py`, which goes along with models that transformers lacks."""

_NORMS = {"olmo2": ("reordered", "full"), "llama": ("pre", "none"), "qwen3": ("pre", "head")}
"""Norm placement and QK-norm by transformers' model type."""

_ARCHITECTURES = {
    "olmo2": "Olmo2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    MODA: "MoDAForCausalLM",
}

_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
"""Our fields: theirs, which must be there."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "clip_qkv": (),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
}
"""Settings of theirs that have one value here; none, as a missing one, is always right."""

_ARE_READ = frozenset(
    {*_SIZES.values(), "architectures", "head_dim", "initializer_range", "layer_types",
     "model_type", "num_key_value_heads", "rope_parameters", "rope_scaling", "rope_theta",
     "sliding_window", "tie_word_embeddings"}
)  # fmt: skip

_SAY_NOTHING = frozenset(
    {"_attn_implementation_autoset", "_name_or_path", "auto_map", "bos_token_id", "dtype",
     "eos_token_id", "is_llama_config", "max_position_embeddings", "max_window_layers",
     "pad_token_id", "pretraining_tp", "torch_dtype", "transformers_version", "use_cache"}
)  # fmt: skip
"""Settings that leave logits and loss as they are."""

_ROPE_THETA = 10_000.0
"""transformers' value where a checkpoint has none."""
_QWEN3_HEAD_DIM = 128


def read_model_config(settings: Mapping[str, Any], ignore: Collection[str] = ()) -> ModelConfig:
    """The `ModelConfig` of the settings in config.json.

    ignore: names of settings that are not looked at, though they are not known.

    Raises ValueError, naming the setting, for a model type or setting that is not implemented.
    """
    kind = settings.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type: expected one of {', '.join(_ARCHITECTURES)}, got {kind!r}"
        )
    _check(kind, settings, ignore)
    sizes = {ours: _required(settings, theirs) for ours, theirs in _SIZES.items()}
    heads = sizes["num_heads"]
    # Qwen3's own default is a number; a null in the file means that of the others.
    kv_heads = _required(settings, "num_key_value_heads") if kind == "qwen3" else None
    kv_heads = kv_heads or settings.get("num_key_value_heads") or heads
    head_dim = settings.get("head_dim")
    if head_dim is None:
        head_dim = _QWEN3_HEAD_DIM if kind == "qwen3" else sizes["embed_dim"] // heads
    common = sizes | {
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "norm_eps": float(sizes["norm_eps"]),
        "rope_theta": _rope_theta(settings),
        "tie_embeddings": bool(settings.get("tie_word_embeddings", False)),
        "init_std": float(settings.get("initializer_range") or 0.02),
    }
    if kind == MODA:
        return from_json(common | {name: _required(settings, name) for name in _OURS})
    placement, qk_norm = _NORMS[kind]
    return ModelConfig(**common, norm_placement=placement, qk_norm=qk_norm, depth=ResidualConfig())  # type: ignore[arg-type]


_OURS = ("norm_placement", "qk_norm", "use_bias", "depth")
"""Settings of the model type "moda" under our names."""


def _required(settings: Mapping[str, Any], name: str) -> Any:
    if name not in settings:
        raise ValueError(f"config.json: {name}: expected a value, got none")
    return settings[name]


def _check(kind: str, settings: Mapping[str, Any], ignore: Collection[str]) -> None:
    """Raises ValueError for whatever would make another function of the parameters."""
    for name, allowed in _ONLY.items():
        value = settings.get(name)
        if value is not None and value not in allowed and name not in ignore:
            expected = " or ".join(map(repr, allowed)) or "none"
            raise ValueError(
                f"config.json: {name}: expected {expected}, got {value!r}, which is not implemented"
            )
    architectures = settings.get("architectures") or [_ARCHITECTURES[kind]]
    if architectures != [_ARCHITECTURES[kind]]:
        raise ValueError(
            f"config.json: architectures: expected [{_ARCHITECTURES[kind]!r}], got {architectures}"
        )
    windows = settings.get("sliding_window") is not None and kind != "qwen3"
    layer_types = set(settings.get("layer_types") or ["full_attention"])
    if windows or layer_types != {"full_attention"}:
        raise ValueError(
            f"config.json: expected full attention in all layers, got sliding_window "
            f"{settings.get('sliding_window')!r}, layer_types {sorted(layer_types)}, which are not "
            f"implemented"
        )
    known = _ARE_READ | _ONLY.keys() | _SAY_NOTHING | set(ignore)
    known |= set(_OURS) if kind == MODA else set()
    for name, value in settings.items():
        if name not in known and value not in (None, False, [], {}):
            raise ValueError(
                f"config.json: {name}: expected a setting that is known not to change the model, "
                f"got {value!r}; if it does not, say --ignore {name}"
            )


def _rope_theta(settings: Mapping[str, Any]) -> float:
    """The base of plain rotary positions; older files have it beside `rope_scaling`."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = settings.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        unknown = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or unknown or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(
                f"config.json: {name}: expected rotary positions without scaling (rope_type "
                f"'default'), got {dict(rope)!r}, which is not implemented"
            )
    inner = (settings.get("rope_parameters") or {}).get("rope_theta")
    return float(inner or settings.get("rope_theta") or _ROPE_THETA)


def model_type_of(config: ModelConfig) -> str:
    """The model type under which a model is exported.

    Raises ValueError for a mechanism that no exported file computes.
    """
    if not isinstance(config.depth, ResidualConfig | MoDAConfig):
        raise ValueError(
            f"model.depth: expected residual or moda, got {config.depth.name}: there is no PyTorch "
            f"model of it to export to"
        )
    if config.depth.reader_norms_keys:
        raise ValueError(
            "model.depth.key_norm: expected writer, got reader, which no PyTorch model computes"
        )
    norms = (config.norm_placement, config.qk_norm)
    width = config.num_heads * config.head_dim
    for kind, theirs in _NORMS.items():
        # OLMo 2's configuration has no head size, Llama's demands a multiple.
        fits = {
            "olmo2": width == config.embed_dim,
            "llama": config.embed_dim % config.num_heads == 0,
            "qwen3": True,
        }[kind]
        is_plain = isinstance(config.depth, ResidualConfig) and not config.use_bias
        if is_plain and norms == theirs and fits:
            return kind
    return MODA


def write_model_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The settings of config.json, in a form that old and new versions of transformers read."""
    kind = model_type_of(config)
    settings: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "hidden_act": "silu",
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "initializer_range": config.init_std,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if kind != MODA:
        return settings | {"attention_bias": False}
    ours = to_json(config)
    return settings | {name: ours[name] for name in _OURS} | {
        "auto_map": {
            "AutoConfig": "modeling_moda.MoDAConfig",
            "AutoModelForCausalLM": "modeling_moda.MoDAForCausalLM",
        }
    }  # fmt: skip
