"""How a model is computed on the device at hand: what "auto" becomes, and why."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moda_jax.config import Config, ExecutionConfig, ModelConfig
from moda_jax.depth import make_mechanism
from moda_jax.model.slot_gradients import Choice, choose
from moda_jax.ops.backends import AttentionChoice
from moda_jax.ops.history import History
from moda_jax.ops.sharded_attention import ShardedAttention
from pallas_kernels import platforms

WARNING = "warning"
"""What `describe_execution` calls a line that a run's first screen shows in red."""

_MEMORY_SHARE = 0.85
"""Of the device's memory, for what training allocates at once; the rest is workspaces."""


class Resolved(NamedTuple):
    """An ExecutionConfig without "auto" (but for what the attention call itself decides)."""

    execution: ExecutionConfig
    reasons: dict[str, str]
    """Why, by field, for the fields that were "auto"."""


def resolve_compute_dtype(execution: ExecutionConfig) -> ExecutionConfig:
    """bfloat16, but float32 on a CPU, which emulates 16-bit products."""
    if execution.compute_dtype != "auto":
        return execution
    on_cpu = platforms.current() == "cpu"
    return dataclasses.replace(execution, compute_dtype="float32" if on_cpu else "bfloat16")


def resolve_execution(
    model: ModelConfig,
    execution: ExecutionConfig,
    *,
    rows: int,
    seq_len: int,
    memory: int | None,
    parameters: int,
    shards: int = 1,
) -> Resolved:
    """Resolves the compute dtype and the remat policy; `slot_gradients` follow from the call.

    Args:
      model: what is computed.
      execution: how; fields that are not "auto" stay.
      rows: rows [seq_len] that a device computes at a time.
      seq_len: T.
      memory: of a device, bytes; None: not known.
      parameters: of the whole model; its float32 state (parameters, two moments, gradients) is
        split over `shards` devices.
      shards: see `parameters`.
    """
    reasons: dict[str, str] = {}
    if execution.compute_dtype == "auto":
        execution = resolve_compute_dtype(execution)
        is_cpu = execution.compute_dtype == "float32"
        reasons["compute_dtype"] = "CPUs emulate bfloat16" if is_cpu else "matrix units"
    if execution.remat == "auto":
        saved = {
            policy: rows * seq_len * saved_bytes_per_token(model, execution, policy)
            for policy in ("save_products", "save_attention", "full")
        }
        room = None if memory is None else int(_MEMORY_SHARE * memory) - 16 * parameters // shards
        remat, reason = _choose_remat(saved, room)
        execution = dataclasses.replace(execution, remat=remat)
        reasons["remat"] = reason
    return Resolved(execution, reasons)


def _choose_remat(saved: dict[str, int], room: int | None):
    if platforms.current() == "cpu":
        return "save_products", "products are what a CPU is slow at"
    if room is None:
        return "save_attention", "the device does not tell its memory"
    # A quarter of the room is left to the history's gradients, the logits and one layer's own: they
    # took 20 to 29% of what was saved in the 700M models of docs/benchmarks/train_step.md.
    if saved["save_attention"] < room * 3 / 4:
        return "save_attention", (
            f"{saved['save_attention'] / 2**30:.1f} GiB fit in {room / 2**30:.1f} GiB"
        )
    return "full", (
        f"save_attention's {saved['save_attention'] / 2**30:.1f} GiB do not fit in three quarters "
        f"of {room / 2**30:.1f} GiB"
    )


def saved_bytes_per_token(model: ModelConfig, execution: ExecutionConfig, remat: str) -> int:
    """Bytes a token that all layers save under a remat policy, the depth history included."""
    mechanism = make_mechanism(model)
    entry = mechanism.entry_shapes(1, 1)
    buffers = tuple(
        jax.ShapeDtypeStruct((mechanism.capacity, *shape), jnp.float32) for shape in entry
    )
    token = jax.ShapeDtypeStruct((1, 1, model.embed_dim), jnp.float32)
    carry, _ = jax.eval_shape(lambda x, b: mechanism.start(x, History(b)), token, buffers)
    numbers = sum(buffer.size for buffer in buffers)
    width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    per_layer = sum(leaf.size for leaf in jax.tree.leaves(carry))
    if remat != "full":
        per_layer += 2 * width + 2 * kv_width + 2 * model.num_heads
    if remat == "save_products":
        per_layer += width + 2 * kv_width + 2 * model.embed_dim + 2 * model.mlp_dim
    numbers += model.num_layers * per_layer
    return numbers * jnp.dtype(execution.compute_dtype).itemsize


def device_memory(device: jax.Device) -> int | None:
    """Bytes that JAX may take on a device; None if it does not say."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is only compiled for
        return None


def describe_execution(config: Config, resolved: Resolved) -> dict[str, str]:
    """What the first screen says of a training step: attention, and each choice with its reason.

    A run that falls to a slow backend has a line `WARNING`.

    Call it under the run's mesh. Raises what the attention call raises, for instance that no
    implementation takes it.
    """
    model, execution = config.model, resolved.execution
    rows = config.batch_size // config.accumulation_steps
    dtype = jnp.dtype(execution.compute_dtype)
    kv_shape = rows, config.data.seq_len, model.num_kv_heads, model.head_dim
    query = jax.ShapeDtypeStruct((*kv_shape[:2], model.num_heads, model.head_dim), dtype)
    key = jax.ShapeDtypeStruct(kv_shape, dtype)
    mechanism = make_mechanism(model)
    layout = mechanism.gather_layout()
    depth = bias = None
    if layout is not None:
        depth = jax.ShapeDtypeStruct((mechanism.num_entries, *kv_shape), dtype)
        if layout.has_score_bias:
            bias = jax.ShapeDtypeStruct((model.num_heads,), jnp.float32)
    found: list[tuple[AttentionChoice, Choice | None]] = []

    def trace(query, key, depth, bias, segment_ids):
        call = ShardedAttention.of(
            query,
            key,
            key,
            depth,
            depth,
            segment_ids=segment_ids,
            depth_window=None if layout is None else layout.window,
            depth_bias=bias,
            implementation=None if execution.attention == "auto" else execution.attention,
        )
        choice = choose(layout, execution, call) if mechanism.num_entries else None
        found.append((call.choice(), choice))
        return query

    segments = jax.ShapeDtypeStruct(kv_shape[:2], jnp.int32)
    jax.eval_shape(trace, query, key, depth, bias, segments)
    ((attention, choice),) = found
    lines = {"attention": str(attention)}
    if attention.is_slow and execution.attention == "auto":
        lines[WARNING] = _describe_slow(attention)
    how = [
        f"{name.replace('compute_', '')} {getattr(execution, name)}{_because(resolved, name)}"
        for name in ("compute_dtype", "remat")
    ]
    if choice is not None:
        way = f"gathered, {choice.block} layers a pass" if choice.gathers else "added"
        how.append(f"slot gradients {way}, {choice.dtype} ({choice.reason})")
    return lines | {"execution": "; ".join(how)}


def _describe_slow(attention: AttentionChoice) -> str:
    reasons = "; ".join(f"{name}: {why}" for name, why in attention.unsupported_reasons.items())
    old = jax.__version_info__ < (0, 11)
    remedy = "; JAX 0.11 has the GPU kernels, and needs Python 3.12 or newer" if old else ""
    return (
        f"slow: attention falls to {attention.name}, which was not built for "
        f"{attention.platform} ({reasons}){remedy if attention.platform == 'gpu' else ''}"
    )


def _because(resolved: Resolved, name: str) -> str:
    return f" ({resolved.reasons[name]})" if name in resolved.reasons else ""
