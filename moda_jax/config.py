"""Every setting of a run, as frozen typed dataclasses.

A config file in `configs/` builds one `Config`; the command line overrides single fields by dotted
names (`--model.num-layers 4`). Values are checked once, here, and an error names the field.
"""

import dataclasses
import math
import typing
from typing import Any, Literal

NormPlacement = Literal["pre", "post", "reordered"]
QKNorm = Literal["none", "full", "head"]
DepthStream = Literal["residual", "moda"]
RematPolicy = Literal["full", "save_attention", "none"]
DepthGradMode = Literal["add", "gather"]
ComputeDtype = Literal["float32", "bfloat16", "float16"]


def _require(owner: Any, field: str, ok: bool, expected: str) -> None:
    """Raises ValueError that names `field` of the dataclass `owner` unless `ok`."""
    if not ok:
        value = getattr(owner, field)
        raise ValueError(f"{type(owner).__name__}.{field}: expected {expected}, got {value!r}")


_TYPES: dict[Any, tuple[Any, str]] = {
    int: (int, "an integer"),
    float: ((int, float), "a finite number"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
}


def _require_types(owner: Any) -> None:
    """Checks every field against its annotation: no NaN, no 2.5 layers.

    The command line converts, but a config file may hold anything. Choices: `_require_choice`.
    """
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        kinds = typing.get_args(field.type) or (field.type,)
        if value is None and type(None) in kinds:
            continue
        kind: Any = kinds[0]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            _require(owner, field.name, isinstance(value, kind), f"a {kind.__name__}")
        elif kind in _TYPES:
            cls, expected = _TYPES[kind]
            ok = isinstance(value, cls) and (kind is bool or not isinstance(value, bool))
            finite = kind is not float or (ok and math.isfinite(value))
            _require(owner, field.name, ok and finite, expected)


def _require_positive(owner: Any, *fields: str) -> None:
    for field in fields:
        _require(owner, field, getattr(owner, field) > 0, "a positive number")


def _require_choice(owner: Any, *fields: str) -> None:
    """Checks fields annotated with a Literal (the type checker cannot see the command line)."""
    annotations = type(owner).__annotations__
    for field in fields:
        choices = annotations[field].__args__
        _require(owner, field, getattr(owner, field) in choices, f"one of {choices}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """An OLMo2-style decoder with a depth stream. Symbols as in the paper (arXiv 2603.15619)."""

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
    qk_norm: QKNorm = "full"
    """RMSNorm of queries and keys before RoPE: none, over the full vector, or per head."""
    norm_eps: float = 1e-6
    rope_theta: float = 500_000.0
    use_bias: bool = False
    """Biases on all linear layers."""
    tie_embeddings: bool = False
    """Use the input embedding as the output head."""
    init_std: float = 0.02
    """Truncated normal, cut at 3 standard deviations."""
    depth_stream: DepthStream = "moda"
    """residual: a plain transformer; moda: attention also reads earlier layers' keys and values."""
    depth_attention_kv: Literal["reuse", "project"] = "reuse"
    """What attention writes: its own sequence K, V, or an own projection (Table 3, row 5)."""
    depth_ffn_kv: Literal["none", "project"] = "project"
    """What the FFN writes: nothing (Table 3, row 3) or its own projection (rows 4 and 5)."""
    depth_write_every: int = 1
    """Layers 0, n, 2n, ... write depth slots; every layer reads."""
    depth_window: int | None = None
    """Bounded slots (paper section 6.2): read only this many newest slots; None reads all."""
    depth_reserved: int = 0
    """Bounded slots: the earliest slots that stay visible beside the window."""
    depth_grad_mode: DepthGradMode = "add"
    """How the backward comes by the slots' gradients. "add": a running gradient cache (2 S K H
    numbers a token), to which every layer adds for the slots that it read. "gather": queries and
    output gradients of all layers are kept (2 L N H numbers a token, in the compute type), and a
    slot's gradient is computed when the layer that wrote it is reached: less memory and traffic
    where a key/value head has few query heads. Hopper GPUs have a kernel for that (head sizes 64
    and 128, rows of a multiple of 64 tokens), "xla" can do it; elsewhere layers add (with a
    warning)."""
    depth_grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the running gradient cache, into which up to 2L layers add: bfloat16 halves its memory and
    traffic, and rounds the sum at every addition. Gathering: of what the layers after a block owe
    to its slots, which is rounded once; of no effect with blocks of 1, and layers that add because
    their backend cannot gather do so in float32."""
    depth_grad_block: int = 1
    """Layers that share one pass. "add": over the older slots, which divides the running cache's
    traffic and keeps that many layers' queries and output gradients; "gather": over the later
    layers, for the slots of the whole block. 1: layer by layer, as also (with a warning) where the
    attention implementation cannot add for several."""
    compute_dtype: ComputeDtype = "bfloat16"
    """Matrix products and the depth cache; parameters, norms, softmax and loss are float32."""
    remat: RematPolicy = "full"
    """What the backward recomputes: a whole layer, all but attention (and, where every layer
    writes, but the key products of own depth projections), or nothing."""
    attention: str | None = None
    """Attention implementation by name; None picks the fastest that supports the call."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require_positive(
            self, "vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim",
            "mlp_dim", "norm_eps", "rope_theta", "init_std", "depth_write_every",
            "depth_grad_block",
        )  # fmt: skip
        _require_choice(
            self, "norm_placement", "qk_norm", "depth_stream", "depth_attention_kv",
            "depth_ffn_kv", "depth_grad_mode", "depth_grad_dtype", "compute_dtype", "remat",
        )  # fmt: skip
        _require(self, "num_heads", self.num_heads % self.num_kv_heads == 0,
                 f"a multiple of num_kv_heads = {self.num_kv_heads}")  # fmt: skip
        _require(self, "head_dim", self.head_dim % 2 == 0, "an even number (RoPE rotates halves)")
        window_ok = self.depth_window is None or self.depth_window > 0
        _require(self, "depth_window", window_ok, "None or a positive number of slots")
        _require(self, "depth_reserved", self.depth_reserved >= 0, "a number >= 0")
        _require(self, "depth_reserved", self.depth_reserved == 0 or self.depth_window is not None,
                 "0 while depth_window is None (every slot is visible then)")  # fmt: skip
        mode_ok = self.depth_grad_mode == "add" or self.depth_window is None
        _require(self, "depth_grad_mode", mode_ok,
                 '"add" while depth_window is set (a slot must be seen by all later layers)',
                 )  # fmt: skip
        block_ok = self.depth_grad_block == 1 or self.depth_window is None
        _require(self, "depth_grad_block", block_ok,
                 "1 while depth_window is set (a block's layers must see the same older slots)",
                 )  # fmt: skip

    @property
    def depth_writers(self) -> int:
        """Number of layers whose depth slots somebody reads: of layers 0 … L−2, every n-th."""
        if self.depth_stream == "residual":
            return 0
        return math.ceil((self.num_layers - 1) / self.depth_write_every)

    @property
    def running_grad_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the running gradient cache, where there is one."""
        return self.depth_grad_dtype if self.depth_grad_mode == "add" else "float32"

    @property
    def slots_per_writer(self) -> int:
        """Depth slots that a writing layer appends (s): 1, or 2 with an FFN projection."""
        return 2 if self.depth_ffn_kv == "project" else 1

    @property
    def depth_slots(self) -> int:
        """S, the slots that some layer reads. Training may keep the last layer's, too."""
        return self.depth_writers * self.slots_per_writer


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut into rows."""

    source: str = "stdlib"
    """"stdlib" (the Python standard library's source on this machine), a folder of .txt files,
    or a .jsonl file."""
    text_field: str = "text"
    """The field of a .jsonl record that holds the document."""
    tokenizer: str = "bytes"
    """"bytes", or the path of a local tokenizer.json."""
    eos_token: str | None = None
    """The token of a tokenizer.json that stands between documents; None: one of the usual names."""
    seq_len: int = 256
    """T: target tokens per row."""
    validation_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of their content."""
    open_documents: int = 64
    """Documents that are read side by side, so that a long one does not fill whole batches."""
    packing_bins: int = 16
    """Rows that are open at once while documents are packed; more waste less."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require_positive(self, "seq_len", "open_documents", "packing_bins")
        _require(self, "validation_fraction", 0 < self.validation_fraction < 1, "0 < fraction < 1")
        for field in ("source", "text_field", "tokenizer"):
            _require(self, field, bool(getattr(self, field)), "a non-empty string")
        eos_ok = self.eos_token is None or self.tokenizer != "bytes"
        _require(self, "eos_token", eos_ok, "None with the byte tokenizer, which has its own")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, linear warm-up and cosine decay, as OLMo 2 trains."""

    learning_rate: float = 3e-4
    """Peak."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On every parameter but the input embedding, as OLMo 2."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    z_loss: float = 1e-5
    """Weight of mean(logsumexp(logits)²)."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require_positive(self, "learning_rate", "eps", "clip_norm")
        for field in ("beta1", "beta2"):
            _require(self, field, 0 <= getattr(self, field) < 1, "0 <= beta < 1")
        _require(self, "final_fraction", 0 <= self.final_fraction <= 1, "0 <= fraction <= 1")
        for field in ("warmup_steps", "weight_decay", "z_loss"):
            _require(self, field, getattr(self, field) >= 0, "a number >= 0")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices used."""

    data: int = 1
    """Replicas of the parameters, each with a part of the batch."""
    fsdp: int = 1
    """Parts of the parameters and of the batch."""
    tensor: int = 1
    """Parts of the heads and of the FFN's width."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require_positive(self, "data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run."""

    name: str
    """Outputs go to <output_dir>/<name>."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    output_dir: str = "runs"
    seed: int = 0
    steps: int = 1000
    """Optimizer steps in all; a resumed run continues up to this number."""
    batch_size: int = 16
    """Rows per optimizer step, over all devices and accumulation steps."""
    accumulation_steps: int = 1
    """Parts in which the rows of one optimizer step are computed, one after the other."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 200
    """Steps between validations."""
    eval_batches: int = 16
    """Batches per validation; the last validation of a run uses four times as many."""
    checkpoint_every: int = 200
    keep_last: int = 2
    """Newest checkpoints kept; the best by validation loss is kept besides."""
    sample_prompt: str = "def "
    sample_tokens: int = 200
    """Length of the sample generated at the end; 0 generates none."""
    wandb: bool = False
    """Also log to Weights & Biases (extra `wandb`; contacts its server)."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require_positive(
            self, "steps", "batch_size", "accumulation_steps", "log_every", "eval_every",
            "eval_batches", "checkpoint_every", "keep_last",
        )  # fmt: skip
        name_ok = self.name not in ("", ".", "..") and "/" not in self.name
        _require(self, "name", name_ok, "a folder's name, without '/'")
        _require(self, "seed", 0 <= self.seed < 2**32, "0 <= seed < 2**32")
        _require(self, "sample_tokens", self.sample_tokens >= 0, "a number >= 0")
        batch_shards = self.mesh.data * self.mesh.fsdp
        parts = self.accumulation_steps * batch_shards
        _require(self, "batch_size", self.batch_size % parts == 0,
                 f"a multiple of accumulation_steps * mesh.data * mesh.fsdp = "
                 f"{self.accumulation_steps} * {self.mesh.data} * {self.mesh.fsdp}")  # fmt: skip
        for field in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "embed_dim"):
            axis, parts = ("fsdp", self.mesh.fsdp) if field == "embed_dim" else (
                "tensor", self.mesh.tensor)  # fmt: skip
            _require(self.model, field, getattr(self.model, field) % parts == 0,
                     f"a multiple of mesh.{axis} = {parts}")  # fmt: skip
