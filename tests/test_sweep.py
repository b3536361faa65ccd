"""Experiments, shares, results, statistics and tables, by hand; no run."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from moda_jax.config import Config, ModelConfig, OptimizerConfig, ResidualConfig
from moda_jax.model.flops import count_flops, count_parameters
from moda_jax.sweep import Experiment
from moda_jax.sweep.experiment import share_of
from moda_jax.sweep.page import PAGE, PLOT, write_page
from moda_jax.sweep.results import (
    Result,
    changed_settings,
    read_result,
    result_path,
    settings_of,
    summarize,
    summarize_folder,
    thin,
    write_result,
)
from moda_jax.sweep.statistics import Difference, deviation, difference, loss_at
from moda_jax.sweep.table import compare, make_rows, markdown, read_results

PLAIN = Config(name="x", model=ModelConfig(depth=ResidualConfig()), steps=100, batch_size=2)
MODA = dataclasses.replace(PLAIN, model=ModelConfig())


def make_experiment(**changes) -> Experiment:
    fields = {
        "name": "two",
        "title": "Two models",
        "configs": {"plain": PLAIN, "moda": MODA},
        "seeds": (0, 1, 2),
        "baseline": "plain",
        "paper": {"plain": 3.5, "moda": 3.4},
    }
    return Experiment(**fields | changes)


def test_runs_are_whole_comparisons_first():
    runs = make_experiment(seeds={"plain": (3, 1), "moda": (2,)}).runs("out")
    assert [run.name for run in runs] == ["plain_seed3", "moda_seed2", "plain_seed1"]
    config = runs[1].config
    assert (config.name, config.seed, config.output_dir) == ("moda_seed2", 2, "out/two")
    assert dataclasses.replace(config, name="x", seed=0, output_dir="runs") == MODA
    assert runs[1].tokens == 100 * 2 * 256
    per_token = count_flops(MODA.model, 256).train_per_token
    assert runs[1].flops == pytest.approx(100 * 2 * 256 * per_token)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "Experiment.name: expected letters, digits"),
        ({"configs": {}}, "Experiment.configs: expected at least one config"),
        ({"configs": {"a b": PLAIN}}, "Experiment.configs: expected letters, .* got 'a b'"),
        ({"configs": {"a": 3}}, "Experiment.configs: expected values of type Config, got 3"),
        ({"seeds": (1, 1)}, r"Experiment.seeds: expected different seeds.*got \(1, 1\)"),
        ({"seeds": {"plain": (1,)}}, r"Experiment.seeds: .* for 'moda', got \(\)"),
        ({"seeds": {"plain": (1,), "x": (1,)}}, "Experiment.seeds: expected labels among .*'x'"),
        ({"baseline": "x"}, "Experiment.baseline: expected labels among plain, moda, got 'x'"),
        ({"baseline": {"moda": ("plain", "x")}}, "Experiment.baseline: expected labels"),
        ({"paper": {"x": 1.0}}, "Experiment.paper: expected labels"),
    ],
)
def test_a_bad_experiment_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_experiment(**changes)
    assert "\n" not in str(caught.value)


def test_baselines():
    assert make_experiment().baselines_of("moda") == ("plain",)
    assert make_experiment().baselines_of("plain") == ()
    several = make_experiment(baseline={"moda": ("plain", "moda")})
    assert several.baselines_of("moda") == ("plain", "moda")
    assert make_experiment(baseline=None).baselines_of("moda") == ()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_shares_are_all_runs_once_in_order_and_about_equal(count):
    configs = {f"s{n}": dataclasses.replace(PLAIN, steps=1 + n * n % 47) for n in range(25)}
    runs = make_experiment(configs=configs, baseline=None, paper={}).runs("out")
    shares = [share_of(runs, number, count) for number in range(1, count + 1)]
    assert sorted(run.name for share in shares for run in share) == sorted(r.name for r in runs)
    places = {run.name: place for place, run in enumerate(runs)}
    for share in shares:
        assert [places[run.name] for run in share] == sorted(places[run.name] for run in share)
    costs = [sum(run.flops for run in share) for share in shares]
    assert max(costs) - min(costs) <= max(run.flops for run in runs)


def test_the_costliest_runs_go_to_different_shares():
    configs = {f"s{steps}": dataclasses.replace(PLAIN, steps=steps) for steps in (10, 70, 30, 50)}
    runs = make_experiment(configs=configs, seeds=(0,), baseline=None, paper={}).runs("out")
    # 70; 50; 30 to the 50; 10 to the 70.
    assert [[run.label for run in share_of(runs, k, 2)] for k in (1, 2)] == [
        ["s10", "s70"],
        ["s30", "s50"],
    ]
    assert share_of(runs, 6, 9) == []


@pytest.mark.parametrize("share", [(0, 2), (3, 2)])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match="--share: expected K/N with 1 <= K <= N, got"):
        share_of([], *share)


RECORDS = [
    {"step": 10, "loss": 5.0, "targets": 500.0},
    {"step": 20, "loss": 4.0, "targets": 510.0, "tokens_per_second": 100.0},
    {"step": 20, "validation_loss": 4.5, "validation_loss/books": 5.0},
    {"step": 30, "loss": 3.0, "targets": 490.0, "tokens_per_second": 300.0},
    {"step": 40, "loss": 2.0, "targets": 500.0, "tokens_per_second": 200.0},
    {"step": 40, "validation_loss": 4.0},
    {"step": 40, "final_validation_loss": 4.25, "final_validation_loss/books": 4.75,
     "final_validation_loss/code": 3.75, "final_validation_perplexity": 70.0},
]  # fmt: skip


def test_what_follows_from_the_metrics():
    run = make_experiment().runs("out")[1]
    fields = summarize(run, RECORDS)
    assert fields["steps"] == 40
    assert fields["validation_loss"] == 4.25
    assert fields["best_validation_loss"] == 4.0
    assert fields["source_losses"] == {"books": 4.75, "code": 3.75}
    assert fields["tokens"] == 40 * 500.0
    assert fields["tokens_per_second"] == 200.0
    assert fields["seconds"] == 100.0
    assert fields["loss_curve"] == [(10.0, 5.0), (20.0, 4.0), (30.0, 3.0), (40.0, 2.0)]
    assert fields["validation_curve"] == [(20, 4.5), (40, 4.0)]
    assert fields["parameters"] == count_parameters(MODA.model).total
    assert fields["settings"]["model.depth.name"] == "moda"
    empty = summarize(run, [])
    assert (empty["tokens"], empty["seconds"], empty["validation_loss"]) == (0.0, None, None)


@pytest.mark.parametrize(
    ("corpus", "expected"),
    [
        ({"fingerprint": "ab"}, "ab"),
        ({"sources": [{"fingerprint": "ab"}, {"fingerprint": "cd"}]}, "ab cd"),
        ({}, None),
    ],
)
def test_what_follows_from_a_runs_folder(tmp_path, corpus, expected):
    run = make_experiment().runs(str(tmp_path))[1]
    folder = tmp_path / "two" / "moda_seed0"
    folder.mkdir(parents=True)
    lines = [json.dumps(record) for record in RECORDS]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 41, "lo']))
    (folder / "corpus.json").write_text(json.dumps(corpus))
    assert summarize_folder(run) == summarize(run, RECORDS) | {"corpus": expected}
    (folder / "corpus.json").unlink()
    assert summarize_folder(run)["corpus"] is None


@pytest.mark.parametrize(("count", "size", "parts"), [(0, 1, 0), (7, 1, 7), (100, 1, 100),
                                                      (101, 2, 51), (250, 3, 84)])  # fmt: skip
def test_a_curve_is_thinned_by_means(count, size, parts):
    curve = thin([(float(x), 2.0 * x) for x in range(count)], 100)
    assert len(curve) == parts
    if count:
        assert curve[0] == ((size - 1) / 2, size - 1.0)
        assert curve[-1][0] <= count - 1


def finished(label, seed, loss, **changes):
    config = {"plain": PLAIN, "moda": MODA}[label]
    fields = {
        "label": label,
        "seed": seed,
        "status": "finished",
        "steps": 100,
        "settings": settings_of(dataclasses.replace(config, seed=seed)),
        "validation_loss": loss,
        "tokens": 1000.0,
        "seconds": 50.0,
        "tokens_per_second": 20.0,
        "validation_curve": [(50, loss + 1.0), (100, loss + 0.1)],
    }
    return Result(**fields | changes)


def test_a_result_goes_through_its_file_and_a_failure_hides_no_result(tmp_path):
    path = tmp_path / "results" / "plain_seed0.json"
    assert read_result(path) is None
    failed = Result(label="plain", seed=0, status="failed", message="out of memory")
    write_result(path, failed)
    assert read_result(path) == failed
    result = finished("plain", 0, 3.5, source_losses={"books": 3.0})
    write_result(path, result)
    write_result(path, failed)
    assert read_result(path) == result
    assert len(path.read_text().splitlines()) == 2 + len(json.loads(path.read_text()))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for damaged in ("{", "[]", '{"label": 3}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=f"{path.name}: expected the result of a run, got a"):
            read_result(path)


def test_a_result_of_other_settings_is_none_of_the_experiments(tmp_path):
    result = finished("plain", 0, 3.5)
    assert changed_settings(result, dataclasses.replace(PLAIN, wandb=True, output_dir="y")) == []
    optimizer = OptimizerConfig(learning_rate=1e-3)
    other = dataclasses.replace(PLAIN, optimizer=optimizer, steps=7)
    changes = ["optimizer.learning_rate 0.0003 -> 0.001", "steps 100 -> 7"]
    assert changed_settings(result, other) == changes
    old = {name: x for name, x in result.settings.items() if name != "optimizer.schedule"}
    assert changed_settings(dataclasses.replace(result, settings=old), PLAIN) == []
    gone = dataclasses.replace(result, settings=old | {"gone": 3})
    assert "gone 3 -> None" in changed_settings(gone, PLAIN)
    experiment = make_experiment(configs={"plain": other, "moda": MODA})
    write_result(result_path(tmp_path, experiment.runs("")[0]), result)
    results = read_results(experiment, tmp_path)
    assert results.by_run == {}
    assert re.search(r"plain_seed0.json: expected .* steps 100 -> 7\); remove", results.notes[0])


def test_deviation_and_differences_by_hand():
    assert deviation([1.0]) is None
    assert deviation([1.0, 2.0, 3.0]) == 1.0
    # Differences −0.1, −0.2, −0.3: mean −0.2, sd 0.1.
    paired = difference({0: 2.9, 1: 3.8, 2: 4.7, 9: 0.0}, {0: 3.0, 1: 4.0, 2: 5.0, 7: 1.0})
    assert paired == Difference(pytest.approx(-0.2), pytest.approx(0.1 / math.sqrt(3)), 3)
    assert difference({0: 2.0}, {0: 2.5}) == Difference(-0.5, None, 1)
    # Means 2 and 4, variances 2 and 8 over two each: √(2/2 + 8/2).
    welch = difference({0: 1.0, 1: 3.0}, {2: 2.0, 3: 6.0})
    assert welch == Difference(-2.0, pytest.approx(math.sqrt(5)), 0)
    assert difference({0: 1.0}, {2: 2.0, 3: 6.0}) == Difference(-3.0, None, 0)
    assert difference({}, {0: 1.0}) is None


def test_the_loss_at_a_time_by_hand():
    result = finished("moda", 0, 3.5)  # 100 steps in 50 s; 4.5 at step 50, 3.6 at step 100
    assert loss_at(result, 60.0) == loss_at(result, 50.0) == 3.5
    assert loss_at(result, 25.0) == pytest.approx(4.5 - 0.1)  # shifted by 3.5 − 3.6
    assert loss_at(result, 37.5) == pytest.approx((4.5 + 3.6) / 2 - 0.1)
    assert loss_at(result, 24.0) is None
    assert loss_at(dataclasses.replace(result, seconds=None), 60.0) is None


def results_by_hand(experiment):
    plain = [finished("plain", seed, loss, peak_memory_bytes=2**30)
             for seed, loss in enumerate((3.0, 4.0, 5.0))]  # fmt: skip
    moda = [
        finished("moda", seed, loss, seconds=100.0, tokens_per_second=10.0,
                 source_losses={"books": loss + 1})
        for seed, loss in enumerate((2.9, 3.8))
    ]  # fmt: skip
    diverged = {"status": "diverged", "steps": 7, "message": "nan", "validation_loss": None}
    moda.append(finished("moda", 2, 0.0, **diverged))
    return {run.name: {"plain": plain, "moda": moda}[run.label][run.seed]
            for run in experiment.runs("")}  # fmt: skip


def test_the_tables_by_hand():
    experiment = make_experiment()
    results = results_by_hand(experiment)
    text = markdown(make_rows(experiment, results), compare(experiment, results))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    size = [f"{count_parameters(c.model).total / 1e6:.2f} M" for c in (PLAIN, MODA)]
    cost = [f"{count_flops(c.model, 256).train_per_token / 1e9:.3f}" for c in (PLAIN, MODA)]
    assert lines == [
        "| run | parameters | GFLOP/token | loss | spread | n | loss: books | tokens/s "
        "| peak memory | paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| `plain` | {size[0]} | {cost[0]} | 4.0000 | 1.0000 | 3 | – | 20 | 1.0 GiB | 3.5000 |",
        f"| `moda` | {size[1]} | {cost[1]} | 3.3500 | 0.6364 | 2; seed 2 diverged at step 7 "
        "| 4.3500 | 10 | – | 3.4000 |",
        "| run | compared with | parameters | difference | pairs | at its time "
        "| paper's difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        # Differences −0.1 and −0.2; at 50 of 100 s the curve is at its loss + 1 − 0.1.
        "| `moda` | `plain` | +6.92% | −0.1500 ± 0.0500 | 2 | 4.2500 beside 3.5000 | −0.1000 |",
    ]


def test_the_page_says_what_is_missing(tmp_path):
    experiment = make_experiment()
    for name, result in results_by_hand(experiment).items():
        write_result(tmp_path / f"{name}.json", result)
    (tmp_path / "plain_seed1.json").unlink()
    failed = Result(label="plain", seed=2, status="failed", message="out of memory")
    (tmp_path / "plain_seed2.json").unlink()
    write_result(tmp_path / "plain_seed2.json", failed)
    table = write_page(experiment, Path("experiments/two.py"), tmp_path)
    page = (tmp_path / PAGE).read_text()
    assert table in page
    assert page.startswith("# Two models\n\n`moda-jax sweep experiments/two.py` made")
    assert "Not run: `plain_seed1`." in page
    assert "Failed: `plain_seed2` (out of memory)." in page
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_page_of_no_results(tmp_path):
    write_page(make_experiment(), Path("two.py"), tmp_path)
    assert not (tmp_path / PLOT).exists()
    assert "plain_seed0" in (tmp_path / PAGE).read_text()
