"""Every shipped config: it parses, and its size is the one that its docstring claims."""

import ast
import dataclasses
from pathlib import Path

import pytest

from moda_jax.cli import DEFAULT_CONFIG, load_config
from moda_jax.config import ModelConfig

CONFIGS = sorted(DEFAULT_CONFIG.parent.glob("*.py"))

# Table 3 prints millions with one digit; Table 6 with two, and counts the MoDA rows' last FFN
# projection (2 D K H weights, 2 K H biases: 98 560), but not the final norm (384).
TABLE_3 = {
    "olmo2_700m_36": 669.0,
    "olmo2_700m_38": 700.5,
    "moda_700m_row3": 669.0,
    "moda_700m_row4": 705.7,
    "moda_700m_row5": 742.4,
}
TABLE_6 = {
    "small_24_vanilla": 71.35,
    "small_48_vanilla": 123.38,
    "small_24_moda": 73.72,
    "small_48_moda": 128.11,
}


def count(model: ModelConfig) -> int:
    """Parameters by the closed formula of the architecture."""
    width, heads, kv_heads = model.embed_dim, model.num_heads, model.num_kv_heads
    q_dim, kv_dim = heads * model.head_dim, kv_heads * model.head_dim
    kv_projection = 2 * width * kv_dim + model.use_bias * 2 * kv_dim
    layer = 2 * width * q_dim + 2 * width * kv_dim + 3 * width * model.mlp_dim + 2 * width
    layer += model.use_bias * (q_dim + 2 * kv_dim + width + 2 * model.mlp_dim + width)
    layer += {"none": 0, "full": q_dim + kv_dim, "head": 2 * model.head_dim}[model.qk_norm]
    projections = (model.depth_ffn_kv == "project") + (model.depth_attention_kv == "project")
    return (
        model.num_layers * layer
        + model.depth_writers * projections * kv_projection
        + model.vocab_size * width
        + width
    )


def config_of(name: str):
    return load_config(DEFAULT_CONFIG.parent / f"{name}.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_and_is_named_as_its_file(path: Path):
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_gives_command_cost_and_score(path: Path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    for label in ("Command:", "Cost:", "Expected:"):
        assert docstring.count(label) == 1, f"{path.name}: {label} missing"
    assert path.name in docstring or path == DEFAULT_CONFIG


@pytest.mark.parametrize(("name", "millions"), TABLE_3.items())
def test_table_3_sizes(name: str, millions: float):
    config = config_of(name)
    assert round(count(config.model) / 1e6, 1) == millions
    assert config.steps * config.batch_size * config.data.seq_len == pytest.approx(400e9, rel=1e-4)


@pytest.mark.parametrize(("name", "millions"), TABLE_6.items())
def test_table_6_sizes(name: str, millions: float):
    model = config_of(name).model
    last_projection = 98_560 if model.depth_stream == "moda" else 0
    assert round((count(model) - 384 + last_projection) / 1e6, 2) == millions


def test_guess_is_called_one():
    path = DEFAULT_CONFIG.parent / "moda_1b5_guess.py"
    assert "GUESS" in path.read_text().splitlines()[0]
    assert count(load_config(path).model) == pytest.approx(1.5e9, rel=0.02)


def test_tiny_pair_differs_in_the_depth_stream_only_and_is_equally_large():
    moda, vanilla = config_of("tiny"), config_of("tiny_vanilla")
    assert (moda.model.depth_stream, vanilla.model.depth_stream) == ("moda", "residual")
    assert count(vanilla.model) == pytest.approx(count(moda.model), rel=0.01)
    same_model = dataclasses.replace(vanilla.model, depth_stream="moda", mlp_dim=moda.model.mlp_dim)
    assert dataclasses.replace(vanilla, name=moda.name, model=same_model) == moda


@pytest.mark.parametrize("size", [24, 48])
def test_small_pairs_differ_in_the_depth_stream_only(size: int):
    moda, vanilla = config_of(f"small_{size}_moda"), config_of(f"small_{size}_vanilla")
    same = dataclasses.replace(vanilla.model, depth_stream="moda")
    assert dataclasses.replace(vanilla, name=moda.name, model=same) == moda
