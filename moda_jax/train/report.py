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
        mass: [L, 1 + S], S > 0, each row summing to 1. A slot that a layer cannot see has mass 0
            and stays blank.
        slot_labels: one name per slot, of the mechanism.
        path: the .png file.
    """
    num_layers, num_columns = mass.shape
    width, height = min(0.35 * num_columns, 9) + 4, min(0.35 * num_layers, 6) + 2
    figure = Figure(figsize=(width, height), layout="constrained")
    # Every panel and every colour bar has a column of its own, so all are equally high.
    sequence, sequence_bar, depth, depth_bar = figure.subplots(
        1, 4, width_ratios=[0.5, 0.2, width - 4, 0.2]
    )
    image = sequence.imshow(mass[:, :1], aspect="auto", vmin=0.0, vmax=1.0)
    figure.colorbar(image, cax=sequence_bar)
    sequence.set(ylabel="layer", title="sequence", xticks=[])
    slots = np.ma.masked_equal(mass[:, 1:], 0.0)
    highest = _usual_highest(slots)
    image = depth.imshow(slots, aspect="auto", vmin=0.0, vmax=highest)
    beyond = "max" if slots.max() > highest else "neither"
    figure.colorbar(image, cax=depth_bar, label="attention mass", extend=beyond)
    depth.set(title="depth slots (own scale)", xlabel="written by layer (a attention, f FFN)")
    shown = range(0, len(slot_labels), _label_step(slot_labels))
    depth.set_xticks(shown, [slot_labels[i] for i in shown], rotation=90, fontsize=8)
    for panel in (sequence, depth):
        panel.yaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)


def _usual_highest(slots: np.ma.MaskedArray) -> float:
    """The highest mass of all slots but the strongest tenth: one slot must not darken the others.

    The first slots are the only ones that the first layers see. Of fewer than five slots, of all.
    """
    by_slot = slots.max(axis=0).filled(0.0)
    return float(np.percentile(by_slot, 90 if len(by_slot) > 4 else 100, method="lower"))


def _label_step(labels: Sequence[str]) -> int:
    """Every how many slots have a label: whole layers, at most 24 labels."""
    per_layer = len(labels) // len({label.rstrip("af") for label in labels})
    return per_layer * -(-len(labels) // (24 * per_layer)) if len(labels) > 24 else 1
