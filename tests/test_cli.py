"""The command line: overrides reach the config, bad input ends in one line and status 2."""

import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from moda_jax import cli
from moda_jax.config import Config, DenseConfig, ExecutionConfig, MHCConfig, MoDAConfig
from moda_jax.train.errors import DivergenceError, SaveError

REPOSITORY = Path(cli.DEFAULT_CONFIG).parent.parent


@pytest.fixture
def train_with(monkeypatch):
    """Replaces the trainer by a function, so that only the command line is under test."""

    def install(function):
        trainer = types.ModuleType("moda_jax.train.trainer")
        trainer.train = lambda config, clock: function(config)
        monkeypatch.setitem(sys.modules, "moda_jax.train.trainer", trainer)

    return install


@pytest.fixture
def trained(train_with) -> list[Config]:
    """The configs that `train` was called with."""
    configs: list[Config] = []

    def train(config: Config) -> types.SimpleNamespace:
        configs.append(config)
        return types.SimpleNamespace(finished=True)

    train_with(train)
    return configs


@pytest.fixture
def write_config(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(text)
        return str(path)

    return write


def test_default_config_is_tiny(trained):
    assert cli.main([]) == 0
    assert trained == [cli.load_config(REPOSITORY / "configs" / "tiny.py")]


@pytest.mark.parametrize("flag", ["--model.num-layers", "--model.num_layers"])
@pytest.mark.parametrize("joined", [False, True])
def test_override_by_dotted_name(trained, flag, joined):
    assert cli.main([f"{flag}=3"] if joined else [flag, "3"]) == 0
    tiny = cli.load_config(cli.DEFAULT_CONFIG)
    assert trained[0].model == dataclasses.replace(tiny.model, num_layers=3)
    assert dataclasses.replace(trained[0], model=tiny.model) == tiny


def test_config_file_and_overrides_of_every_kind(trained, write_config):
    path = write_config(
        "from moda_jax.config import Config, MoDAConfig, ModelConfig\n"
        "model = ModelConfig(depth=MoDAConfig(window=2))\n"
        "config = Config(name='mine', model=model, steps=7)\n"
    )
    overrides = ["--model.depth.window", "None", "--optimizer.learning-rate", "1e-4", "--wandb"]
    assert cli.main([path, *overrides, "--data.source", "a folder"]) == 0
    config = trained[0]
    assert (config.name, config.steps, config.wandb) == ("mine", 7, True)
    assert config.model.depth == MoDAConfig()
    assert config.optimizer.learning_rate == 1e-4
    assert config.data.source == "a folder"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--model.depth", "dense", "--model.depth.form", "matrix"], DenseConfig(form="matrix")),
        (["--model.depth.num-streams=2", "--model.depth=mhc"], MHCConfig(num_streams=2)),
        (
            ["--model.depth", "moda", "--model.depth.reserved", "1"],
            MoDAConfig(window=3, reserved=1),
        ),
        (["--model.depth.ffn-kv", "none"], MoDAConfig(ffn_kv="none", window=3)),
    ],
)
def test_another_way_of_using_depth(trained, write_config, overrides, expected):
    """Its settings begin with their defaults; those of the file's own mechanism stay."""
    path = write_config(
        "from moda_jax.config import Config, MoDAConfig, ModelConfig\n"
        "config = Config(name='mine', model=ModelConfig(depth=MoDAConfig(window=3)))\n"
    )
    assert cli.main([path, *overrides]) == 0
    assert trained[0].model.depth == expected


