"""A run's folder needs nothing but its corpus, and says what a changed setting does."""

import dataclasses
import json
import re
import types

import pytest

from moda_jax.cli import parse_config
from moda_jax.config import (
    DEPTH_CONFIGS,
    Config,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    MHCConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    dataclass_from_json,
    to_json,
)
from moda_jax.config.files import flatten
from moda_jax.data.loader import Source
from moda_jax.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from moda_jax.train.changes import EFFECTS, PLACE, REFUSED, describe_changes
from moda_jax.train.run_folder import (
    CONFIG_FILE,
    CORPUS_FILE,
    load_folder_tokenizer,
    read_run_config,
    write_run_folder,
)
from tests.corpora import write_tokenizer


def data_of(config):
    """What a folder is told about the data."""
    return types.SimpleNamespace(
        tokenizer=load_tokenizer(config.data.tokenizer),
        sources=[
            Source(
                name=text.name,
                path=text.path,
                weight=text.weight,
                validation=text.validation,
                fingerprint="0123",
                train_documents=3,
                validation_documents=1,
                num_bytes=40,
                train_tokens=9,
                is_one_text=False,
                notes="",
            )
            for text in config.data.texts
        ],
    )


def write(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    write_run_folder(folder, config, data_of(config))


@pytest.mark.parametrize("cls", DEPTH_CONFIGS.values(), ids=DEPTH_CONFIGS)
def test_a_config_goes_through_its_folder_and_back(tmp_path, cls):
    config = Config(
        name="run",
        output_dir=str(tmp_path),
        model=ModelConfig(depth=cls(), norm_placement="pre", rope_theta=1e4, vocab_size=264),
        execution=ExecutionConfig(remat="full", slot_gradient_block=2, slot_gradients="gather"),
        data=DataConfig(source=str(tmp_path / "corpus"), validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-9),
        mesh=MeshConfig(fsdp=2),
        steps=7,
        wandb=True,
    )
    write(tmp_path / "run", config)
    assert read_run_config(tmp_path / "run") == config
    assert parse_config([str(tmp_path / "run")]) == config
    longer = parse_config([str(tmp_path / "run"), "--steps", "9", "--model.num-layers=3"])
    model = dataclasses.replace(config.model, num_layers=3)
    assert longer == dataclasses.replace(config, steps=9, model=model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "stepz: expected a setting of Config, .*; did you mean steps?"),
        ({"model": {"depth": {"name": "mhc"}, "width": 3}}, "model.width: expected a setting of"),
        ({"model": {"depth": {"name": "mhc", "window": 3}}}, "model.depth.window: expected a"),
        ({"model": {"depth": {"name": "deep"}}}, "model.depth: expected the settings of one of"),
        ({"optimizer": {"warmup_steps": 2.5}}, "OptimizerConfig.warmup_steps: expected an int"),
        ({"execution": 3}, "execution: expected settings by name, got 3"),
        ({"name": None}, "Config.name: expected a text, got None"),
    ],
)
def test_a_config_from_json_is_strict(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        dataclass_from_json({"name": "run"} | change, Config)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="name: expected a value, got none"):
        dataclass_from_json({}, Config)


def test_settings_younger_than_the_file_have_their_defaults():
    config = dataclass_from_json({"name": "run", "model": {"depth": {"name": "mhc"}}}, Config)
    assert config == Config(name="run", model=ModelConfig(depth=MHCConfig()))


def test_a_folder_is_moved_with_its_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    tokenizer = write_tokenizer(tmp_path / "mine.json", "ab")
    data = DataConfig(source="corpus", tokenizer=tokenizer)
    write(tmp_path / "runs" / "x", Config(name="x", data=data))
    (tmp_path / "runs" / "x").rename(tmp_path / "here" / "y")
    (tmp_path / "mine.json").unlink()
    monkeypatch.chdir(tmp_path / "here")
    config = parse_config(["y"])
    assert (config.name, config.output_dir) == ("y", ".")
    # Given relative to the folder in which the run began.
    assert config.data.source == str(tmp_path / "corpus")
    assert load_tokenizer(config.data.tokenizer).vocab_size == 3
    monkeypatch.chdir(tmp_path / "here" / "y")
    assert parse_config(["."]).name == "y"
    corpus = json.loads((tmp_path / "here" / "y" / CORPUS_FILE).read_text())
    assert [source["fingerprint"] for source in corpus["sources"]] == ["0123"]
    assert parse_config([".", "--data.source", "other"]).data.source == "other"


