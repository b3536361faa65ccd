# ruff: noqa: E741 -- l is a layer, as in the papers
"""Writes the test vectors of numpy_model.py, one .npz a case, beside this file.

Each file holds: config (JSON), param/<name> (float32), tokens, segments, positions (int32),
cotangent (float32, zero on padding), logits (float64), and derivative/<name>: the derivative of
sum(cotangent * logits) along the direction cos(1 + arange(size)).reshape(shape) of that parameter,
by complex step. What stands at padding tokens of the logits means nothing.
"""

import json
import pathlib

import numpy as np
from numpy_model import forward, writers

BASE = {
    "V": 11,
    "D": 16,
    "L": 4,
    "N": 4,
    "K": 2,
    "H": 4,
    "F": 20,
    "eps": 1e-2,
    "theta": 50.0,
    "bias": False,
}
QK_NORM = {"pre": "head", "post": "none", "reordered": "full"}
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]], np.int32)
STEP = 1e-30
FIRST_SEED = 500  # a draw in which no case is very sensitive to rounding


def cases():
    """Name and config of every case."""
    table = {}

    def add(name, mechanism, placement, **settings):
        config = dict(BASE, mechanism=mechanism, placement=placement, qk_norm=QK_NORM[placement])
        table[f"{name}_{placement}"] = dict(config, **settings)

    def moda(row, **settings):
        return dict({"row": row, "every": 1, "window": None, "reserved": 0}, **settings)

    for placement in ("pre", "post", "reordered"):
        add("residual", "residual", placement)
        add("dense_scalar", "dense", placement, form="scalar")
        add("dense_matrix", "dense", placement, form="matrix")
        add("depth_attention", "depth_attention", placement)
        for row in (3, 4, 5):
            add(f"moda_row{row}", "moda", placement, **moda(row))
    for placement in ("pre", "reordered"):
        add("attention_residuals_full", "attention_residuals", placement, form="full")
        block = {"form": "block", "num_blocks": 3}
        add("attention_residuals_block", "attention_residuals", placement, **block)
        add("hyper_connections", "hyper_connections", placement, n=4)
        add("mhc", "mhc", placement, n=4)
    # With 4 layers, of which two write, a window of 3 and one reserved slot hide nothing: both
    # settings together have 6 layers.
    add("moda_bounded", "moda", "reordered", **moda(4, window=3, reserved=1))
    add("moda_every2", "moda", "reordered", **moda(4, every=2))
    add("moda_every2_bounded", "moda", "reordered", **moda(4, every=2, window=3, reserved=1, L=6))
    add("moda_row5_bias", "moda", "pre", **moda(5, bias=True))
    add("residual_bias", "residual", "post", bias=True)
    add("residual_one_layer", "residual", "reordered", L=1)
    add("moda_row4_one_layer", "moda", "reordered", **moda(4, L=1))
    add("attention_residuals_full_one_layer", "attention_residuals", "pre", form="full", L=1)
    add("dense_scalar_one_layer", "dense", "pre", form="scalar", L=1)
    for placement in ("pre", "reordered"):
        add("moda_reader", "moda", placement, **moda(4, reader=True))
    return table