def test_execution(trained):
    overrides = ["--execution.remat", "full", "--execution.slot-gradient-block", "2"]
    assert cli.main(overrides) == 0
    assert trained[0].execution == ExecutionConfig(remat="full", slot_gradient_block=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tiny_dense", "--steps", "3", "--wandb"],
        ["--steps", "3", "--wandb", str(REPOSITORY / "configs" / "tiny_dense.py")],
        ["--wandb", "tiny_dense.py", "--steps=3"],
        ["--config", "tiny_dense", "--steps", "3", "--wandb"],
        ["--no-wandb", "--config=tiny_dense", "--wandb", "--steps", "3"],
    ],
    ids=" ".join,
)
def test_the_config_may_stand_anywhere_and_be_a_name(trained, arguments):
    assert cli.main(arguments) == 0
    dense = cli.load_config(REPOSITORY / "configs" / "tiny_dense.py")
    assert trained == [dataclasses.replace(dense, steps=3, wandb=True)]


def test_forms_that_people_try(trained, monkeypatch):
    arguments = ["--lr", "1e-4", "--model.depth.window", "none", "--model.qk_norm", "none"]
    assert cli.main([*arguments, "--data.eos-token=NONE", "--seed", "7"]) == 0
    config = trained[0]
    assert config.optimizer.learning_rate == 1e-4
    assert config.model.depth.window is None
    assert config.data.eos_token is None
    assert config.model.qk_norm == "none"
    monkeypatch.setattr(sys, "argv", ["moda-jax", "train", "--seed", "7", "table6/row2"])
    assert cli.command() == 0
    assert trained[1].seed == 7
    assert trained[1].name == cli.load_config(REPOSITORY / "configs/table6/row2.py").name


@pytest.mark.parametrize("arguments", [[], ["tiny"]])
def test_the_command_without_a_subcommand_says_its_usage(trained, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["moda-jax", *arguments])
    assert cli.command() == 2
    expected = "usage: moda-jax COMMAND, one of train, prepare, sweep"
    assert capsys.readouterr().err.startswith(expected)
    assert not trained


