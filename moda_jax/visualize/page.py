"""The page: one HTML file with the weights of every chosen layer and head in it.

A weight p in 0 … 1 is one byte, c = round(255 √p), read back as (c/255)²: off by at most
√p/255 + 4e-6, and small weights, of which most are, keep two digits down to 1e-3. A layer's head is
a string of base64: for each query t the t + 1 weights on the tokens up to it, then for each query
those on the depth slots that the layer sees.
"""

import base64
import importlib.resources
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from moda_jax.visualize.text_attention import TextAttention

_TEMPLATE = "page.html"


def quantize(weights: np.ndarray) -> np.ndarray:
    """The bytes of weights in 0 … 1."""
    return np.rint(255 * np.sqrt(np.clip(weights, 0.0, 1.0))).astype(np.uint8)


def dequantize(codes: np.ndarray) -> np.ndarray:
    """The weights, float64, that the page shows for `quantize`'s bytes."""
    return np.square(codes / 255)


def pack(weights_TxJ: np.ndarray, visible_S: np.ndarray) -> str:
    """A layer's head, [T, T + S] in 0 … 1, as the page has it."""
    length = len(weights_TxJ)
    codes = quantize(weights_TxJ)
    parts = codes[:, :length][np.tril_indices(length)], codes[:, length:][:, visible_S].ravel()
    return base64.b64encode(np.concatenate(parts).tobytes()).decode("ascii")


def write_page(attention: TextAttention, path: Path) -> None:
    """Writes the page, which needs no other file and no network."""
    template = importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text("utf-8")
    # "<" could end the script element that holds the data.
    data = json.dumps(page_data(attention), ensure_ascii=False, allow_nan=False).replace(
        "<", "\\u003c"
    )
    path.write_text(template.replace("{{DATA}}", data), encoding="utf-8")


def page_data(attention: TextAttention) -> dict[str, Any]:
    """What the page's script reads."""
    visible = attention.visible
    return {
        "title": attention.title,
        "mechanism": attention.mechanism,
        "joint": attention.is_joint,
        "tokens": attention.tokens,
        "layers": attention.layers,
        "heads": attention.heads,
        "slots": attention.slots,
        "visible": [np.flatnonzero(row).tolist() for row in visible],
        "maps": [
            [pack(head, visible[layer]) for head in maps]
            for layer, maps in zip(attention.layers, attention.weights, strict=True)
        ],
        "mass": _rounded(attention.mass),
        "sink": _rounded(attention.sink),
        "colours": [_hex(colour) for colour in matplotlib.colormaps["viridis"](range(256))],
    }


def _rounded(x: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in x]


def _hex(colour: np.ndarray) -> str:
    return "".join(f"{round(255 * part):02x}" for part in colour[:3])
