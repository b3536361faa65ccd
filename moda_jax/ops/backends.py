"""The roster of attention implementations: the one place where a backend is registered."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu, mosaic_tpu, platforms, reference, triton_gpu, xla
from pallas_kernels.operands import Gradients, KeptLayers, Operands, Options

Forward = Callable[[Operands, Options], tuple[jax.Array, jax.Array]]
Refusal = Callable[[Operands, Options, str], str | None]


class SlowAttentionWarning(UserWarning):
    """The chosen implementation is not the one built for this kind of device."""


class Gathering(NamedTuple):
    """How a backend computes a slot's gradient at once, from the layers that read it."""

    backward: Callable[..., Gradients]
    """(operands, options, o, lse, do, dlse): as a backend's backward, without gradients of slots.
    No chunk-visible slots."""
    keep: Callable[..., KeptLayers]
    """(operands, o, lse, do, dlse): what `gather` needs of a layer, without the axis R."""
    gather: Callable[..., tuple[jax.Array, jax.Array]]
    """See `pallas_kernels.xla.gather_depth_grads`. No chunk-visible slots."""
    refusal: Callable[[Operands], str | None]
    """Why it would cost more than adding for a call of these shapes; None if it would not."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of the operator. See `pallas_kernels` for the two functions' contract."""

    name: str
    forward: Forward
    backward: Callable[..., Gradients] | None
    """None: JAX differentiates the forward."""
    refusal: Refusal
    """Why this backend cannot do a call on a platform ("cpu", "gpu", "tpu"); None if it can."""
    fast_on: tuple[str, ...]
    """Platforms for which it was built; chosen elsewhere, the user is warned."""
    only_by_name_on: tuple[str, ...] = ()
    """Platforms where it runs (interpreted, for tests) but `implementation=None` never takes it."""
    gathering: Gathering | None = None
    """None: the layer stack adds slots' gradients to a running cache, whatever `depth_grad_mode`
    says."""

    def gradients(
        self,
        operands: Operands,
        options: Options,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
        d_lse: jax.Array | None,
        depth_grads: tuple[jax.Array, jax.Array] | None,
    ) -> Gradients:
        """The backward, adding into the running gradient cache `depth_grads` if one is given."""
        if self.backward is not None:
            return self.backward(operands, options, out, lse, d_out, d_lse, depth_grads)

        def attend(*arrays):
            own = dict(zip(Gradients._fields, arrays, strict=True))
            return self.forward(operands._replace(**own), options)

        (_, lse), vjp = jax.vjp(attend, *operands[: len(Gradients._fields)])
        grads = Gradients(*vjp((d_out, jnp.zeros_like(lse) if d_lse is None else d_lse)))
        if depth_grads is None:
            return grads
        assert grads.depth_key is not None
        assert grads.depth_value is not None
        return grads._replace(
            depth_key=(depth_grads[0] + grads.depth_key).astype(depth_grads[0].dtype),
            depth_value=(depth_grads[1] + grads.depth_value).astype(depth_grads[1].dtype),
        )


def _xla_refusal(operands: Operands, options: Options, platform: str) -> str | None:
    if operands.query.dtype.itemsize == 8:
        return "float64 is for the reference only"
    return None


def _reference_refusal(operands: Operands, options: Options, platform: str) -> str | None:
    return None


def _gathering(backend: Any) -> Gathering:
    return Gathering(
        backend.backward_without_depth_grads, backend.keep_layer, backend.gather_depth_grads,
        backend.gather_refusal,
    )  # fmt: skip


# Fastest first: `implementation=None` takes the first that does not refuse.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "mosaic_gpu", mosaic_gpu.forward, mosaic_gpu.backward, mosaic_gpu.refusal,
            fast_on=("gpu",), only_by_name_on=("cpu",),
            gathering=_gathering(mosaic_gpu),
        ),
        Backend(
            "triton", triton_gpu.forward, triton_gpu.backward, triton_gpu.refusal,
            fast_on=("gpu",), only_by_name_on=("cpu",),
        ),
        Backend(
            "mosaic_tpu", mosaic_tpu.forward, mosaic_tpu.backward, mosaic_tpu.refusal,
            fast_on=("tpu",), only_by_name_on=("cpu",),
        ),
        Backend(
            "xla", xla.forward, xla.backward, _xla_refusal, fast_on=("cpu",),
            gathering=_gathering(xla),
        ),
        Backend("reference", reference.forward, None, _reference_refusal, fast_on=()),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AttentionChoice:
    """Which implementation a call gets, and why the faster ones do not take it."""

    name: str
    platform: str
    refusals: dict[str, str]
    """Reason by backend, for every backend that cannot do the call."""
    is_slow: bool
    """No kernel built for this platform takes the call."""

    def __str__(self) -> str:
        reasons = "".join(f"; {name}: {reason}" for name, reason in self.refusals.items())
        slow = f" (no kernel built for {self.platform} takes this call)" if self.is_slow else ""
        return f"{self.name} on {self.platform}{slow}{reasons}"


def choose(operands: Operands, options: Options, implementation: str | None) -> AttentionChoice:
    """The first backend that takes the call, or the one asked for.

    Raises:
      ValueError: `implementation` is not a registered name.
      NotImplementedError: the named backend, or every backend, refuses; with each reason.
    """
    if implementation is not None and implementation not in BACKENDS:
        raise ValueError(
            f"implementation: expected None or one of {', '.join(BACKENDS)}, got {implementation!r}"
        )
    platform = platforms.current()
    refusals = {
        name: reason
        for name, backend in BACKENDS.items()
        if (reason := backend.refusal(operands, options, platform)) is not None
    }
    if implementation is None:
        refusals |= {
            name: f"interpreted on {platform}, so only when asked for by name"
            for name, backend in BACKENDS.items()
            if name not in refusals and platform in backend.only_by_name_on
        }
    candidates = list(BACKENDS) if implementation is None else [implementation]
    chosen = next((name for name in candidates if name not in refusals), None)
    if chosen is None:
        reasons = "; ".join(f"{name}: {refusals[name]}" for name in candidates)
        raise NotImplementedError(f"no attention implementation takes this call: {reasons}")
    is_slow = platform not in BACKENDS[chosen].fast_on
    return AttentionChoice(chosen, platform, refusals, is_slow)


@functools.cache
def warn_once(message: str) -> None:
    """A `SlowAttentionWarning` that points at the caller of the caller's caller."""
    warnings.warn(message, SlowAttentionWarning, stacklevel=4)


def resolve(operands: Operands, options: Options, implementation: str | None) -> Backend:
    """`choose`, with a warning (once per reason) where nobody asked for the slow way."""
    choice = choose(operands, options, implementation)
    if choice.is_slow and implementation is None:
        warn_once(f"slow attention: {choice}")
    return BACKENDS[choice.name]
