"""What a model computes, and how: `ModelConfig` and `ExecutionConfig`."""

import dataclasses
from typing import Literal

from moda_jax.config.checks import require, require_positive, require_types
from moda_jax.config.depth import DepthConfig, MoDAConfig, NormPlacement


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """An OLMo2-style decoder: what it computes. Symbols as in the paper (arXiv 2603.15619)."""

    vocab_size: int = 320
    """V: rows of the embedding; the tokenizer's vocabulary must fit."""
    num_layers: int = 8
    """L."""
    embed_dim: int = 128
    """D, the width of the residual stream."""
    num_heads: int = 4
    """N, query heads."""
    num_kv_heads: int = 2
    """K, key/value heads; query head n reads key/value head n // (N/K)."""
    head_dim: int = 32
    """H; even, for the rotary half-rotation."""
    mlp_dim: int = 384
    """F, the SwiGLU hidden width."""
    norm_placement: NormPlacement = "reordered"
    """pre: x + f(norm(x)); post: norm(x + f(x)); reordered (OLMo 2): x + norm(f(x))."""
    qk_norm: Literal["none", "full", "head"] = "full"
    """RMSNorm of queries and keys before RoPE: none, over the full vector, or per head."""
    norm_eps: float = 1e-6
    rope_theta: float = 500_000.0
    use_bias: bool = False
    """Biases on all linear layers."""
    tie_embeddings: bool = False
    """Use the input embedding as the output head."""
    init_std: float = 0.02
    """Truncated normal, cut at 3 standard deviations."""
    depth: DepthConfig = MoDAConfig()
    """How depth is used: `--model.depth NAME` on the command line, then the mechanism's fields."""

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(
            self,
            *("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim"),
            *("mlp_dim", "norm_eps", "rope_theta", "init_std"),
        )
        heads_ok = self.num_heads % self.num_kv_heads == 0
        require(self, "num_heads", heads_ok, f"a multiple of num_kv_heads = {self.num_kv_heads}")
        require(self, "head_dim", self.head_dim % 2 == 0, "an even number (RoPE rotates halves)")
        placements = self.depth.placements
        require(
            self,
            "norm_placement",
            self.norm_placement in placements,
            f"one of {placements} with depth {self.depth.name}, which defines no other",
        )
        norm_ok = self.qk_norm != "none" or not self.depth.reader_norms_keys
        require(self, "qk_norm", norm_ok, '"full" or "head" with key_norm "reader"')
        width = self.num_heads * self.head_dim
        width_ok = not self.depth.heads_are_input or width == self.embed_dim
        require(
            self,
            "embed_dim",
            width_ok,
            f"num_heads * head_dim = {width} with depth {self.depth.name}, whose heads are the "
            "layer's input",
        )


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How a model is computed: no field changes the function, but for rounding.

    "auto" is resolved from shapes, backend and device memory before the first step
    (`moda_jax.model.execution`); the run's first screen says what was chosen, and why.
    """

    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Matrix products and the depth history; parameters, norms, softmax and loss are float32."""
    remat: Literal["auto", "full", "save_attention", "save_products"] = "auto"
    """What the backward computes again: a whole layer; all but attention; all but attention and the
    matrix products."""
    attention: str = "auto"
    """Attention implementation by name; auto: the fastest that supports the call."""
    slot_gradients: Literal["auto", "add", "gather"] = "auto"
    """How the backward comes by the gradients of history entries. add: every layer adds to one
    running buffer (2 S K H numbers a token for keys and values). gather, for moda: queries and
    output gradients of all layers are kept (2 L N H numbers a token, in the compute dtype), and an
    entry's gradient is computed when the layer that wrote it is reached."""
    slot_gradient_block: Literal["auto"] | int = "auto"
    """Gathering: layers whose slots share one pass over the later layers. 1: layer by layer."""
    slot_gradient_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """add: of the running buffer, into which up to 2L layers add; gather: of what the layers after
    a block contribute to its slots, which is rounded once."""

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "slot_gradient_block")
        block_ok = self.slot_gradients != "add" or self.slot_gradient_block == "auto"
        require(self, "slot_gradient_block", block_ok, '"auto" with slot_gradients "add"')
        require(self, "attention", bool(self.attention), "auto or an implementation's name")
