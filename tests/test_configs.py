"""Every shipped config: it parses, and its size is the one that its docstring claims."""

import ast
import dataclasses
import re

import pytest

from moda_jax.cli import DEFAULT_CONFIG, load_config
from moda_jax.config import DEPTH_CONFIGS, MoDAConfig, ModelConfig, ResidualConfig
from moda_jax.model.flops import count_parameters

FOLDER = DEFAULT_CONFIG.parent
CONFIGS = {
    "_".join(path.relative_to(FOLDER).with_suffix("").parts): path
    for path in sorted(FOLDER.rglob("*.py"))
}

# Table 3 prints millions with one digit; Table 6 with two, and counts the MoDA rows' last FFN
# projection (2 D K H weights, 2 K H biases: 98 560), but not the final norm (384).
TABLE_3 = {
    "olmo2_700m_36": 669.0,
    "olmo2_700m_38": 700.5,
    "moda_700m_row3": 669.0,
    "moda_700m_row4": 705.7,
    "moda_700m_row5": 742.4,
}
PLAIN, DEPTH_KV, FFN_KV = ResidualConfig(), MoDAConfig(ffn_kv="none"), MoDAConfig()
TABLE_6 = {
    1: (48, "pre", PLAIN, 123.38),
    2: (48, "post", PLAIN, 123.38),
    3: (48, "pre", DEPTH_KV, 123.38),
    4: (48, "post", DEPTH_KV, 123.38),
    5: (48, "pre", FFN_KV, 128.11),
    6: (48, "post", FFN_KV, 128.11),
    7: (24, "post", PLAIN, 71.35),
    8: (24, "post", DEPTH_KV, 71.35),
    9: (24, "post", FFN_KV, 73.72),
}
TINY = [name for name in CONFIGS if name.startswith("tiny_")]


def count(model: ModelConfig) -> int:
    """Parameters by the closed formula of the architecture."""
    width, heads, kv_heads = model.embed_dim, model.num_heads, model.num_kv_heads
    q_dim, kv_dim = heads * model.head_dim, kv_heads * model.head_dim
    kv_projection = 2 * width * kv_dim + model.use_bias * 2 * kv_dim
    layer = 2 * width * q_dim + 2 * width * kv_dim + 3 * width * model.mlp_dim + 2 * width
    layer += model.use_bias * (q_dim + 2 * kv_dim + width + 2 * model.mlp_dim + width)
    layer += {"none": 0, "full": q_dim + kv_dim, "head": 2 * model.head_dim}[model.qk_norm]
    depth, projections = model.depth, 0
    if isinstance(depth, MoDAConfig):
        assert depth.write_every == 1
        projections = (depth.ffn_kv == "project") + (depth.attention_kv == "project")
    return (
        model.num_layers * layer
        + (model.num_layers - 1) * projections * kv_projection
        + model.vocab_size * width
        + width
    )


def config_of(name: str):
    return load_config(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_loads_and_is_named_as_its_file(name: str):
    assert config_of(name).name == name


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_gives_command_cost_and_score(name: str):
    path = CONFIGS[name]
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    for label in ("Command:", "Cost:", "Expected:"):
        assert docstring.count(label) == 1, f"{path.name}: {label} missing"
    assert str(path.relative_to(FOLDER)) in docstring or path == DEFAULT_CONFIG


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_gives_the_right_number_of_parameters(name: str):
    docstring = ast.get_docstring(ast.parse(CONFIGS[name].read_text())) or ""
    total = count_parameters(config_of(name).model).total
    for number in re.findall(r"([\d,]{9,}) parameters against", docstring):
        assert int(number.replace(",", "")) == total


@pytest.mark.parametrize(("name", "millions"), TABLE_3.items())
def test_table_3_sizes(name: str, millions: float):
    config = config_of(name)
    assert round(count(config.model) / 1e6, 1) == millions
    assert config.steps * config.batch_size * config.data.seq_len == pytest.approx(400e9, rel=1e-4)


@pytest.mark.parametrize("row", TABLE_6)
def test_table_6_sizes(row: int):
    layers, placement, depth, millions = TABLE_6[row]
    model = config_of(f"table6_row{row}").model
    assert (model.num_layers, model.norm_placement, model.depth) == (layers, placement, depth)
    last_projection = 98_560 if depth == FFN_KV else 0
    assert round((count(model) - 384 + last_projection) / 1e6, 2) == millions


@pytest.mark.parametrize("row", TABLE_6)
def test_rows_of_table_6_differ_in_what_the_table_says_only(row: int):
    config, base = config_of(f"table6_row{row}"), config_of("table6_row7")
    layers, placement, depth, _ = TABLE_6[row]
    model = dataclasses.replace(
        base.model, num_layers=layers, norm_placement=placement, depth=depth
    )
    assert config == dataclasses.replace(base, name=config.name, model=model)


def test_guess_is_called_one():
    path = CONFIGS["moda_1b5_guess"]
    assert "GUESS" in path.read_text().splitlines()[0]
    assert count(load_config(path).model) == pytest.approx(1.5e9, rel=0.02)


@pytest.mark.parametrize("name", TINY)
def test_tiny_ones_differ_in_how_depth_is_used_only_and_are_equally_large(name: str):
    config, tiny = config_of(name), config_of("tiny")
    assert count_parameters(config.model).total == pytest.approx(
        count_parameters(tiny.model).total, rel=0.01
    )
    model = dataclasses.replace(config.model, depth=tiny.model.depth, mlp_dim=tiny.model.mlp_dim)
    assert dataclasses.replace(config, name=tiny.name, model=model) == tiny


def test_every_mechanism_has_a_tiny_config():
    assert {config_of(name).model.depth.name for name in TINY} == set(DEPTH_CONFIGS)
