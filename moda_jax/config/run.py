"""Every setting of a run beside the model and the data: optimizer, mesh, and the run itself."""

import dataclasses
from pathlib import Path
from typing import Literal

from moda_jax.config.checks import require, require_positive, require_types
from moda_jax.config.data import DataConfig
from moda_jax.config.model import ExecutionConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, linear warm-up and cosine decay, as OLMo 2 trains, unless said otherwise."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on the matrices of the layers, AdamW on all else (embedding, head, norms, biases,
    small gates); one learning rate serves both."""
    learning_rate: float = 3e-4
    """Peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """What follows the warm-up: a cosine, or the peak until a linear decay (warm-up, stable,
    decay)."""
    decay_fraction: float = 0.2
    """wsd: the share of all steps, the last ones, in which the learning rate decays."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    warmup_steps: int = 2000
    beta1: float = 0.9
    """AdamW's decay rate of the mean of gradients."""
    beta2: float = 0.95
    """AdamW's decay rate of the mean of squared gradients."""
    eps: float = 1e-8
    momentum: float = 0.95
    """Muon's decay rate of the mean of gradients."""
    weight_decay: float = 0.1
    """On every parameter but the input embedding, as OLMo 2."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    z_loss: float = 1e-5
    """Weight of mean(logsumexp(logits)²)."""

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "learning_rate", "eps", "clip_norm")
        for field in ("beta1", "beta2", "momentum"):
            require(self, field, 0 <= getattr(self, field) < 1, "0 <= number < 1")
        require(self, "decay_fraction", 0 < self.decay_fraction <= 1, "0 < fraction <= 1")
        require(self, "final_fraction", 0 <= self.final_fraction <= 1, "0 <= fraction <= 1")
        for field in ("warmup_steps", "weight_decay", "z_loss"):
            require(self, field, getattr(self, field) >= 0, "a number >= 0")


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
        require_types(self)
        require_positive(self, "data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run."""

    name: str
    """Outputs go to <output_dir>/<name>."""
    model: ModelConfig = ModelConfig()
    execution: ExecutionConfig = ExecutionConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    output_dir: str = "runs"
    prepared_dir: str | None = None
    """Folder in which raw text is kept as tokens, for all runs that name it; None:
    <output_dir>/prepared."""
    seed: int = 0
    init_from: str | None = None
    """Another run's folder, or its checkpoints/STEP: a new run begins with the parameters of the
    newest, or that, checkpoint, a fresh optimizer and step 0. A resumed run does not read it."""
    steps: int = 1000
    """Optimizer steps in all; a resumed run continues up to this number."""
    max_skipped_steps: int = 3
    """Steps in a row that may be skipped because loss or gradient is not finite; one more ends the
    run as diverged. Counted since the run was started or resumed."""
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
    profile: int = 0
    """Steps to trace, from the eleventh on, into the run's folder; 0 traces none."""
    compilation_cache: str = "auto"
    """Folder in which compiled programs are kept for the next start. "auto": JAX's own setting
    (JAX_COMPILATION_CACHE_DIR), else ~/.cache/moda-jax/xla (XDG_CACHE_HOME), in a run of one
    process; "off": nothing is kept."""
    wandb: bool = False
    """Also log to Weights & Biases (extra `wandb`; contacts its server)."""

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(
            self,
            "steps",
            "batch_size",
            "accumulation_steps",
            "log_every",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "keep_last",
        )
        name_ok = self.name not in ("", ".", "..") and "/" not in self.name
        require(self, "name", name_ok, "a folder's name, without '/'")
        require(self, "seed", 0 <= self.seed < 2**32, "0 <= seed < 2**32")
        for field in ("sample_tokens", "max_skipped_steps", "profile"):
            require(self, field, getattr(self, field) >= 0, "a number >= 0")
        require(self, "init_from", self.init_from != "", "a folder, or None")
        require(self, "prepared_dir", self.prepared_dir != "", "a folder, or None")
        cache_ok = bool(self.compilation_cache)
        require(self, "compilation_cache", cache_ok, '"auto", "off" or a folder')
        # What the command line cannot decode arrives as lone surrogates.
        prompt_ok = not any("\ud800" <= character <= "\udfff" for character in self.sample_prompt)
        require(self, "sample_prompt", prompt_ok, "a text that UTF-8 can encode")
        batch_shards = self.mesh.data * self.mesh.fsdp
        parts = self.accumulation_steps * batch_shards
        require(
            self,
            "batch_size",
            self.batch_size % parts == 0,
            f"a multiple of accumulation_steps * mesh.data * mesh.fsdp = "
            f"{self.accumulation_steps} * {self.mesh.data} * {self.mesh.fsdp}",
        )
        for field in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "embed_dim"):
            axis, parts = (
                ("fsdp", self.mesh.fsdp) if field == "embed_dim" else ("tensor", self.mesh.tensor)
            )
            require(
                self.model,
                field,
                getattr(self.model, field) % parts == 0,
                f"a multiple of mesh.{axis} = {parts}",
            )

    @property
    def prepared_folder(self) -> Path:
        """Where raw text is kept as tokens."""
        return Path(self.prepared_dir or Path(self.output_dir, "prepared"))
