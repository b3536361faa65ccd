"""The pictures as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from moda_jax.visualize.text_attention import TextAttention

_GAP, _DEPTH_WIDTH = 0.04, 0.5  # of the sequence's width
_UNSEEN = "#e4e4e4"


def plot_weights(
    attention: TextAttention, path: Path, *, most_layers: int, most_heads: int
) -> None:
    """Draws sequence | depth heat maps of layers by heads, the boundary marked (Fig. 5).

    One colour scale serves all: the square root of the weight, 0 to 1. What a query cannot see is
    grey. Of more layers or heads than `most_layers` and `most_heads`, evenly spaced ones are drawn.
    """
    rows = spread(len(attention.layers), most_layers)
    columns = spread(len(attention.heads), most_heads)
    width = 1 + bool(attention.slots) * (_GAP + _DEPTH_WIDTH)
    size = (1.4 + 2.1 * width * len(columns), 1.1 + 2.2 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, layer in enumerate(rows):
        for column, head in enumerate(columns):
            axes = panels[row, column]
            image = _draw_panel(axes, attention, layer, head)
            axes.set_title(
                f"layer {attention.layers[layer]}, head {attention.heads[head]}", fontsize=9
            )
            if column == 0:
                axes.set_ylabel("query token", fontsize=8)
            if row == len(rows) - 1:
                label = "key token | depth slot" if attention.slots else "key token"
                axes.set_xlabel(label, fontsize=8)
    bar = figure.colorbar(image, ax=panels, shrink=0.6, aspect=30)
    bar.set_label("attention weight (square-root scale)", fontsize=8)
    bar.set_ticks([0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.ax.tick_params(labelsize=7)
    _title(figure, attention.title)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Axes, attention: TextAttention, layer: int, head: int):
    length = len(attention.tokens)
    weights = attention.weights[layer, head]
    norm = PowerNorm(0.5, vmin=0.0, vmax=1.0)
    future = np.triu(np.ones((length, length), bool), 1)
    axes.set_facecolor(_UNSEEN)
    settings: dict[str, Any] = {"aspect": "auto", "norm": norm, "interpolation": "nearest"}
    sequence = np.ma.masked_array(weights[:, :length], future)
    image = axes.imshow(sequence, extent=(0, 1, length, 0), **settings)
    ticks = range(0, length, _tick_step(length))
    places, labels = [(i + 0.5) / length for i in ticks], [str(i) for i in ticks]
    right = 1.0
    if slots := len(attention.slots):
        unseen = np.broadcast_to(~attention.visible[attention.layers[layer]], (length, slots))
        depth = np.ma.masked_array(weights[:, length:], unseen)
        start, right = 1 + _GAP, 1 + _GAP + _DEPTH_WIDTH
        axes.imshow(depth, extent=(start, right, length, 0), **settings)
        axes.axvspan(1, start, color="white", linewidth=0)
        axes.axvline(1 + _GAP / 2, color="black", linewidth=1.2)
        shown = range(0, slots, -(-slots // 6))
        places += [start + (i + 0.5) / slots * _DEPTH_WIDTH for i in shown]
        labels += [attention.slots[i] for i in shown]
    axes.set_xlim(0, right)
    axes.set_ylim(length, 0)
    axes.set_xticks(places, labels, fontsize=6, rotation=90)
    axes.set_yticks([i + 0.5 for i in ticks], [str(i) for i in ticks], fontsize=6)
    return image


def plot_sink(attention: TextAttention, path: Path) -> None:
    """Draws the mass on the document's first token by layer, with and without the depth part."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    layers = range(len(attention.sink))
    if attention.is_joint:
        axes.plot(layers, attention.sink[:, 1], "s--", label="of the sequence part alone")
        axes.plot(layers, attention.sink[:, 0], "o-", label="of sequence and depth")
        axes.legend()
    else:
        axes.plot(layers, attention.sink[:, 0], "o-")
    axes.set(xlabel="layer", ylabel="mean weight on the first token", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    _title(figure, attention.title)
    figure.savefig(path, dpi=120)


def plot_mass_by_step(
    steps: Sequence[int], mass: np.ndarray, layers: Sequence[int], title: str, path: Path
) -> None:
    """Draws the mass on depth over training: layers by steps, and its mean over the layers.

    Args:
        steps: of the validations, ascending.
        mass: [layers, steps], the share of a layer's attention that goes to depth slots.
        layers: their numbers.
        title: names the run.
        path: the .png file.
    """
    figure = Figure(figsize=(8, 1.6 + 2 + min(0.25 * len(layers), 5)), layout="constrained")
    mean, by_layer = figure.subplots(
        2, 1, sharex=True, height_ratios=[2, max(1.5, min(0.25 * len(layers), 5))]
    )
    mean.plot(steps, mass.mean(axis=0), "o-", markersize=3)
    mean.set(ylabel="mean over layers", ylim=(0, None))
    mean.grid(alpha=0.3)
    edges = _edges(np.asarray(steps, float))
    heights = np.append(np.asarray(layers) - 0.5, layers[-1] + 0.5)
    image = by_layer.pcolormesh(edges, heights, mass, vmin=0.0, vmax=max(float(mass.max()), 1e-6))
    by_layer.set(xlabel="step", ylabel="layer")
    by_layer.invert_yaxis()
    by_layer.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=by_layer, label="mass on depth slots")
    _title(figure, title)
    figure.savefig(path, dpi=120)


def _edges(x: np.ndarray) -> np.ndarray:
    """Of cells around ascending places."""
    if len(x) == 1:
        return np.array([x[0] - 0.5, x[0] + 0.5])
    middles = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middles[0]], middles, [2 * x[-1] - middles[-1]]])


def spread(count: int, most: int) -> list[int]:
    """Evenly spaced places, at most `most`, in 0 … count − 1, the first and the last among them."""
    shown = min(count, most)
    return [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]


def _tick_step(length: int) -> int:
    """Every how many tokens have a number: about six do."""
    for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if length <= 6 * step:
            return step
    return -(-length // 6)


def _title(figure: Figure, text: str) -> None:
    # What the font lacks would be an empty box and a warning.
    known = get_font(findfont(FontProperties())).get_charmap()
    spelled = "".join(
        x if ord(x) in known else x.encode("unicode_escape").decode("ascii") for x in text
    )
    figure.suptitle(spelled.replace("$", r"\$"), fontsize=10)  # a run's name is no mathematics