BAD_ARGUMENTS = {
    "unknown option": (["--model.num-layrs", "4"], "--model.num-layrs", "--model.num-layers?"),
    "unknown group": (["--modle.num-heads=4"], "--modle.num-heads=4"),
    "not a number": (["--steps", "many"], "--steps", "'many'"),
    "not a choice": (["--model.qk-norm", "layer"], "--model.qk-norm", "'full'", "'layer'"),
    "no value": (["--steps"], "--steps", "value"),
    "no such mechanism": (["--model.depth", "deep"], "--model.depth: expected one of", "'deep'"),
    "no mechanism": (["--model.depth"], "--model.depth: expected one of", "''"),
    "another mechanism's": (["--model.depth", "mhc", "--model.depth.window", "2"], "depth.window"),
    "refused by one field": (["--model.num-layers", "0"], "ModelConfig.num_layers", "got 0"),
    "refused by two fields": (
        ["--model.num-heads", "3"],
        "ModelConfig.num_heads",
        "num_kv_heads = 2",
        "got 3",
    ),
    "refused across groups": (
        ["--batch-size", "9", "--mesh.data", "2"],
        "Config.batch_size",
        "mesh.data",
        "got 9",
    ),
    "a misplaced config": (["--steps", "3", "other.py"], "other.py"),
    "no such config": (["configs/none.py"], "config file", "configs/none.py", "not found"),
    "no such name": (["tinny"], "or one of ", "tiny_moda", "'tinny' (not found)"),
    "two configs": (["tiny", "--steps", "3", "tiny_moda"], "one config, got 'tiny' and 'tiny_mod"),
    "a dash too many": (["--model.depth-window", "none"], "did you mean --model.depth.window?"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line_that_names_the_field(case, trained, capsys):
    arguments, *expected = BAD_ARGUMENTS[case]
    assert cli.main(arguments) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert not trained
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for text in expected:
        assert text in error
    assert "│" not in error


BAD_FILES = {
    "no config": ("x = 1\n", "expected it to define `config`", "got NoneType"),
    "wrong type": ("config = {'name': 'x'}\n", "expected it to define `config`", "got dict"),
    "syntax": ("config = (\n", "SyntaxError"),
    "import": ("import no_such_module\n", "ModuleNotFoundError", "no_such_module"),
    "bad value": (
        "from moda_jax.config import Config\nconfig = Config(name='x', steps=0)\n",
        "Config.steps",
        "got 0",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_config_file_is_one_line_that_names_it(case, trained, write_config, capsys):
    text, *expected = BAD_FILES[case]
    path = write_config(text)
    assert cli.main([path]) == 2
    error = capsys.readouterr().err
    assert not trained
    assert error.startswith("error: config file")
    assert error.count("\n") == 1
    for part in [path, *expected]:
        assert part in error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("DataConfig.source: expected a folder,\n  got 'nowhere'"),
        NotImplementedError("attention 'triton' cannot do this call"),
        FileNotFoundError("no such file: tokenizer.json"),
        MemoryError("out of memory on cpu (cpu): the run asked for 1.0 GiB"),
    ],
)
def test_errors_of_setting_up_a_run_are_one_line(error, train_with, capsys, monkeypatch):
    def fail(config: Config) -> None:
        raise error

    monkeypatch.delenv("MODA_JAX_TRACEBACK", raising=False)
    train_with(fail)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"

    monkeypatch.setenv("MODA_JAX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main([])


@pytest.mark.parametrize(
    ("error", "status"),
    [(DivergenceError("loss is nan"), 3), (SaveError("disk full"), 74), (ValueError("bad"), 2)],
)
def test_exit_statuses_of_runs_that_fail(error, status, train_with):
    def fail(config: Config) -> None:
        raise error

    train_with(fail)
    assert cli.main([]) == status


@pytest.mark.parametrize(("finished", "status"), [(True, 0), (False, 75)])
def test_exit_statuses_of_runs_that_end(finished, status, train_with):
    train_with(lambda config: types.SimpleNamespace(finished=finished))
    assert cli.main([]) == status


def test_errors_of_the_program_keep_their_traceback(train_with):
    def fail(config: Config) -> None:
        raise TypeError("a bug")

    train_with(fail)
    with pytest.raises(TypeError, match="a bug"):
        cli.main([])


def test_interrupt_before_training_ends_quietly(train_with, capsys):
    def interrupt(config: Config) -> None:
        raise KeyboardInterrupt

    train_with(interrupt)
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_interrupt_while_a_command_is_imported_ends_quietly(monkeypatch, capsys):
    def interrupt(module):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupt)
    monkeypatch.setattr(sys, "argv", ["moda-jax", "eval", "run"])
    assert cli.command() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_mistyped_option_does_not_wait_for_jax():
    program = (
        "import sys; from moda_jax.cli import command; sys.argv[1:] = sys.argv[1].split(); "
        "status = command(); assert 'jax' not in sys.modules; sys.exit(status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "eval run --tsks piqa"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr


def run_train_py(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *arguments],
        cwd=folder,
        env=os.environ | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_is_a_screen_of_the_settings_of_most_runs(capsys, write_config):
    path = write_config("from configs.tiny_moda import config\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--lr", "1", "--help", path])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert 50 < shown.count("\n") <= 65
    for text in ("--steps INT [200]", "--wandb", "--model.depth NAME [moda]", "--help-all"):
        assert text in shown


def test_output_that_nobody_reads_ends_quietly(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(REPOSITORY / "train.py"), "--help-all"]
    result = subprocess.run(
        command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def test_help_all_from_another_folder_shows_every_field_with_its_default(tmp_path):
    result = run_train_py("--help-all", folder=tmp_path)
    assert result.returncode == 0
    assert "[CONFIG]" in result.stdout
    for text in ("--model.num-layers INT", "--mesh.fsdp INT", "(default: tiny)"):
        assert text in result.stdout
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in result.stdout


def test_bad_value_in_a_process_of_its_own_has_no_traceback(tmp_path):
    result = run_train_py("--model.num-kv-heads", "3", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "error: ModelConfig.num_heads: expected a multiple of num_kv_heads = 3, got 4\n"
    )
    assert result.stdout == ""
