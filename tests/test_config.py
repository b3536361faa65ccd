"""What a config refuses, whoever builds it: one line that names the field."""

import dataclasses
import json
import math
import typing

import numpy as np
import pytest

from moda_jax.config import (
    DEPTH_CONFIGS,
    AttentionResidualsConfig,
    Config,
    DataConfig,
    DepthAttentionConfig,
    ExecutionConfig,
    HyperConnectionsConfig,
    MeshConfig,
    MHCConfig,
    MoDAConfig,
    ModelConfig,
    OptimizerConfig,
    from_json,
    to_json,
)

CLASSES = (
    *(ModelConfig, ExecutionConfig, DataConfig, OptimizerConfig, MeshConfig, Config),
    *DEPTH_CONFIGS.values(),
)


def build(cls, **changes):
    return cls(**{"name": "run"} | changes) if cls is Config else cls(**changes)


def fields_of(*kinds):
    """Every field of every config that is annotated with one of `kinds`."""
    return [
        pytest.param(cls, field.name, id=f"{cls.__name__}.{field.name}")
        for cls in CLASSES
        for field in dataclasses.fields(cls)
        if set(kinds) & {field.type, *typing.get_args(field.type), typing.get_origin(field.type)}
    ]


def check_refused(cls, field, value):
    with pytest.raises(ValueError, match=rf"^{cls.__name__}\.{field}: expected ") as caught:
        build(cls, **{field: value})
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("cls", "field"), fields_of(float))
def test_numbers_are_finite(cls, field):
    is_optional = type(None) in typing.get_args(cls.__dataclass_fields__[field].type)
    for value in (math.nan, math.inf, -math.inf, "1", True, *(() if is_optional else (None,))):
        check_refused(cls, field, value)


@pytest.mark.parametrize(("cls", "field"), fields_of(int))
def test_counts_are_integers(cls, field):
    for value in (2.5, 2.0, math.nan, "2", True, -1, np.int64(2)):
        check_refused(cls, field, value)


@pytest.mark.parametrize(("cls", "field"), fields_of(bool))
def test_switches_are_booleans(cls, field):
    for value in (1, "no", None):
        check_refused(cls, field, value)


@pytest.mark.parametrize(("cls", "field"), fields_of(str))
def test_texts_are_texts(cls, field):
    for value in (1, b"bytes", True):
        check_refused(cls, field, value)


@pytest.mark.parametrize(("cls", "field"), fields_of(typing.Literal))
def test_choices(cls, field):
    for value in ("something else", None, 0, []):
        check_refused(cls, field, value)


@pytest.mark.parametrize(
    ("cls", "field", "values"),
    [
        (ModelConfig, "head_dim", (7,)),
        (ModelConfig, "num_heads", (3,)),
        (ModelConfig, "depth", ("moda", {"name": "moda"}, None, MoDAConfig)),
        (MoDAConfig, "window", (0,)),
        (MoDAConfig, "reserved", (1,)),  # without a window
        (Config, "prepared_dir", ("",)),
        (ExecutionConfig, "slot_gradient_block", ("all", 0)),
        (ExecutionConfig, "attention", ("",)),
        (ModelConfig, "rope_theta", (0.0, -1.0)),
        (DataConfig, "validation_fraction", (0.0, 1.0)),
        (DataConfig, "source", ("",)),
        (OptimizerConfig, "beta2", (1.0, -0.1)),
        (OptimizerConfig, "learning_rate", (0.0,)),
        (OptimizerConfig, "final_fraction", (1.5,)),
        (Config, "name", ("", ".", "..", "a/b")),
        (Config, "seed", (2**32,)),
        (Config, "steps", (0,)),
        (Config, "max_skipped_steps", (-1,)),
        (Config, "sample_prompt", ("caf\udce9",)),  # an argument that is not UTF-8
        (Config, "model", ({"num_layers": 2}, None)),
    ],
)
def test_bad_values(cls, field, values):
    for value in values:
        check_refused(cls, field, value)


@pytest.mark.parametrize("cls", [AttentionResidualsConfig, HyperConnectionsConfig, MHCConfig])
def test_post_norm_is_defined_for_one_stream_only(cls):
    message = f"^ModelConfig.norm_placement: expected one of .* depth {cls.name}.*, got 'post'$"
    with pytest.raises(ValueError, match=message):
        ModelConfig(norm_placement="post", depth=cls())


def test_depth_attention_returns_the_width_of_the_stream():
    message = r"^ModelConfig.embed_dim: expected num_heads \* head_dim = 128 .*, got 96$"
    with pytest.raises(ValueError, match=message):
        ModelConfig(embed_dim=96, depth=DepthAttentionConfig())


def test_a_readers_key_norm_needs_one():
    message = "^ModelConfig.qk_norm: expected .full. or .head. with key_norm .reader., got 'none'$"
    with pytest.raises(ValueError, match=message):
        ModelConfig(qk_norm="none", depth=MoDAConfig(key_norm="reader"))


def test_blocks_are_of_gathering():
    message = "^ExecutionConfig.slot_gradient_block: expected .auto. .*, got 2$"
    with pytest.raises(ValueError, match=message):
        ExecutionConfig(slot_gradients="add", slot_gradient_block=2)


@pytest.mark.parametrize("cls", DEPTH_CONFIGS.values(), ids=DEPTH_CONFIGS)
def test_a_model_goes_through_json_and_back(cls):
    config = ModelConfig(num_layers=3, depth=cls())
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert to_json(config)["depth"]["name"] == cls.name


@pytest.mark.parametrize("depth", [None, {}, {"name": "deep"}, "moda"])
def test_json_of_an_older_version(depth):
    with pytest.raises(ValueError, match="model.depth: expected .* of an older version") as caught:
        from_json({"num_layers": 3, "depth": depth})
    assert repr(depth) in str(caught.value)


def test_a_misspelled_field_is_an_error():
    with pytest.raises(TypeError, match="num_layrs"):
        ModelConfig(num_layrs=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().num_layers = 3
