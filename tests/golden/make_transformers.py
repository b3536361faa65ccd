"""Write the golden vectors of tests/test_golden.py with Hugging Face transformers.

    python tests/golden/make_transformers.py

needs torch and transformers >= 5, which the test does not. Every <name>.npz beside this file holds
a tiny model's config (JSON), weights, tokens, targets, logits, mean cross-entropy and gradients.
Weights are float64 while it computes, but transformers has its norms, angles and softmax in
float32 whatever the weights are.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent

COMMON = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-2,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}

CASES = {
    "olmo2": {"model_type": "olmo2", "hidden_size": 24, "head_dim": 6},
    "llama": {"model_type": "llama", "rope_theta": 500.0},
    "llama_tied": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 6, "rms_norm_eps": 3e-3},
}
"""Changes to `COMMON`. The eps is large and the angles differ within 13 tokens: both must show."""

VISIBLE = 1e-3
"""What a wrong eps or RoPE exponent must change the logits by, relative to the largest."""


def make_model(config: dict, weights: dict | None = None):
    """A float64 model with `weights` by their names, and transformers' own without."""
    fields = {name: value for name, value in config.items() if name != "rope_theta"}
    theta = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    # A padding token, which OLMo 2 has by default, would get no gradient.
    none = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    built = transformers.AutoConfig.for_model(
        **fields, **none, rope_parameters=theta, use_cache=False
    )
    model = transformers.AutoModelForCausalLM.from_config(built, attn_implementation="eager")
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        if weights is not None:
            parameter.data.copy_(torch.from_numpy(weights[name]))
    return model


def draw_weights(model, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Small embeddings, that eps matters, and norms that are not 1. Few bits make a small file."""
    weights = {}
    for name, parameter in model.named_parameters():
        mean = 1.0 if parameter.ndim == 1 else 0.0
        std = 0.05 if "embed_tokens" in name else 0.3
        drawn = rng.normal(mean, std, tuple(parameter.shape))
        weights[name] = (np.round(drawn * 1024) / 1024).astype(np.float32)
    return weights


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def check_visible(config: dict, weights: dict, tokens, logits) -> dict[str, float]:
    """How far a wrong eps and a halved RoPE exponent move the logits: enough to be seen."""
    wrong = {
        "eps": {"rms_norm_eps": 1e-12},
        "exponent": {"rope_theta": config["rope_theta"] ** 0.5},
    }
    moved = {}
    for name, change in wrong.items():
        with torch.no_grad():
            moved[name] = relative(make_model(config | change, weights)(tokens).logits, logits)
        assert moved[name] > VISIBLE, f"{name} moves the logits by only {moved[name]:.1e}"
    return moved


def make(name: str, seed: int) -> None:
    config = COMMON | CASES[name]
    rng = np.random.default_rng(seed)
    weights = draw_weights(make_model(config), rng)
    tokens, targets = rng.integers(0, config["vocab_size"], (2, 2, 13)).astype(np.int32)

    model = make_model(config, weights)
    ids = torch.from_numpy(tokens).long()
    logits = model(ids).logits
    assert logits.dtype == torch.float64
    wanted = torch.from_numpy(targets).long().flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted)
    loss.backward()
    moved = check_visible(config, weights, ids, logits.detach())

    grads = {
        f"grad/{key}": parameter.grad.numpy().astype(np.float32)
        for key, parameter in model.named_parameters()
    }
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__}
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(
        path,
        config=np.array(json.dumps(config | {"made_by": made_by})),
        tokens=tokens,
        targets=targets,
        logits=logits.detach().numpy().astype(np.float32),
        loss=np.float32(loss.item()),
        **weights,
        **grads,
    )
    sizes = ", ".join(f"{key} {value:.1e}" for key, value in moved.items())
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB; logits move by: {sizes}")


if __name__ == "__main__":
    for index, case in enumerate(CASES):
        make(case, seed=index)
