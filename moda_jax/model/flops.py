"""Parameters and floating-point operations, from a `ModelConfig` alone.

Convention: a multiply and an add are 2 FLOPs; matrix products and attention count, norms, rotations
and the embedding's look-up do not. Attention is counted causal (a query sees (T+1)/2 keys on
average) unless said; a query's depth scores and sums cost 4·N·H per visible slot. The backward is
twice the forward; what a remat policy computes again is not counted (model FLOPs, as MFU wants).
"""

import dataclasses

from moda_jax.config import ModelConfig
from moda_jax.depth import make_mechanism


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by part."""

    embedding: int
    head: int
    """0 if tied."""
    blocks: int
    """All layers, without the depth projections."""
    depth: int
    """The mechanism's, beyond the plain model's."""
    final_norm: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.blocks + self.depth + self.final_norm

    @property
    def without_head(self) -> int:
        """V·D counted once, as the paper's Tables 3 and 6 do."""
        return self.total - self.head


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs of one row of T tokens, forward, by part."""

    seq_len: int
    linear: int
    """All matrices of the layers."""
    depth_projection: int
    head: int
    sequence_attention: int
    depth_reads: int
    """What reading history entries, or streams, costs."""

    @property
    def forward(self) -> int:
        parts = (self.linear, self.depth_projection, self.head, self.sequence_attention)
        return sum(parts) + self.depth_reads

    @property
    def backward(self) -> int:
        return 2 * self.forward

    @property
    def train_per_token(self) -> float:
        """Forward and backward, per token."""
        return (self.forward + self.backward) / self.seq_len


def _projection_size(config: ModelConfig) -> tuple[int, int]:
    """(weights, biases) of one key/value projection."""
    kv_width = config.num_kv_heads * config.head_dim
    return 2 * config.embed_dim * kv_width, 2 * kv_width * config.use_bias


def _layer_weights(config: ModelConfig) -> int:
    """Entries of one layer's matrices (P)."""
    query_and_out = 2 * config.embed_dim * config.num_heads * config.head_dim
    return query_and_out + _projection_size(config)[0] + 3 * config.embed_dim * config.mlp_dim


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of `Transformer(config)`, without building it. Source: design of Table 3."""
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = 2 * config.embed_dim
    norms += {"none": 0, "full": width + kv_width, "head": 2 * config.head_dim}[config.qk_norm]
    if config.depth.reader_norms_keys:  # the key norm's scale has one number for a pair
        norms -= (kv_width if config.qk_norm == "full" else config.head_dim) // 2
    biases = (width + 2 * config.embed_dim + 2 * config.mlp_dim) * config.use_bias
    _, projection_biases = _projection_size(config)
    layer = _layer_weights(config) + norms + biases + projection_biases
    table = config.vocab_size * config.embed_dim
    head = 0 if config.tie_embeddings else table + config.vocab_size * config.use_bias
    depth = make_mechanism(config).num_parameters()
    return ParameterCount(table, head, config.num_layers * layer, depth, config.embed_dim)


def count_flops(config: ModelConfig, seq_len: int, *, causal: bool = True) -> FlopCount:
    """Forward FLOPs of one row of `seq_len` tokens; see the module's convention."""
    mechanism = make_mechanism(config)
    width = config.num_heads * config.head_dim
    keys = seq_len * (seq_len + 1) // 2 if causal else seq_len * seq_len
    return FlopCount(
        seq_len=seq_len,
        linear=2 * seq_len * config.num_layers * _layer_weights(config),
        depth_projection=mechanism.projection_flops(seq_len),
        head=2 * seq_len * config.vocab_size * config.embed_dim,
        sequence_attention=4 * config.num_layers * keys * width,
        depth_reads=mechanism.read_flops(seq_len),
    )
