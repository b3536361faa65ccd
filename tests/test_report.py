"""The plots: they are written, and they show what they should."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from moda_jax.config import DEPTH_CONFIGS, MoDAConfig, ModelConfig
from moda_jax.depth import make_mechanism
from moda_jax.train import report


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved during the test."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))
    )
    return saved


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_plot_loss(tmp_path, figures):
    records = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.0},
        {"step": 2, "validation_loss": 4.5},
    ]
    report.plot_loss(records, tmp_path / "loss.png")
    assert is_png(tmp_path / "loss.png")
    training, validation = figures[0].axes[0].lines
    np.testing.assert_array_equal(training.get_xydata(), [[1, 5], [2, 4]])
    np.testing.assert_array_equal(validation.get_xydata(), [[2, 4.5]])


def test_plot_loss_without_records(tmp_path):
    report.plot_loss([], tmp_path / "loss.png")
    assert is_png(tmp_path / "loss.png")


def slot_labels(num_layers, depth):
    return make_mechanism(ModelConfig(num_layers=num_layers, depth=depth)).slot_labels()


def test_slot_labels():
    assert slot_labels(3, MoDAConfig()) == ["0a", "0f", "1a", "1f"]
    assert slot_labels(5, MoDAConfig(ffn_kv="none", write_every=2)) == ["0", "2"]
    for name, cls in DEPTH_CONFIGS.items():
        assert bool(slot_labels(3, cls())) == (name == "moda")


def test_plot_attention_mass_leaves_unseen_slots_blank(tmp_path, figures):
    mass = np.array([[1, 0, 0, 0, 0], [0.5, 0.2, 0.3, 0, 0], [0.4, 0.1, 0.1, 0.2, 0.2]])
    report.plot_attention_mass(mass, slot_labels(3, MoDAConfig()), tmp_path / "mass.png")
    assert is_png(tmp_path / "mass.png")
    sequence, depth = (figures[0].axes[i].images[0].get_array() for i in (0, 2))
    np.testing.assert_array_equal(sequence, mass[:, :1])
    np.testing.assert_array_equal(np.ma.getmaskarray(depth), mass[:, 1:] == 0)
    assert figures[0].axes[2].images[0].get_clim() == (0, 0.3)


@pytest.fixture
def deep(tmp_path, figures):
    """The figure of 48 layers, all of which look at the first slot most."""
    mass = np.tril(np.full((48, 95), 1 / 95), -1)[:, :95]
    mass[1:, 1] = 0.4
    report.plot_attention_mass(mass, slot_labels(48, MoDAConfig()), tmp_path / "mass.png")
    return figures[0]


def test_panels_and_scales_are_equally_high(deep):
    heights = [axes.get_window_extent().height for axes in deep.axes[:3]]
    np.testing.assert_allclose(heights, heights[0], rtol=0.01)
    assert "own scale" in deep.axes[2].get_title()


def test_one_early_slot_does_not_set_the_range(deep):
    assert deep.axes[2].images[0].get_clim() == (0, 1 / 95)
    assert deep.axes[2].images[0].colorbar.extend == "max"  # the legend says that some lie beyond


def test_labels_of_many_slots_do_not_touch(deep):
    assert max(deep.get_size_inches()) < 14
    labels = [text for text in deep.axes[2].get_xticklabels() if text.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    assert 12 <= len(labels) <= 24
    assert all(a.x1 + 3 < b.x0 for a, b in itertools.pairwise(boxes))
    assert all(label.get_text().endswith("a") for label in labels)