def test_a_mixture_is_found_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = (
        SourceConfig("a", "a.jsonl", validation="v.txt"),
        SourceConfig("python", "stdlib", weight=2),
    )
    data = DataConfig(source=None, sources=sources)
    write(tmp_path / "runs" / "x", Config(name="x", data=data))
    monkeypatch.chdir("/")
    found = read_run_config(tmp_path / "runs" / "x").data.sources
    assert [(source.path, source.validation) for source in found] == [
        (str(tmp_path / "a.jsonl"), str(tmp_path / "v.txt")),
        ("stdlib", None),
    ]
    assert [source.weight for source in found] == [1, 2]


def test_the_folders_tokenizer_is_the_trained_one_or_an_error(tmp_path):
    path = write_tokenizer(tmp_path / "mine.json", "ab")
    config = Config(name="x", data=DataConfig(tokenizer=path))
    run = tmp_path / "x"
    write(run, config)
    expected = load_tokenizer(path).fingerprint
    write_tokenizer(tmp_path / "mine.json", "ba")  # which is not looked at
    settings = to_json(config.data)
    found = load_folder_tokenizer(run, settings, expected=expected)
    assert found.encode("b") == [1]
    write_tokenizer(run / TOKENIZER_FILE, "ba")  # permuted ids
    with pytest.raises(ValueError, match="expected the tokenizer with which .* got another one"):
        load_folder_tokenizer(run, settings, expected=expected)
    (run / TOKENIZER_FILE).unlink()
    with pytest.raises(ValueError, match="mine.json: expected the tokenizer with which"):
        load_folder_tokenizer(run, settings, expected=expected)
    (tmp_path / "mine.json").unlink()
    with pytest.raises(ValueError, match="DataConfig.tokenizer: .* No such file"):
        load_folder_tokenizer(run, settings, expected=expected)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=f"the folder of a run, with {CONFIG_FILE} in it, got the"):
        parse_config([str(tmp_path)])


def test_a_kill_while_a_file_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    config = Config(name="x", data=DataConfig(source="stdlib"))
    write(tmp_path / "x", config)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "x", dataclasses.replace(config, steps=3))
    assert read_run_config(tmp_path / "x").steps == config.steps


def test_every_setting_has_its_effect_written_down():
    groups = EFFECTS.keys() | REFUSED | PLACE
    for name in flatten(to_json(Config(name="x"))):
        assert len(groups & {name, name.partition(".")[0]}) == 1, name


def test_changed_settings_say_what_they_do():
    config = Config(name="x", steps=100)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-4, warmup_steps=10)
    execution = dataclasses.replace(config.execution, remat="full")
    changed = dataclasses.replace(
        config, name="y", output_dir="elsewhere", optimizer=optimizer, execution=execution, steps=40
    )
    lines = "\n".join(describe_changes(to_json(config), changed, 20))
    for line in (
        r"step 20: optimizer.learning_rate 0.0003 -> 0.0001: .* this step's place on the new curve",
        r"optimizer.warmup_steps 2000 -> 10: ",
        r"steps 100 -> 40: ",
        r"execution.remat auto -> full: the same function, .* other rounding",
        r"learning rate of step 21: 7.\d+e-05, on the old curve 3.150e-06",
    ):
        assert re.search(line, lines), line
    assert "name" not in lines
    assert "output_dir" not in lines
    assert describe_changes(to_json(config), config, 20) == []
    (line,) = describe_changes(to_json(config), changed, 40)
    assert line.startswith("nothing is trained, so the run's settings stay: ")
