"""Our parameters and Hugging Face's: names, and how the arrays lie.

A layer's parameters are stacked here and numbered there. Matrices are [inputs, outputs] here, heads
and their entries being axes of their own, and [outputs, inputs] there, in one axis.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from moda_jax.config import MoDAConfig, ModelConfig
from moda_jax.model.transformer import Transformer

_OUTSIDE = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}

_IN_LAYERS = {
    "query": "self_attn.q_proj",
    "key_value.key": "self_attn.k_proj",
    "key_value.value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}

_LAYER_NORMS = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "reordered": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""The modules of our `attention_norm` and `mlp_norm`, by our norm placement."""

_DEPTH = {
    "ffn_kv.key": "depth_ffn.k_proj",
    "ffn_kv.value": "depth_ffn.v_proj",
    "attention_kv.key": "depth_attention.k_proj",
    "attention_kv.value": "depth_attention.v_proj",
}
"""Parameters of MoDA's shared projections, as `modeling_moda.py` names them in the layer that
writes."""


class Parameter(NamedTuple):
    """One of our parameters, and where it is there."""

    path: tuple[str, ...]
    """In the model's state."""
    shape: tuple[int, ...]
    names: tuple[str, ...]
    """Their tensors: one, or one for each index of the leading axis."""
    stacked: bool
    num_inputs: int
    """Axes that a matrix contracts; 0: not a matrix."""

    @property
    def name(self) -> str:
        """Dotted."""
        return ".".join(self.path)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of what one of their tensors has, in our layout."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Of each of their tensors."""
        shape = self.part_shape
        if self.num_inputs:
            sizes = np.prod(shape[: self.num_inputs]), np.prod(shape[self.num_inputs :])
            return int(sizes[1]), int(sizes[0])
        return shape if self.path == ("embedding",) else (int(np.prod(shape)),)

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """A view of one of their tensors with our axes."""
        return (theirs.T if self.num_inputs else theirs).reshape(self.part_shape)

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """A view of our part with their axes."""
        if self.num_inputs:
            return part.reshape(self.their_shape[::-1]).T
        return part.reshape(self.their_shape)


def parameters_of(config: ModelConfig) -> Iterator[Parameter]:
    """All parameters of the model."""
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    for path, leaf in jax.tree.leaves_with_path(nnx.as_pure(state)):
        keys = tuple(str(key.key) for key in path)
        names, stacked = _their_names(config, keys)
        is_kernel = keys[-1] == "kernel"
        num_inputs = (2 if keys[:2] == ("layers", "out") else 1) if is_kernel else 0
        yield Parameter(keys, leaf.shape, names, stacked, num_inputs)


def _their_names(config: ModelConfig, path: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """Names of the tensors, and whether they are numbered."""
    leaf = "bias" if path[-1] == "bias" else "weight"
    where, *inner = path if path == ("embedding",) else path[:-1]
    module = ".".join(inner)
    if where in _OUTSIDE:
        return (f"{_OUTSIDE[where]}.{leaf}",), False
    if where == "depth_layers":  # a vector, in every layer
        names = (f"model.layers.{n}.self_attn.{path[-1]}" for n in range(config.num_layers))
        return tuple(names), True
    if where == "depth":
        assert isinstance(config.depth, MoDAConfig)
        every = config.depth.write_every
        writers = range(0, config.num_layers - 1, every)
        return tuple(f"model.layers.{n}.{_DEPTH[module]}.{leaf}" for n in writers), True
    norms = zip(("attention_norm", "mlp_norm"), _LAYER_NORMS[config.norm_placement], strict=True)
    theirs = (_IN_LAYERS | dict(norms))[module]
    return tuple(f"model.layers.{n}.{theirs}.{leaf}" for n in range(config.num_layers)), True
