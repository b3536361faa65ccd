"""The pictures of a finished run: loss over steps, and where attention looks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def plot_loss(records: Sequence[dict[str, float]], path: Path) -> None:
    """Draws training and validation loss (nats per token) of the records of metrics.jsonl."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1)
            axes.legend()
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_attention_mass(mass: np.ndarray, slot_labels: Sequence[str], path: Path) -> None:
    """Draws the mean attention mass, layers by sequence | depth slots (the idea of Fig. 5).

    Args:
        mass: [L, 1 + S], each row summing to 1. A slot that a layer cannot see has mass 0 and stays
            blank.
        slot_labels: one name per slot, of the mechanism.
        path: the .png file.
    """
    num_layers, num_columns = mass.shape
    has_depth = num_columns > 1
    widths = [1.0, max(2.0, 0.35 * (num_columns - 1))] if has_depth else [1.0]
    figure = Figure(
        figsize=(3 + min(sum(widths), 16), 1.5 + min(0.35 * num_layers + 1, 12)),
        layout="constrained",
    )
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    # Separate colour scales: the sequence's mass would leave all slots in one shade.
    _draw_panel(figure, panels[0], mass[:, :1], ["seq"], vmax=1.0)
    panels[0].set(ylabel="layer", title="sequence")
    if has_depth:
        slots = np.ma.masked_equal(mass[:, 1:], 0.0)
        _draw_panel(figure, panels[1], slots, slot_labels, vmax=None)
        panels[1].set(title="depth slots", xlabel="written by layer (a attention, f FFN)")
    figure.savefig(path, dpi=120)


def _draw_panel(figure, axes, values, labels: Sequence[str], *, vmax: float | None) -> None:
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=vmax)
    every = -(-len(labels) // 32)  # at most 32 labels fit
    axes.set_xticks(range(0, len(labels), every), labels[::every], rotation=90, fontsize=7)
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="attention mass")
