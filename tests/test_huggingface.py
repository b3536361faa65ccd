"""Import and export of Hugging Face checkpoints; nothing here needs torch.

`tests/test_huggingface_live.py` compares with transformers itself.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax import load_trained
from moda_jax.cli import load_config
from moda_jax.config import (
    MHCConfig,
    MoDAConfig,
    ModelConfig,
    ResidualConfig,
)
from moda_jax.huggingface import exporting, files, importing
from moda_jax.huggingface.command import main_export, main_import
from moda_jax.huggingface.config import read_model_config, write_model_config
from moda_jax.huggingface.exporting import export_checkpoint
from moda_jax.huggingface.importing import import_checkpoint
from moda_jax.huggingface.weights import parameters_of
from moda_jax.train import imported
from moda_jax.train.errors import SaveError
from moda_jax.train.losses import next_token_loss
from moda_jax.train.trainer import train
from tests.attention_suite import assert_close
from tests.checkpoints import (
    golden,
    read_tensors,
    save_run,
    write_checkpoint,
    write_tokenizer,
)
from tests.models import FLOAT32, SMALL, VARIANTS, random_model
from tests.runs import corpus_fixture, final_state, make_config, metrics_of  # noqa: F401
from tests.tolerances import GOLDEN, SAME_MODEL

CASES = ("olmo2", "llama", "llama_tied", "qwen3")
QUIET = {"say": lambda line: None}


def import_golden(name, folder, **changes):
    """The run of a golden file, its settings, and the rest of the file."""
    settings, tensors, rest = golden(name)
    source = write_checkpoint(folder / name, settings, tensors, **{"shards": 3} | changes)
    import_checkpoint(source, folder / f"{name}-run", **QUIET)
    return folder / f"{name}-run", settings, rest


def in_float32(model):
    model.execution = FLOAT32
    return model


@pytest.mark.parametrize(
    "name",  # a compilation each; test_golden.py has the same numbers of every case
    ["olmo2", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES[1:])],
)
def test_an_imported_model_computes_what_transformers_does(name, tmp_path):
    run, _, case = import_golden(name, tmp_path)
    model, tokenizer, step = load_trained(run)
    assert (step, tokenizer.eos_token) == (0, "</s>")
    graph, state = nnx.split(in_float32(model))
    tokens = jnp.asarray(case["tokens"])
    batch = {
        "tokens": tokens,
        "targets": jnp.asarray(case["targets"]),
        "segment_ids": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    }

    def mean_loss(state):
        model = nnx.merge(graph, state)
        return next_token_loss(model, batch, z_loss=0.0)[0] / tokens.size, model(tokens)

    (loss, logits), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(state)
    assert_close("logits", logits, case["logits"], GOLDEN)
    assert_close("loss", loss, case["loss"], GOLDEN)
    leaves = jax.tree.leaves(grads)
    for parameter, grad in zip(parameters_of(model.config), leaves, strict=True):
        parts = np.asarray(grad) if parameter.stacked else np.asarray(grad)[None]
        for weight, part in zip(parameter.names, parts, strict=True):
            wanted = case.pop(f"grad/{weight}")
            assert_close(f"gradient of {weight}", parameter.to_theirs(part), wanted, GOLDEN)
    assert not [key for key in case if key.startswith("grad/")]


@pytest.mark.parametrize("name", CASES)
def test_exported_again_every_tensor_and_setting_comes_back(name, tmp_path):
    run, settings, _ = import_golden(name, tmp_path)
    assert export_checkpoint(run, tmp_path / "out", shard_bytes=9000, **QUIET) == name.split("_")[0]
    before, after = read_tensors(tmp_path / name), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for tensor in before:
        np.testing.assert_array_equal(before[tensor], after[tensor])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in after.values())
    assert index["weight_map"].keys() == after.keys()
    exported = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert read_model_config(exported) == read_model_config(settings)
    tokenizer = (tmp_path / name / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer


def test_sixteen_bits_stay_sixteen_bits_and_are_float32_in_a_model(tmp_path):
    settings, tensors, _ = golden("llama")
    halves = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    import_checkpoint(
        write_checkpoint(tmp_path / "in", settings, halves), tmp_path / "run", **QUIET
    )
    model = load_trained(tmp_path / "run").model
    assert model.embedding[...].dtype == jnp.float32
    wanted = halves["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(model.embedding[...], wanted)
    export_checkpoint(tmp_path / "run", tmp_path / "out", **QUIET)
    for name, tensor in read_tensors(tmp_path / "out").items():
        assert tensor.dtype == jnp.bfloat16
        np.testing.assert_array_equal(tensor, halves[name])
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["torch_dtype"] == "bfloat16"
    export_checkpoint(tmp_path / "run", tmp_path / "wide", dtype="float32", **QUIET)
    assert {x.dtype.name for x in read_tensors(tmp_path / "wide").values()} == {"float32"}


OF_MODA = {"model_type": "moda", "architectures": ["MoDAForCausalLM"],
           "norm_placement": "pre", "qk_norm": "head", "use_bias": False}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type: expected one of olmo2, llama, qwen3, moda, got 'gpt2'",
        ),
        ({"model_type": None}, "model_type: expected one of .*, got None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: expected .*'Llama"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling: expected .*llama3",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: expected .*linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters: .*yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1, got 0.5"),
        ({"sliding_window": 128}, "full attention in all layers, got sliding_window 128"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "got .*'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, r"layer_types \['full_attention'\] of 3 layers"),
        ({"layer_types": [["full_attention"]] * 3}, "full attention in all layers, got"),
        ({"layer_types": 3}, "full attention in all layers, got .*layer_types 3"),
        ({"use_sliding_window": True}, "use_sliding_window: expected False, got True"),
        ({"attention_bias": True}, "attention_bias: expected False, got True"),
        ({"mlp_bias": True}, "mlp_bias: expected False, got True"),
        ({"attention_dropout": 0.1}, "attention_dropout: expected 0, got 0.1"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected none"),
        (
            {"logit_softcapping": 30.0},
            "logit_softcapping: expected .*say --ignore logit_softcapping",
        ),
        ({"logit_scale": 0}, "logit_scale: expected a setting that is known"),
        ({"num_attention_heads": 3}, "num_heads: expected a multiple of num_kv_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer, got 0"),
        ({"num_attention_heads": None}, "num_attention_heads: expected .* integer, got None"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected a positive integer, got True"),
        ({"rms_norm_eps": None}, "rms_norm_eps: expected a positive number, got None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number, got nan"),
        ({"rope_theta": 0}, "rope_theta: expected a positive number, got 0"),
        ({"rope_theta": 10**400}, "rope_theta: expected a positive number, got 1000"),
        ({"rope_parameters": "x"}, "rope_parameters: expected settings by name, got 'x'"),
        ({"rope_scaling": [1]}, r"rope_scaling: expected settings by name, got \[1\]"),
        (
            {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
            r"rope_theta: expected one number, got \[10000.0, 500000.0\]",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or .*, got 'false'"),
        ({"model_type": ["llama"]}, r"model_type: expected one of .*, got \['llama'\]"),
        (OF_MODA | {"depth": {"name": "mhc"}}, "model.depth: expected residual or moda, got mhc"),
        (OF_MODA | {"depth": {"name": []}}, "model.depth: expected the settings of one of"),
        (
            OF_MODA | {"depth": {"name": "moda", "key_norm": "reader"}},
            "model.depth.key_norm: expected writer, got reader",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message):
    settings, _, _ = golden("llama")
    with pytest.raises(ValueError, match=message):
        read_model_config(settings | change)


def test_settings_may_be_missing_or_in_the_newer_form():
    settings, _, _ = golden("llama")
    wanted = read_model_config(settings)
    newer = {key: value for key, value in settings.items() if key != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": settings["rope_theta"]}
    assert read_model_config(newer | {"rope_parameters": rope}) == wanted
    assert read_model_config(settings | {"mystery": 1}, ignore=("mystery",)) == wanted
    assert read_model_config(newer | {"rope_scaling": rope}) == wanted
    assert read_model_config(newer).rope_theta == 10_000
    few = {k: v for k, v in settings.items() if k not in ("head_dim", "num_key_value_heads")}
    assert read_model_config(few).num_kv_heads == settings["num_attention_heads"]
    with pytest.raises(ValueError, match="num_key_value_heads: expected a value, got none"):
        read_model_config(few | {"model_type": "qwen3"})
    with pytest.raises(ValueError, match="intermediate_size: expected a value, got none"):
        read_model_config({k: v for k, v in settings.items() if k != "intermediate_size"})
    for name in ("nonsuch", "rope_scaling", "eos_token_id"):  # neither is anything to pass over
        with pytest.raises(ValueError, match=f"--ignore {name}: expected a setting .* not known"):
            read_model_config(settings, ignore=(name,))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight: .* got none"),
        (lambda t: t.update(extra=np.ones(3, np.float32)), "tensor extra: expected none of this"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(5, np.float32)}),
            r"tensor model.norm.weight: expected shape \(16,\) by config.json, got \(5,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}),
            "tensor model.norm.weight: expected one of F32, F16, BF16, got I8",
        ),
        (
            lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((0, 1), np.nan),
            "tensor model.layers.1.mlp.up_proj.weight: expected finite numbers, got NaN",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(spoil, message, tmp_path):
    settings, tensors, _ = golden("llama")
    spoil(tensors)
    source = write_checkpoint(tmp_path / "in", settings, tensors)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(source, tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()


def test_old_constants_and_a_tied_head_are_passed_over(tmp_path):
    settings, tensors, _ = golden("llama_tied")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source = write_checkpoint(tmp_path / "in", settings, tensors, shards=2)
    import_checkpoint(source, tmp_path / "run", **QUIET)
    assert load_trained(tmp_path / "run").model.head is None
    # transformers leaves another matrix as the model's head.
    head[-1, -1] += 1
    other = write_checkpoint(tmp_path / "other", settings, tensors, shards=2)
    with pytest.raises(ValueError, match="lm_head.weight: expected the embedding.*embeddings to f"):
        import_checkpoint(other, tmp_path / "run-2", **QUIET)


def test_files_that_cannot_be_used_are_named(tmp_path):
    settings, tensors, _ = golden("llama")
    source = write_checkpoint(tmp_path / "in", settings, tensors, shards=2)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_bytes())

    def expect(message):
        with pytest.raises(ValueError, match=message):
            import_checkpoint(source, tmp_path / "run", **QUIET)

    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    expect("index.json: expected files of this folder, got '../elsewhere.safetensors'")
    index.write_text("{")
    expect("index.json: expected JSON, got a damaged file")
    index.write_text('{"x":' + "[" * 100_000)
    expect("index.json: expected JSON, got a damaged file")
    index.unlink()
    expect("expected model.safetensors or model.safetensors.index.json$")
    (source / "pytorch_model.bin").touch()
    expect("got pytorch_model.bin, which are pickled and not read")
    (source / "model.safetensors").write_bytes(b"nothing")
    expect("model.safetensors: expected a safetensors file, got a damaged one")
    (source / "tokenizer.json").unlink()
    expect("expected tokenizer.json in it, got none; say --tokenizer FILE")
    with pytest.raises(ValueError, match="vocab_size: expected at least the 257 tokens"):
        import_checkpoint(source, tmp_path / "run", tokenizer="bytes", **QUIET)
    with pytest.raises(ValueError, match="expected the folder of a Hugging Face checkpoint"):
        import_checkpoint(tmp_path, tmp_path / "run", **QUIET)


def test_what_does_not_fit_is_said_before_it_starts(tmp_path, monkeypatch):
    settings, tensors, _ = golden("llama")
    source = write_checkpoint(tmp_path / "in", settings, tensors)
    monkeypatch.setattr(importing, "available_memory", lambda: 100)
    message = (
        r"the import needs 0.0 MiB of memory, twice its largest parameter \(layers.mlp.\w+.kernel"
    )
    with pytest.raises(ValueError, match=message):
        import_checkpoint(source, tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    import_checkpoint(source, tmp_path / "run", **QUIET)
    monkeypatch.setattr(imported, "available_memory", lambda: 100)
    with pytest.raises(
        MemoryError, match="parameters need 0.0 MiB in float32, and 0.0 MiB of this"
    ):
        load_trained(tmp_path / "run")


def test_the_declared_end_of_text_and_the_tokenizers_files_come_along(tmp_path):
    settings, tensors, _ = golden("llama")
    settings |= {"eos_token_id": [0, 1], "bos_token_id": 1, "max_position_embeddings": 77}
    source = write_checkpoint(tmp_path / "in", settings, tensors)
    (source / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    import_checkpoint(source, tmp_path / "run", **QUIET)
    assert load_trained(tmp_path / "run").tokenizer.eos_token == "<s>"
    assert load_config(tmp_path / "run").data.seq_len == 77
    export_checkpoint(tmp_path / "run", tmp_path / "out", **QUIET)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"chat_template": "x"}'
    exported = json.loads((tmp_path / "out" / "config.json").read_bytes())
    names = ("eos_token_id", "bos_token_id", "max_position_embeddings")
    assert {name: exported[name] for name in names} == {name: settings[name] for name in names}


@pytest.mark.parametrize(
    ("tokenizer", "eos_id"), [({"eos_token": "b"}, 3), ({"tokenizer": "bytes"}, 256)]
)
def test_an_export_declares_the_end_of_text_that_the_run_has(tokenizer, eos_id, tmp_path):
    settings, tensors, _ = golden("llama_tied")
    settings |= {"eos_token_id": 1, "bos_token_id": 0, "vocab_size": 300}
    width = tensors["model.embed_tokens.weight"].shape[1]
    tensors["model.embed_tokens.weight"] = np.ones((300, width), np.float32)
    source = write_checkpoint(tmp_path / "in", settings, tensors)
    came = {"tokenizer_config": {"eos_token": "</s>", "mine": 1}, "generation_config": {}}
    for name, content in came.items():
        (source / f"{name}.json").write_text(json.dumps({"eos_token_id": 1} | content))
    import_checkpoint(source, tmp_path / "run", **tokenizer, **QUIET)
    export_checkpoint(tmp_path / "run", tmp_path / "out", **QUIET)
    exported = {
        path.stem: json.loads(path.read_bytes()) for path in (tmp_path / "out").glob("*.json")
    }
    assert exported["config"]["eos_token_id"] == eos_id
    if "eos_token" in tokenizer:
        assert exported["config"]["bos_token_id"] == 0
        assert exported["tokenizer_config"]["eos_token"] == "b"
        assert exported["tokenizer_config"]["mine"] == 1
        assert exported["generation_config"]["eos_token_id"] == eos_id
    else:  # what came describes another tokenizer
        assert exported["config"]["bos_token_id"] is None
        assert exported["tokenizer_config"]["eos_token"] == "<|endoftext|>"
        assert "generation_config" not in exported


@pytest.mark.parametrize(("declared", "token"), [(3, "b"), ([2, 0], "a"), ([], "</s>")])
def test_the_end_of_text_may_be_any_token(declared, token, tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    model = ModelConfig(vocab_size=29)
    settings = {"eos_token_id": declared}
    assert importing._find_tokenizer(tmp_path, None, None, settings, model).eos_token == token


@pytest.mark.parametrize("declared", [99, -1, "x", True, [[0]], {}])
def test_an_end_of_text_that_is_no_token_is_refused(declared, tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    settings = {"eos_token_id": declared}
    with pytest.raises(ValueError, match="eos_token_id: expected the id of a token of"):
        importing._find_tokenizer(tmp_path, None, None, settings, ModelConfig())


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_failed_import_leaves_nothing_and_an_unfinished_one_is_named(
    tmp_path, monkeypatch, caplog
):
    settings, tensors, _ = golden("llama")
    source, run = write_checkpoint(tmp_path / "in", settings, tensors), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(imported, "save_file", full_disk)
        with pytest.raises(SaveError, match="No space left on device; make room"):
            import_checkpoint(source, run, **QUIET)
    assert not run.exists()
    assert not [record for record in caplog.records if record.exc_info]  # orbax's tracebacks
    (run / "partial-x").mkdir(parents=True)
    with pytest.raises(ValueError, match="got an import or export that did not finish; remove it"):
        import_checkpoint(source, run, **QUIET)
    (run / "config.json").touch()  # what was trained there is not to be removed
    with pytest.raises(ValueError, match="got one with files"):
        import_checkpoint(source, run, **QUIET)


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    run, out = import_golden("llama", tmp_path)[0], tmp_path / "out"
    for function in ("_write_tokenizer", "write_json"):  # after the tensors
        with monkeypatch.context() as patch:
            patch.setattr(exporting, function, full_disk)
            with pytest.raises(OSError, match="No space left"):
                export_checkpoint(run, out, **QUIET)
        assert not out.exists()
    out.mkdir()
    with monkeypatch.context() as patch:
        save = files.save_file
        patch.setattr(files, "save_file", lambda *args, **kw: full_disk(save(*args, **kw)))
        with pytest.raises(OSError, match="No space left"):
            export_checkpoint(run, out, **QUIET)
    assert not any(out.iterdir())
    export_checkpoint(run, out, **QUIET)


@pytest.mark.filterwarnings("error")
def test_numbers_that_a_type_does_not_hold_are_refused():
    part = np.array([[1.0, -(2.0**20)], [2.0, np.inf]], np.float32)
    for kept in (part, part.astype(jnp.bfloat16)):
        with pytest.raises(ValueError, match="tensor x: .* float16 holds, got up to 1.049e.06; u"):
            exporting._cast("x", kept, "float16")
    assert exporting._cast("x", part, "bfloat16").dtype == jnp.bfloat16
    assert np.isinf(exporting._cast("x", part[1:], "float16")[0, 1])  # as it was


def random_llama(folder, corpus):
    """A checkpoint of random weights, with bytes as tokens, and the config of a run like it."""
    config = make_config(corpus, folder)
    model = dataclasses.replace(
        config.model, norm_placement="pre", qk_norm="none", depth=ResidualConfig(), num_layers=2
    )
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(float(len(parameter.their_shape) == 1), 0.2, parameter.their_shape)
        for parameter in parameters_of(model)
        for name in parameter.names
    }
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    settings = write_model_config(model, "float32")
    source = write_checkpoint(folder / "in", settings, tensors, tokenizer=False)
    return source, dataclasses.replace(config, model=model, steps=2, sample_tokens=0)


@pytest.mark.slow
def test_an_imported_model_trains_on_with_and_without_depth(corpus, tmp_path):
    source, config = random_llama(tmp_path, corpus)
    run = Path(config.output_dir, "run")
    import_checkpoint(source, run, tokenizer="bytes", **QUIET)
    given = load_trained(run).model

    # In the import's own folder: the parameters that were imported, and a fresh optimizer.
    assert load_config(run).model == config.model
    losses = {}
    train(config, on_step=lambda step, metrics: losses.update({step: metrics["loss"]}))
    assert sorted(losses) == [1, 2]
    validation = metrics_of(config, "validation_loss")
    assert sorted(validation) == [0, 2]
    assert int(final_state(config)[0].step) == 2

    # With depth slots: nothing but the mechanism's own parameters is fresh.
    again = Path(config.output_dir, "again")
    import_checkpoint(source, again, tokenizer="bytes", **QUIET)
    for kind, bias in (("project", -40.0), ("none", None)):
        depth = MoDAConfig(ffn_kv=kind, score_bias=bias)
        deeper = dataclasses.replace(
            config,
            name=kind,
            model=dataclasses.replace(config.model, depth=depth),
            init_from=str(again),
            steps=1,
            optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-30, weight_decay=0.0),
        )
        train(deeper)
        start = metrics_of(deeper, "validation_loss")[0]
        # Closed, the slots change nothing; without a bias the loss is another one, and is stated.
        assert (abs(start - validation[0]) < 1e-6) == (bias is not None)
        params = final_state(deeper)[0].params
        np.testing.assert_allclose(params["embedding"][...], given.embedding[...], atol=1e-20)
        assert ("depth" in params) == (kind == "project")


def test_another_tokenizer_is_refused(corpus, tmp_path):
    source, config = random_llama(tmp_path, corpus)
    write_tokenizer(source / "tokenizer.json")
    import_checkpoint(source, Path(config.output_dir, "run"), **QUIET)
    with pytest.raises(ValueError, match="expected the tokenizer that was imported with the model"):
        train(config)


@pytest.mark.parametrize(
    "name", ["every3-row5", *(pytest.param(n, marks=pytest.mark.slow) for n in ("row4", "tied"))]
)
def test_moda_models_are_exported_with_their_own_model_file_and_come_back(name, tmp_path):
    config = dataclasses.replace(SMALL, vocab_size=300, **VARIANTS[name])
    model = random_model(config)
    run = save_run(tmp_path / "run", model)
    assert export_checkpoint(run, tmp_path / "out", dtype=None, **QUIET) == "moda"
    settings = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert settings["auto_map"]["AutoModelForCausalLM"] == "modeling_moda.MoDAForCausalLM"
    assert "class MoDAForCausalLM" in (tmp_path / "out" / "modeling_moda.py").read_text()
    assert read_model_config(settings) == config
    import_checkpoint(tmp_path / "out", tmp_path / "back", **QUIET)
    back, tokenizer, _ = load_trained(tmp_path / "back")
    assert tokenizer.decode(tokenizer.encode("Größe \n x")) == "Größe \n x"
    assert tokenizer.encode("Ä") == list("Ä".encode())
    for wanted, got in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(back)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_mechanisms_without_a_pytorch_model_are_refused(tmp_path):
    run = save_run(tmp_path / "run", random_model(dataclasses.replace(SMALL, depth=MHCConfig())))
    with pytest.raises(ValueError, match="model.depth: expected residual or moda, got mhc"):
        export_checkpoint(run, tmp_path / "out", **QUIET)
    reader = dataclasses.replace(SMALL, depth=MoDAConfig(key_norm="reader"))
    run_of_reader = save_run(tmp_path / "reader", random_model(reader))
    with pytest.raises(ValueError, match="model.depth.key_norm: expected writer, got reader"):
        export_checkpoint(run_of_reader, tmp_path / "out", **QUIET)
    with pytest.raises(ValueError, match=r'step: expected "newest", "best" or one of \[3\], got 7'):
        export_checkpoint(run, tmp_path / "out", step=7, **QUIET)
    with pytest.raises(ValueError, match="expected a run's folder with checkpoints/"):
        export_checkpoint(tmp_path, tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_exports_say_what_does_not_fit_and_keep_what_is_there(tmp_path, monkeypatch):
    run = save_run(tmp_path / "run", random_model(SMALL))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="out: expected a new or empty folder, got one with files"):
        export_checkpoint(run, tmp_path / "out", **QUIET)
    with pytest.raises(ValueError, match="mine: expected a new or empty folder, got no folder"):
        export_checkpoint(run, tmp_path / "out" / "mine", **QUIET)
    monkeypatch.setattr(exporting, "available_memory", lambda: 100)
    with pytest.raises(ValueError, match="the export needs 1.9 GiB of memory, got 0.0 MiB"):
        export_checkpoint(run, tmp_path / "new", **QUIET)


def test_the_commands_import_export_and_explain_themselves_in_one_line(tmp_path, capsys):
    settings, tensors, _ = golden("qwen3")
    source = write_checkpoint(tmp_path / "in", settings, tensors)
    arguments = [str(source), "--name", "mine", "--output-dir", str(tmp_path / "runs")]
    assert main_import(arguments) == 0
    out = capsys.readouterr().out
    assert re.search(r"qwen3, [\d,]+ parameters, tokenizer of 5\nimported: \S+/runs/mine", out)
    assert main_import(arguments) == 2
    assert "expected a new or empty folder, got one with files" in capsys.readouterr().err
    assert main_import([str(tmp_path), "--name", "a/b"]) == 2
    assert "name: expected a folder's name" in capsys.readouterr().err
    run = str(tmp_path / "runs" / "mine")
    assert main_export([run, str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "qwen3, bfloat16, step 0 of mine" in capsys.readouterr().out
    assert main_export([run]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["every3-row5", "pre-head-bias", "post-none"])
def test_every_parameter_has_its_own_names_and_goes_there_and_back(name):
    config: ModelConfig = dataclasses.replace(SMALL, **VARIANTS[name])
    parameters = list(parameters_of(config))
    names = [name for parameter in parameters for name in parameter.names]
    assert len(names) == len(set(names))
    for parameter in parameters:
        part = np.arange(np.prod(parameter.part_shape)).reshape(parameter.part_shape)
        theirs = parameter.to_theirs(part)
        assert theirs.shape == parameter.their_shape
        np.testing.assert_array_equal(parameter.to_ours(theirs), part)


@pytest.mark.slow
def test_score_bias_closes_the_slots():
    closed = dataclasses.replace(SMALL, depth=MoDAConfig(score_bias=-60.0))
    model = random_model(closed)
    plain = random_model(dataclasses.replace(SMALL, depth=ResidualConfig()))
    state = nnx.state(plain)
    for name in state:
        state[name] = nnx.state(model)[name]
    nnx.update(plain, state)
    tokens = np.random.default_rng(1).integers(0, SMALL.vocab_size, (2, 9)).astype(np.int32)
    assert_close("logits", model(tokens), plain(tokens), SAME_MODEL)
    mass = model.attention_mass(tokens)
    np.testing.assert_allclose(mass.sum(axis=1), 1, atol=1e-5)
    assert float(mass[:, 1:].sum()) < 1e-12
