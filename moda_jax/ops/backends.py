"""The registry of attention implementations: the one place where a backend is registered."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu, mosaic_tpu, platforms, reference, triton_gpu, xla
from pallas_kernels.contract import (
    ArrayPair,
    Backward,
    Forward,
    GatheringKernels,
    UnsupportedReason,
)
from pallas_kernels.operands import Gradients, Operands, Options
from pallas_kernels.varying import axes as varying_axes


class SlowAttentionWarning(UserWarning):
    """The chosen implementation is not the one built for this kind of device."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of the operator; `pallas_kernels.contract` types its functions."""

    name: str
    forward: Forward
    backward: Backward | None
    """None: JAX differentiates the forward."""
    unsupported_reason: UnsupportedReason
    fast_on: tuple[str, ...]
    """Platforms for which it was built; chosen elsewhere, the user is warned."""
    only_by_name_on: tuple[str, ...] = ()
    """Platforms where it runs (interpreted, for tests) but `implementation=None` never takes it."""
    gathering: GatheringKernels | None = None
    """None: the layer stack adds the slots' gradients to a running cache instead."""
    checks_varying: bool = True
    """Whether it runs inside `jax.shard_map` with its default `check_vma=True`."""

    def gradients(
        self,
        operands: Operands,
        options: Options,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
        d_lse: jax.Array | None,
        depth_grads: ArrayPair | None = None,
        *,
        depth: bool = True,
    ) -> Gradients:
        """As `contract.Backward`, for every backend."""
        if self.backward is not None:
            return self.backward(
                operands, options, out, lse, d_out, d_lse, depth_grads, depth=depth
            )

        def attend(*arrays):
            own = dict(zip(Gradients._fields, arrays, strict=True))
            return self.forward(operands._replace(**own), options)

        (_, lse), vjp = jax.vjp(attend, *operands[: len(Gradients._fields)])
        grads = Gradients(*vjp((d_out, jnp.zeros_like(lse) if d_lse is None else d_lse)))
        if not depth:
            return grads._replace(depth_key=None, depth_value=None)
        if depth_grads is None:
            return grads
        assert grads.depth_key is not None
        assert grads.depth_value is not None
        return grads._replace(
            depth_key=(depth_grads[0] + grads.depth_key).astype(depth_grads[0].dtype),
            depth_value=(depth_grads[1] + grads.depth_value).astype(depth_grads[1].dtype),
        )


# Fastest first: `implementation=None` takes the first that supports the call.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "mosaic_gpu",
            mosaic_gpu.forward,
            mosaic_gpu.backward,
            mosaic_gpu.unsupported_reason,
            checks_varying=False,
            fast_on=("gpu",),
            only_by_name_on=("cpu",),
            gathering=mosaic_gpu.GATHERING,
        ),
        Backend(
            "triton",
            triton_gpu.forward,
            triton_gpu.backward,
            triton_gpu.unsupported_reason,
            fast_on=("gpu",),
            only_by_name_on=("cpu",),
        ),
        Backend(
            "mosaic_tpu",
            mosaic_tpu.forward,
            mosaic_tpu.backward,
            mosaic_tpu.unsupported_reason,
            checks_varying=False,
            fast_on=("tpu",),
            only_by_name_on=("cpu",),
        ),
        Backend(
            "xla",
            xla.forward,
            xla.backward,
            xla.unsupported_reason,
            fast_on=("cpu",),
            gathering=xla.GATHERING,
        ),
        Backend(
            "reference",
            reference.forward,
            None,
            reference.unsupported_reason,
            fast_on=(),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class AttentionChoice:
    """Which implementation a call gets, and why the faster ones do not take it."""

    name: str
    platform: str
    unsupported_reasons: dict[str, str]
    """By backend, for every backend that cannot do the call."""
    is_slow: bool
    """No kernel built for this platform takes the call."""

    def __str__(self) -> str:
        reasons = "".join(
            f"; {name}: {reason}" for name, reason in self.unsupported_reasons.items()
        )
        slow = f" (no kernel built for {self.platform} takes this call)" if self.is_slow else ""
        return f"{self.name} on {self.platform}{slow}{reasons}"


def choose(operands: Operands, options: Options, implementation: str | None) -> AttentionChoice:
    """The first backend that takes the call, or the one asked for.

    Raises:
      ValueError: `implementation` is not a registered name.
      NotImplementedError: the named backend, or every one, cannot do the call; with each reason.
    """
    if implementation is not None and implementation not in BACKENDS:
        raise ValueError(
            f"implementation: expected None or one of {', '.join(BACKENDS)}, got {implementation!r}"
        )
    platform = platforms.current()
    unsupported = {
        name: reason
        for name, backend in BACKENDS.items()
        if (reason := backend.unsupported_reason(operands, options, platform)) is not None
    }
    if varying := varying_axes(operands):
        reason = (
            f"Pallas kernels do not say over which axes of the mesh ({', '.join(sorted(varying))}) "
            "their results vary: pass check_vma=False to jax.shard_map"
        )
        unsupported |= {
            name: reason
            for name, backend in BACKENDS.items()
            if name not in unsupported and not backend.checks_varying
        }
    if implementation is None:
        unsupported |= {
            name: f"interpreted on {platform}, so only when asked for by name"
            for name, backend in BACKENDS.items()
            if name not in unsupported and platform in backend.only_by_name_on
        }
    candidates = list(BACKENDS) if implementation is None else [implementation]
    chosen = next((name for name in candidates if name not in unsupported), None)
    if chosen is None:
        reasons = "; ".join(f"{name}: {unsupported[name]}" for name in candidates)
        raise NotImplementedError(f"no attention implementation takes this call: {reasons}")
    is_slow = platform not in BACKENDS[chosen].fast_on
    return AttentionChoice(chosen, platform, unsupported, is_slow)


@functools.cache
def warn_once(message: str, stacklevel: int = 4) -> None:
    """A `SlowAttentionWarning` that points at the caller of the caller's caller, or beyond."""
    warnings.warn(message, SlowAttentionWarning, stacklevel=stacklevel)


def resolve(
    operands: Operands, options: Options, implementation: str | None, stacklevel: int = 4
) -> Backend:
    """`choose`, with a warning (once per reason) where it had to choose a slow backend."""
    choice = choose(operands, options, implementation)
    if choice.is_slow and implementation is None:
        warn_once(f"slow attention: {choice}", stacklevel)
    return BACKENDS[choice.name]
