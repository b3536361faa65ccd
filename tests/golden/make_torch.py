"""Write the golden vectors of tests/test_torch_golden.py with PyTorch in float64.

    python tests/golden/make_torch.py

needs torch, which the test does not. The operator is written here from the paper's Alg. 1 (Zhu et
al., arXiv 2603.15619) in the arrays of the official repository: row i of the queries is query head
i % G of token i // G, and reads the depth rows of that token. Nothing of moda_jax is used. Every
torch_<name>.npz holds inputs, output, lse, cotangents and gradients.
"""

from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent

CASES = {
    "grouped": {"kv_heads": 2, "group": 3, "slots": 4},
    "multi_head": {"kv_heads": 3, "group": 1, "slots": 1},
    "multi_query_full": {"kv_heads": 1, "group": 4, "slots": 3, "is_causal": False},
}
BATCH, LENGTH, HEAD_DIM = 2, 7, 6


def attend(query, key, value, depth_key, depth_value, *, group, slots, is_causal):
    """o [B, T·G, K, H] and lse [B, T·G, K] of queries [B, T·G, K, H] and depth [B, T·S, K, H]."""
    scale = query.shape[-1] ** -0.5
    token = torch.arange(query.shape[1]) // group
    scores = scale * torch.einsum("bikh,bjkh->bkij", query, key)
    if is_causal:
        later = torch.arange(key.shape[1])[None, :] > token[:, None]
        scores = scores.masked_fill(later, -torch.inf)
    own = token[:, None] * slots + torch.arange(slots)  # [T·G, S], the rows that a query reads
    depth_scores = scale * torch.einsum("bikh,biskh->bkis", query, depth_key[:, own])
    together = torch.cat((scores, depth_scores), dim=-1)
    lse = together.logsumexp(-1)
    weights = torch.exp(together - lse[..., None])
    sequence, depth = weights.split((key.shape[1], slots), dim=-1)
    out = torch.einsum("bkij,bjkh->bikh", sequence, value)
    out = out + torch.einsum("bkis,biskh->bikh", depth, depth_value[:, own])
    return out, lse.transpose(1, 2)


def make(name: str, seed: int) -> None:
    case = {"is_causal": True} | CASES[name]
    rng = np.random.default_rng(seed)
    kv_heads, group, slots = case["kv_heads"], case["group"], case["slots"]
    rows = {"query": LENGTH * group, "key": LENGTH, "value": LENGTH,
            "depth_key": LENGTH * slots, "depth_value": LENGTH * slots}  # fmt: skip

    def draw(*shape):
        return np.round(rng.normal(size=shape) * 256) / 256  # few bits make a small file

    inputs = {x: draw(BATCH, count, kv_heads, HEAD_DIM) for x, count in rows.items()}
    tensors = {x: torch.tensor(array, requires_grad=True) for x, array in inputs.items()}
    settings = {"group": group, "slots": slots, "is_causal": case["is_causal"]}
    out, lse = attend(*tensors.values(), **settings)
    d_out, d_lse = draw(*out.shape), draw(*lse.shape)
    torch.autograd.backward((out, lse), (torch.tensor(d_out), torch.tensor(d_lse)))
    grads = {f"grad/{x}": tensor.grad.numpy().astype(np.float32) for x, tensor in tensors.items()}
    path = FOLDER / f"torch_{name}.npz"
    np.savez_compressed(
        path,
        **{x: array.astype(np.float32) for x, array in inputs.items()},
        **grads,
        **{x: np.asarray(value) for x, value in settings.items()},
        out=out.detach().numpy().astype(np.float32),
        lse=lse.detach().numpy().astype(np.float32),
        d_out=d_out.astype(np.float32),
        d_lse=d_lse.astype(np.float32),
    )
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    for index, case in enumerate(CASES):
        make(case, seed=index)
