"""benchmarks/ablation.py in Triton's interpreter: every step computes the same."""

import json

import jax.numpy as jnp
import pytest
from test_triton import needs_triton

from benchmarks import ablation
from benchmarks.ablation_steps import STEPS
from benchmarks.shapes import SMOKE


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Nothing is run over and over to be timed: the interpreter is slow."""
    monkeypatch.setattr(ablation, "milliseconds", lambda function, *arguments: 3.0)


@needs_triton
def test_smoke_run(tmp_path):
    path = tmp_path / "out" / "ablation.json"
    assert ablation.main(["--smoke", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert list(results["steps"]) == list(STEPS)
    for name, row in results["steps"].items():
        assert 0 < row["error"] < 2e-3, name  # float16
        assert row["total"] == 3.0, name
    text = path.with_suffix(".md").read_text()
    assert "| flash-compatible | " in text
    assert " 2129 |  |\n" in text


@needs_triton
def test_a_failing_step_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(arrays, d_out):
        raise RuntimeError("no such kernel")

    step = STEPS["naive loop"]._replace(run=fails)
    monkeypatch.setitem(ablation.STEPS, "naive loop", step)
    path = tmp_path / "ablation.json"
    arguments = ["--smoke", "--steps", "naive loop,as shipped", "--json", str(path)]
    assert ablation.main(arguments) == 1
    assert "| naive loop |  |  |  | RuntimeError: no such kernel |" in (
        path.with_suffix(".md").read_text()
    )
    assert json.loads(path.read_text())["steps"]["as shipped"]["total"] == 3.0


def test_gains_are_over_the_step_before():
    steps = {
        "naive loop": {"forward": 40.0, "total": 100.0, "error": 1e-3},
        "flash-compatible": {"error message": "RuntimeError"},
        "chunk-aware": {"forward": 3.0, "total": 8.0, "error": 1e-3},
    }
    lines = ablation.table({"steps": steps}).splitlines()
    assert lines[2] == "| naive loop | 40 | 100 |  | 1.0e-03 | 2129 |  |"
    assert lines[4] == "| chunk-aware | 3 | 8 | 12.50 | 1.0e-03 | 6.286 | 2.08 |"


def test_unknown_steps_are_named(capsys):
    with pytest.raises(SystemExit):
        ablation.main(["--steps", "fast"])
    assert "--steps: expected some of naive loop, flash-compatible" in capsys.readouterr().err


def test_flat_axis_and_back():
    from benchmarks.ablation_steps import flatten, unflatten

    x = jnp.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    flat = flatten(x)
    assert flat.shape == (3, 8, 5, 6)
    assert (flat[1, 2 * 2 + 1] == x[1, 1, 2]).all()  # token 2, slot 1
    assert (unflatten(flat, 2) == x).all()
    assert SMOKE.slots == 3
