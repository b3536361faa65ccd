"""config.json of a Hugging Face checkpoint into a `ModelConfig`, and back.

Whatever is not known to leave the function as it is, is refused by its name: a checkpoint that
loads computes what transformers computes.
"""

import sys
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
}
"""Our fields: theirs, which must be there."""

_HAVE_DEFAULTS = {
    "qwen3": ("num_key_value_heads",),
    "moda": ("num_key_value_heads", "head_dim", "rope_theta"),
}
"""Settings that must be there too: without them the PyTorch model takes a number of its own."""

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
     "model_type", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling",
     "rope_theta", "sliding_window", "tie_word_embeddings"}
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
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type: expected one of {', '.join(_ARCHITECTURES)}, got {kind!r}"
        )
    _check(kind, settings, ignore)
    for name in _HAVE_DEFAULTS.get(kind, ()):
        _required(settings, name)
    sizes = {ours: read_integer(settings, theirs) for ours, theirs in _SIZES.items()}
    heads = sizes["num_heads"]
    head_dim = _QWEN3_HEAD_DIM if kind == "qwen3" else sizes["embed_dim"] // heads
    common = sizes | {
        "num_kv_heads": read_integer(settings, "num_key_value_heads", heads),
        "head_dim": read_integer(settings, "head_dim", head_dim),
        "norm_eps": _number(settings, "rms_norm_eps"),
        "rope_theta": _rope_theta(settings),
        "tie_embeddings": _bool(settings, "tie_word_embeddings"),
        "init_std": _number(settings, "initializer_range", 0.02),
    }
    if kind == MODA:
        model = from_json(common | {name: _required(settings, name) for name in _OURS})
        model_type_of(model)  # raises for what modeling_moda.py does not compute
        return model
    placement, qk_norm = _NORMS[kind]
    return ModelConfig(**common, norm_placement=placement, qk_norm=qk_norm, depth=ResidualConfig())  # type: ignore[arg-type]


_OURS = ("norm_placement", "qk_norm", "use_bias", "depth")
"""Settings of the model type "moda" under our names."""


def _required(settings: Mapping[str, Any], name: str) -> Any:
    if name not in settings:
        raise ValueError(f"config.json: {name}: expected a value, got none")
    return settings[name]


def read_integer(settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer of config.json; `default`, if there is one, for a missing one or null."""
    return _positive(settings, name, default, int, "a positive integer")


def _number(settings: Mapping[str, Any], name: str, default: float | None = None) -> float:
    return float(_positive(settings, name, default, int | float, "a positive number"))


def _positive(settings: Mapping[str, Any], name: str, default: Any, kind: Any, what: str) -> Any:
    value = _required(settings, name) if default is None else settings.get(name)
    if value is None and default is not None:
        return default
    if (
        not isinstance(value, kind)
        or isinstance(value, bool)
        or not 0 < value <= sys.float_info.max  # false for NaN
    ):
        raise ValueError(f"config.json: {name}: expected {what}, got {value!r}")
    return value


def _bool(settings: Mapping[str, Any], name: str) -> bool:
    """False for a missing one or null."""
    value = settings.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"config.json: {name}: expected true or false, got {value!r}")
    return bool(value)


def _mapping(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Empty for a missing one or null."""
    value = settings.get(name)
    if not isinstance(value, Mapping | None):
        raise ValueError(f"config.json: {name}: expected settings by name, got {value!r}")
    return value or {}


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
    window, layer_types = settings.get("sliding_window"), settings.get("layer_types")
    has_window = window is not None and kind != "qwen3"
    layers = read_integer(settings, "num_hidden_layers")
    is_full = layer_types is None or (
        isinstance(layer_types, list)
        and len(layer_types) == layers
        and all(layer_type == "full_attention" for layer_type in layer_types)
    )
    if has_window or not is_full:
        raise ValueError(
            f"config.json: expected full attention in all layers, got sliding_window {window!r}, "
            f"layer_types {layer_types!r:.80} of {layers} layers, which are not implemented"
        )
    used = _ARE_READ | _SAY_NOTHING | (set(_OURS) if kind == MODA else set())
    for name in ignore:
        if name in used or name not in settings:
            got = "is known" if name in used else "is not there"
            raise ValueError(
                f"--ignore {name}: expected a setting of config.json that is not known, got one "
                f"that {got}"
            )
    known = used | _ONLY.keys() | set(ignore)
    for name, value in settings.items():
        says_something = value not in (None, [], {}) and value is not False  # 0 == False
        if name not in known and says_something:
            raise ValueError(
                f"config.json: {name}: expected a setting that is known not to change the model, "
                f"got {value!r}; if it does not, say --ignore {name}"
            )


def _rope_theta(settings: Mapping[str, Any]) -> float:
    """The base of plain rotary positions, in whichever of three places files have it."""
    ropes = {name: _mapping(settings, name) for name in ("rope_parameters", "rope_scaling")}
    for name, rope in ropes.items():
        kind = rope.get("rope_type", rope.get("type", "default"))
        unknown = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or unknown or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(
                f"config.json: {name}: expected rotary positions without scaling (rope_type "
                f"'default'), got {dict(rope)!r}, which is not implemented"
            )
    given = [part for part in (*ropes.values(), settings) if part.get("rope_theta") is not None]
    thetas = {_number(part, "rope_theta") for part in given}
    if len(thetas) > 1:
        raise ValueError(f"config.json: rope_theta: expected one number, got {sorted(thetas)}")
    return thetas.pop() if thetas else _ROPE_THETA


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
        "rms_norm_eps": config.norm_eps,
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
