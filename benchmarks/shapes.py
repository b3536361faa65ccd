"""The shapes that benchmarks measure, with what others measured there.

`official` and `official_forward`: the paper's public Triton kernel, milliseconds on an H200 (bf16,
causal; the best of 32 tile settings, since its backward does not compile there as published).
`paper`: the paper's Table 2 or 7, milliseconds on an A100, (FlashAttention-2, MoDA).
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """One call of causal attention; symbols as in `moda_attention`."""

    name: str
    tokens: int
    group: int
    slots: int
    batch: int = 1
    kv_heads: int = 8
    head_dim: int = 64
    official: float | None = None
    official_forward: float | None = None
    paper: tuple[float | None, float] | None = None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def depth_bytes(self) -> int:
        """Of the depth keys and values together, in a 16-bit type."""
        return 4 * self.batch * self.tokens * self.kv_heads * self.head_dim * self.slots

    def sequence_flops(self, *, backward: bool) -> float:
        """Of causal attention over the sequence: 2 products forward, 5 more backward."""
        products = 7 if backward else 2
        pairs = self.tokens * (self.tokens + 1) / 2
        return products * 2 * self.batch * self.heads * self.head_dim * pairs


TABLE_2 = (
    Shape("T4K", 4096, 8, 64, official=4.10, official_forward=0.60, paper=(7.97, 10.75)),
    Shape("T8K", 8192, 8, 64, official=11.39, paper=(28.7, 35.4)),
    Shape("T16K", 16384, 8, 64, official=36.1, official_forward=7.7, paper=(116.7, 127.7)),
    Shape("T32K", 32768, 8, 64, official=128.7, paper=(459.9, 480.9)),
    Shape("T64K", 65536, 8, 64, official=502.3, official_forward=106.0, paper=(1831.7, 1883.0)),
    Shape("G2", 16384, 2, 64, official=14.81, paper=(29.0, 39.7)),
    Shape("G4", 16384, 4, 64, official=21.79, paper=(58.1, 68.9)),
    Shape("G16", 16384, 16, 64, official=65.2, paper=(233.7, 244.9)),
    Shape("G32", 16384, 32, 64, official=123.5, paper=(467.1, 480.8)),
    Shape("S128", 16384, 8, 128, official=42.8, paper=(116.7, 138.2)),
    Shape("S256", 16384, 8, 256, official=61.2, paper=(116.7, 168.0)),
)
TABLE_7 = (Shape("T1K", 1024, 8, 64, official=1.14, paper=(None, 1.46)),)
TRAINING = (
    Shape("B8", 4096, 2, 36, batch=8, official=13.27),
    Shape("S72", 4096, 2, 72, official=3.03),
    Shape("H128", 16384, 4, 64, head_dim=128, official=1083.0),
    Shape("G1", 16384, 1, 64, official=11.48),
)
SHAPES = {shape.name: shape for shape in (*TABLE_2, *TABLE_7, *TRAINING)}
SMOKE = Shape("smoke", 32, 2, 3, kv_heads=2, head_dim=16)
"""For a CPU."""