def draw_parameters(config, rng):
    V, D, L, N, K, H, F = (config[name] for name in "VDLNKHF")
    params = {}

    def normal(name, *shape, std=0.3, mean=0.0):
        """Multiples of 2**-10: exact in float32, and the files compress."""
        array = np.broadcast_to(mean, shape) + std * rng.standard_normal(shape)
        params[name] = (np.round(array * 1024) / 1024).astype(np.float32)

    def linear(name, *shape):
        normal(name, *shape)
        if config["bias"]:
            normal(name + "_bias", *shape[:-2], shape[-1])

    normal("embedding", V, D)
    linear("query", L, D, N * H)
    linear("key", L, D, K * H)
    linear("value", L, D, K * H)
    linear("out", L, N * H, D)
    linear("gate", L, D, F)
    linear("up", L, D, F)
    linear("down", L, F, D)
    normal("attention_norm", L, D, mean=1)
    normal("mlp_norm", L, D, mean=1)
    if config["qk_norm"] != "none":
        heads = (N, K) if config["qk_norm"] == "full" else (1, 1)
        normal("query_norm", L, heads[0] * H, mean=1)
        if config.get("reader"):
            normal("key_pair_norm", L, heads[1] * H // 2, mean=1)
        else:
            normal("key_norm", L, heads[1] * H, mean=1)
    normal("final_norm", D, mean=1)
    linear("head", D, V)

    mechanism, form = config["mechanism"], config.get("form")
    if mechanism == "dense" and form == "scalar":
        newest = np.concatenate([np.eye(l + 1)[l] for l in range(L)])
        normal("dense_scalar", L * (L + 1) // 2, mean=newest)
    if mechanism == "dense" and form == "matrix":
        normal("dense_matrix", L * (L + 1) // 2, D, D)
    if mechanism == "depth_attention":
        linear("depth_query", L, D, N * H)
        linear("depth_key", L, D, K * H)
        linear("depth_value", L, D, K * H)
    if mechanism == "moda":
        W = len(writers(config))
        if config["row"] == 5:
            linear("moda_attention_key", W, D, K * H)
            linear("moda_attention_value", W, D, K * H)
        if config["row"] in (4, 5):
            linear("moda_ffn_key", W, D, K * H)
            linear("moda_ffn_value", W, D, K * H)
    if mechanism == "attention_residuals":
        normal("residual_query", 2 * L + 1, D, std=1.0)
        normal("residual_norm", 2 * L + 1, D, mean=1)
    if mechanism == "hyper_connections":
        n, M = config["n"], 2 * L
        normal("hc_norm", M, D, mean=1)
        normal("hc_mix", M, D)
        normal("hc_residual", M, D, n)
        normal("hc_out", M, D)
        normal("hc_mix_bias", M, n, std=0.2, mean=np.eye(n)[np.arange(M) % n])
        normal("hc_residual_bias", M, n, n, std=0.2, mean=np.eye(n))
        normal("hc_out_bias", M, n, std=0.2, mean=1)
        normal("hc_scale", M, 2, mean=0.5)
    if mechanism == "mhc":
        n, M = config["n"], 2 * L
        normal("mhc_pre", M, n * D, n)
        normal("mhc_post", M, n * D, n)
        normal("mhc_residual", M, n * D, n * n)
        normal("mhc_pre_bias", M, n)
        normal("mhc_post_bias", M, n)
        normal("mhc_residual_bias", M, n, n)
        normal("mhc_scale", M, 3, mean=0.5)
    return params


def derivative(config, params, name, batch, cotangent):
    """Of sum(cotangent * logits) along the direction of parameter `name`."""
    array = params[name]
    direction = np.cos(1 + np.arange(array.size)).reshape(array.shape)
    moved = dict(params)
    moved[name] = array + 1j * STEP * direction
    return np.sum(cotangent * forward(config, moved, *batch)).imag / STEP


def make(config, seed):
    """The arrays of one case."""
    rng = np.random.default_rng(seed)
    stored = draw_parameters(config, rng)
    tokens = rng.integers(0, config["V"], SEGMENTS.shape).astype(np.int32)
    cotangent = rng.standard_normal((*SEGMENTS.shape, config["V"])).astype(np.float32)
    cotangent[SEGMENTS == 0] = 0
    params = {name: array.astype(np.float64) for name, array in stored.items()}
    batch = tokens, SEGMENTS, POSITIONS
    result = {"config": np.array(json.dumps(config)), "cotangent": cotangent}
    result.update(tokens=tokens, segments=SEGMENTS, positions=POSITIONS)
    result["logits"] = forward(config, params, *batch)
    for name, array in stored.items():
        result[f"param/{name}"] = array
        result[f"derivative/{name}"] = derivative(config, params, name, batch, cotangent)
    return result


def main():
    folder = pathlib.Path(__file__).parent
    for seed, (name, config) in enumerate(cases().items(), FIRST_SEED):
        np.savez_compressed(folder / f"{name}.npz", **make(config, seed))
        print(name)


if __name__ == "__main__":
    main()
