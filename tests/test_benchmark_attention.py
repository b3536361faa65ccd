"""benchmarks/attention.py on a tiny shape, and the report on what it wrote."""

import json
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import attention, report
from benchmarks.shapes import SHAPES, SMOKE

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(*arguments):
        path = tmp_path / "out" / "attention.json"
        monkeypatch.setattr(sys, "argv", ["attention", "--smoke", "--json", str(path), *arguments])
        return attention.main(), path

    return run


def test_smoke_run_and_its_report(run):
    status, path = run("--check")
    assert status == 0
    results = json.loads(path.read_text())
    row = results["rows"][SMOKE.name]
    for variant in ("cudnn", "cudnn + XLA depth", "ours"):
        assert row[variant]["forward"] > 0
        assert row[variant]["total"] > 0
    assert row["check"]["bitwise equal"]
    assert row["check"]["worst ratio"] == pytest.approx(1.0)  # here ours is xla
    assert report.main([str(path)]) == 0
    text = path.with_suffix(".md").read_text()
    assert text.count("| smoke | 1 | 32 | 2 | 2 | 16 | 3 |") == 2
    assert "## Errors" in text
    assert path.with_suffix(".png").stat().st_size > 1000


def test_a_failure_is_reported_and_the_rest_goes_on(run):
    status, path = run("--time-budget", "0")
    assert status == 1
    report.write(path)
    assert "- smoke, all: not measured, the time budget is spent" in (
        path.with_suffix(".md").read_text()
    )


def test_missing_results(tmp_path, capsys):
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "none.json is missing: python -m benchmarks.attention" in capsys.readouterr().err


def test_rows_of_the_picture_say_shapes_and_dtype(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    report.plot(
        json.loads((ROOT / "docs/benchmarks/attention.json").read_text()), tmp_path / "x.png"
    )
    labels = [text.get_text() for text in figures[0].axes[0].get_xticklabels()]
    assert "T16K: 1 × 16384 × 64 × 64\nK 8, S 64, bf16" in labels
    assert "B8: 8 × 4096 × 16 × 64\nK 8, S 36, bf16" in labels


@pytest.mark.parametrize("name", ["attention", "attention_triton"])
def test_the_pages_are_what_the_command_writes(tmp_path, name):
    path = tmp_path / f"{name}.json"
    path.write_text((ROOT / f"docs/benchmarks/{name}.json").read_text())
    report.write(path)
    page = ROOT / f"docs/benchmarks/{name}.md"
    assert path.with_suffix(".md").read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_picture_of_training_steps(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    path = tmp_path / "train_step.json"
    path.write_text((ROOT / "docs/benchmarks/train_step.json").read_text())
    report.write(path)
    speed, memory = ([text.get_text() for text in axes.texts] for axes in figures[0].axes)
    assert speed == ["100.0%", "92.4%", "85.0%", "100.0%", "80.8%"]  # as train_step.md has them
    assert memory == ["54.5", "65.0", "80.7", "12.1", "17.4"]


def test_floor_is_the_rooflines_of_the_design():
    """B=1 T=16384 K=8 H=64 S=64: 0.5 ms of depth traffic; at N=64 the products take longer."""
    shape = SHAPES["T16K"]
    assert shape.depth_bytes == pytest.approx(2.15e9, rel=1e-2)
    no_products = report.floor_ms(shape, 4.3, 1e9, backward=False)
    assert no_products == pytest.approx((2.15e9 + 2 * 2 * 16384 * 64 * 64) / 4.3e9, rel=1e-2)
    forward = report.floor_ms(shape, 4.3, 790, backward=False)
    assert forward == pytest.approx(shape.sequence_flops(backward=False) / 790e9)
    both = report.floor_ms(shape, 4.3, 790, backward=True)
    assert both == pytest.approx(shape.sequence_flops(backward=True) / 790e9)


def test_every_row_of_the_papers_table_is_there():
    lengths = {SHAPES[name].tokens for name in ("T4K", "T8K", "T16K", "T32K", "T64K")}
    assert lengths == {4096, 8192, 16384, 32768, 65536}
    assert {SHAPES[name].group for name in ("G2", "G4", "T16K", "G16", "G32")} == {2, 4, 8, 16, 32}
    assert {SHAPES[name].slots for name in ("T16K", "S128", "S256")} == {64, 128, 256}
