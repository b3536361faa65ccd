"""The lists of runs in experiments/, and the command line that reads them."""

import re

import pytest

from moda_jax.cli import DEFAULT_CONFIG
from moda_jax.config import MoDAConfig
from moda_jax.model.flops import count_parameters
from moda_jax.sweep import command
from moda_jax.sweep.experiment import load_experiment

EXPERIMENTS = sorted((DEFAULT_CONFIG.parent.parent / "experiments").glob("*.py"))
LISTS = {path.stem: path for path in EXPERIMENTS if path.stem != "recipe"}


BAD_ARGUMENTS = {
    "no file": ([], "FILE"),
    "no such file": (["none.py"], "experiment file: expected a Python file, got 'none.py'"),
    "unknown option": ([str(LISTS["smoke"]), "--speed"], "--speed"),
    "no share": ([str(LISTS["smoke"]), "--share", "2"], "--share: expected K/N, as 2/4, got '2'"),
    "beyond": ([str(LISTS["smoke"]), "--share", "3/2"], "1 <= K <= N, got 3/2"),
    "no time": ([str(LISTS["smoke"]), "--stop-after", "soon"], "positive number of seconds"),
    "a config": ([str(DEFAULT_CONFIG)], "expected it to define `experiment`"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line(case, capsys):
    arguments, expected = BAD_ARGUMENTS[case]
    assert command.main(arguments) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error


def test_runs_of_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    assert command.main([str(LISTS["smoke"]), "--list"]) == 2
    assert "--share K/N divides the runs among machines" in capsys.readouterr().err


@pytest.mark.parametrize("name", LISTS)
def test_every_list_is_ready_to_run(name, capsys):
    experiment = load_experiment(LISTS[name])
    assert experiment.name == name
    assert command.main([str(LISTS[name]), "--list"]) == 0
    assert f"{len(experiment.runs(''))} runs" in capsys.readouterr().out
    text = LISTS[name].read_text()
    assert f"Command:  moda-jax sweep experiments/{name}.py" in text
    for label, config in experiment.configs.items():
        assert config.optimizer.warmup_steps <= config.steps // 10, label
        assert config.steps % config.eval_every == 0, label


def test_costs_of_the_readme_are_what_the_lists_say(capsys):
    readme = (EXPERIMENTS[0].parent / "README.md").read_text()
    for name in LISTS.keys() - {"smoke"}:
        command.main([str(LISTS[name]), "--list"])
        total = capsys.readouterr().out.splitlines()[-1]
        found = re.match(r"(\d+) runs, ([\d.,]+) M tokens, ([\d.]+) hours", total)
        runs, tokens, hours = found.groups()
        assert f"| [{name}.py]({name}.py) | {runs} | {tokens} | {hours} |" in readme, total


def test_equal_parameters_are_equal_within_a_multiple_of_16():
    for name in ("rivals", "table6", "depth"):
        experiment = load_experiment(LISTS[name])
        for label, config in experiment.configs.items():
            for other in experiment.baselines_of(label):
                equal = "wide" in other or (name == "rivals" and not label.startswith("plain"))
                sizes = [count_parameters(experiment.configs[x].model).total
                         for x in (label, other)]  # fmt: skip
                if equal:
                    assert sizes[0] == pytest.approx(sizes[1], rel=0.006), (label, other)
            assert config.model.mlp_dim % 16 == 0


def test_rows_of_table_6_are_the_papers_but_for_data_and_vocabulary():
    experiment = load_experiment(LISTS["table6"])
    layers = {"row1": 48, "row2": 48, "row3": 48, "row4": 48, "row5": 48, "row6": 48}
    depths = {"row3": MoDAConfig(ffn_kv="none"), "row5": MoDAConfig(), "row9": MoDAConfig()}
    for label, config in experiment.configs.items():
        model = config.model
        if label.endswith("wide"):
            continue
        assert (model.embed_dim, model.num_heads, model.num_kv_heads) == (384, 6, 2)
        assert model.num_layers == layers.get(label, 24)
        assert model.norm_placement == ("pre" if label in ("row1", "row3", "row5") else "post")
        assert model.depth == depths.get(label, model.depth)
        assert config.steps * config.batch_size * 512 == pytest.approx(100e6, rel=0.01)
