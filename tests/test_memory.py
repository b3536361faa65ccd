"""A run that does not fit ends with one line: what it asked for, and what would help."""

import dataclasses

import jax
import pytest

from moda_jax.config import Config, DataConfig, ModelConfig
from moda_jax.ops.sharding import make_mesh
from moda_jax.train import trainer
from moda_jax.train.memory import describe_out_of_memory
from moda_jax.train.train_step import resolve

CONFIG = Config(
    name="run", model=ModelConfig(num_layers=4), data=DataConfig(seq_len=1024), batch_size=64
)

MESSAGES = {
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes.": "64.0 GiB",
    "RESOURCE_EXHAUSTED: Out of memory allocating 12345678 bytes.": "11.8 MiB",
    "RESOURCE_EXHAUSTED: Failed to allocate 2.50GiB for new constant": "2.5 GiB",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.48G hbm.": (
        "20.2 GiB"
    ),
}


def describe(config, message="RESOURCE_EXHAUSTED"):
    mesh = make_mesh(config.mesh)
    return describe_out_of_memory(RuntimeError(message), config, mesh, resolve(config, mesh))


@pytest.mark.parametrize("message", MESSAGES)
def test_the_bytes_asked_for(message):
    assert f"the run asked for {MESSAGES[message]} and needs" in describe(CONFIG, message)


def test_what_would_help_and_by_how_much():
    whole = describe(CONFIG)
    assert "asked for" not in whole
    half = describe(dataclasses.replace(CONFIG, accumulation_steps=2))
    saved = float(whole.split(" for what layers save")[0].split()[-2].replace(",", ""))
    assert f"--accumulation-steps 2: {saved / 2:.1f} GiB less, the same training" in whole
    assert f"--batch-size 32: {saved / 2:.1f} GiB less" in whole
    assert f"{saved / 2:.1f} GiB for what layers save" in half
    assert "--execution.remat full instead of save_products" in whole
    assert "--accumulation-steps 4" in half
    last = dataclasses.replace(
        CONFIG, accumulation_steps=64, execution=dataclasses.replace(CONFIG.execution, remat="full")
    )
    for setting in ("accumulation", "batch-size", "remat"):
        assert f"--{setting}" not in describe(last).replace("execution.", "")
    assert "--mesh.fsdp 2" in describe(last)


@pytest.mark.parametrize("truly", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_that_does_not_fit_says_so(tmp_path, monkeypatch, truly):
    """Truly: this embedding and its moments take 24 TiB."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(name * 20)
    model = ModelConfig(
        vocab_size=2**22, embed_dim=2**19, num_heads=2, num_kv_heads=2, mlp_dim=2, num_layers=1
    )
    config = dataclasses.replace(
        CONFIG,
        model=model if truly else CONFIG.model,
        data=DataConfig(source=str(tmp_path), seq_len=16),
        batch_size=2,
        output_dir=str(tmp_path / "runs"),
    )
    if not truly:
        error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        monkeypatch.setattr(trainer, "_Run", raising(error))
    with pytest.raises(MemoryError, match="out of memory on cpu .*asked for .* needs") as caught:
        trainer.train(config)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)
    if not truly:
        monkeypatch.setattr(trainer, "_Run", raising(jax.errors.JaxRuntimeError("INTERNAL: bug")))
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: bug"):
            trainer.train(config)


def raising(error):
    def fail(*_):
        raise error

    return fail
