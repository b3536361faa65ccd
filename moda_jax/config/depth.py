"""The settings of every way of using depth, one frozen dataclass a mechanism.

`ModelConfig.depth` holds one of them; `moda_jax.depth` has the equations, one file a mechanism.
"""

import dataclasses
from typing import ClassVar, Literal

from moda_jax.config.checks import require, require_positive, require_types

NormPlacement = Literal["pre", "post", "reordered"]

_ALL: tuple[NormPlacement, ...] = ("pre", "post", "reordered")
# norm(x + f(x)) normalizes the residual stream; what reads several entries or streams has no x.
_BRANCH: tuple[NormPlacement, ...] = ("pre", "reordered")


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """What the settings of all mechanisms have in common."""

    name: ClassVar[str]
    """The name of the mechanism on the command line and in files."""
    placements: ClassVar[tuple[NormPlacement, ...]] = _ALL
    """The norm placements for which the mechanism is defined."""
    heads_are_input: ClassVar[bool] = False
    """Whether heads, side by side, are what a layer reads: N·H must be D."""

    @property
    def reader_norms_keys(self) -> bool:
        """Whether the layer that reads a key scales it, not the one that wrote it."""
        return False

    def __post_init__(self) -> None:
        require_types(self)


@dataclasses.dataclass(frozen=True)
class ResidualConfig(DepthConfig):
    """A plain transformer: h + f(h)."""

    name: ClassVar[str] = "residual"


@dataclasses.dataclass(frozen=True)
class DenseConfig(DepthConfig):
    """Every layer's input is a learned sum over all earlier layers' outputs.

    Sources: paper Fig. 3b, eq. 4 (matrix); DenseFormer, arXiv 2402.02622 (scalar).
    """

    name: ClassVar[str] = "dense"
    form: Literal["scalar", "matrix"] = "scalar"
    """Weights of the sum: a number, or a D x D matrix, for every pair of layer and entry."""


@dataclasses.dataclass(frozen=True)
class DepthAttentionConfig(DepthConfig):
    """Every layer's input is attention over depth alone (paper eq. 5-6). N·H must be D."""

    name: ClassVar[str] = "depth_attention"
    heads_are_input: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class MoDAConfig(DepthConfig):
    """Attention also reads earlier layers' keys and values (paper, Alg. 1). Default: row 4."""

    name: ClassVar[str] = "moda"
    attention_kv: Literal["reuse", "project"] = "reuse"
    """What attention writes: its own sequence K, V, or an own projection (Table 3, row 5)."""
    ffn_kv: Literal["none", "project"] = "project"
    """What the FFN writes: nothing (Table 3, row 3) or its own projection (rows 4 and 5)."""
    write_every: int = 1
    """Layers 0, n, 2n, ... write depth slots; every layer reads."""
    window: int | None = None
    """Bounded slots (paper section 6.2): read only this many newest slots; None reads all."""
    reserved: int = 0
    """Bounded slots: the earliest slots that stay visible beside the window."""
    key_norm: Literal["writer", "reader"] = "writer"
    """Whose key norm a slot's key has. reader: keys are divided by their RMS when they are written,
    and the scale of the layer that reads them, one number for both halves of a rotary pair, is
    multiplied into its queries, which costs nothing: a scale by pair and a rotation commute."""
    score_bias: float | None = None
    """Depth scores get this number and one more that is learned, for each layer and query head,
    and starts at 0. For models that were trained without depth slots: weights on them begin
    e^score_bias times as large. None: nothing is added."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "write_every")
        window_ok = self.window is None or self.window > 0
        require(self, "window", window_ok, "None or a positive number of slots")
        require(self, "reserved", self.reserved >= 0, "a number >= 0")
        reserved_ok = self.reserved == 0 or self.window is not None
        require(self, "reserved", reserved_ok, "0 while window is None (every slot is visible)")

    @property
    def reader_norms_keys(self) -> bool:
        return self.key_norm == "reader"

    @property
    def slots_per_writer(self) -> int:
        """Depth slots that a writing layer appends (s): 1, or 2 with an FFN projection."""
        return 2 if self.ffn_kv == "project" else 1


@dataclasses.dataclass(frozen=True)
class AttentionResidualsConfig(DepthConfig):
    """Every sublayer reads a softmax-weighted sum of earlier outputs (arXiv 2603.15031)."""

    name: ClassVar[str] = "attention_residuals"
    placements: ClassVar[tuple[NormPlacement, ...]] = _BRANCH
    form: Literal["full", "block"] = "full"
    """Entries of the sum: all sublayers' outputs, or sums over blocks of sublayers."""
    num_blocks: int | None = None
    """Blocks of sublayers in the block form; None: 8, as its source has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_blocks")
        is_used = self.num_blocks is None or self.form == "block"
        require(self, "num_blocks", is_used, 'None with form "full", which has no blocks')


@dataclasses.dataclass(frozen=True)
class HyperConnectionsConfig(DepthConfig):
    """n residual streams with learned, input-dependent connections (arXiv 2409.19606, dynamic)."""

    name: ClassVar[str] = "hyper_connections"
    placements: ClassVar[tuple[NormPlacement, ...]] = _BRANCH
    num_streams: int = 4
    """n."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_streams")


@dataclasses.dataclass(frozen=True)
class MHCConfig(DepthConfig):
    """Hyper-connections whose stream mixing is doubly stochastic (arXiv 2512.24880)."""

    name: ClassVar[str] = "mhc"
    placements: ClassVar[tuple[NormPlacement, ...]] = _BRANCH
    num_streams: int = 4
    """n."""
    sinkhorn_rounds: int = 20
    """Rounds of dividing by column sums, then by row sums."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_streams", "sinkhorn_rounds")


DEPTH_CONFIGS: dict[str, type[DepthConfig]] = {
    cls.name: cls
    for cls in (
        ResidualConfig,
        DenseConfig,
        DepthAttentionConfig,
        MoDAConfig,
        AttentionResidualsConfig,
        HyperConnectionsConfig,
        MHCConfig,
    )
}
