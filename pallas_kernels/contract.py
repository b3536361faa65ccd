"""What a backend offers: the functions of its package, by type.

Symbols as in `operands`; shapes and dtypes of operands and results are those of `Operands`,
`Gradients` and `KeptLayers`. A package exports `forward`, `backward` and `unsupported_reason`, and
`GATHERING` if it can gather.
"""

from typing import Any, NamedTuple, Protocol

import jax

from pallas_kernels.operands import Gradients, KeptLayers, Operands, Options

ArrayPair = tuple[jax.Array, jax.Array]


class Forward(Protocol):
    """The operator on one call."""

    def __call__(self, operands: Operands, options: Options, /) -> ArrayPair:
        """o [B, Tq, N, H] in the query's dtype, lse [B, Tq, N] float32 (natural logarithm).

        A query that sees nothing gets o = 0 and lse = -inf. See `reference.forward`. Where a kernel
        merges two parts by their lse, or rounds scale·q·k before it subtracts the maximum, weights
        have the error that `Backward` states; `reference` and `xla` do neither.
        """


class Backward(Protocol):
    """The gradients of a call, from its unified (o, lse) alone.

    lse is float32, so that a weight e^(z - lse) has a relative error of up to 2^-24 |lse| times the
    number of roundings, 1 to 4: invisible while |lse| is below 100, 0.1% to 0.4% at 2^14. It is
    what a flash backward costs that keeps lse alone; gradients of `reference` do not have it.
    At |lse| of 2^29 a weight can overflow: `xla` keeps it at 1, so that nothing is NaN; kernels
    would need an operation per score for that, and do not.
    """

    def __call__(
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
        """Gradients in the dtypes of their operands; None for a missing operand.

        Args:
          operands, options: as the forward got them.
          out, lse: what the forward returned.
          d_out: [B, Tq, N, H], cotangent of o.
          d_lse: [B, Tq, N], cotangent of lse; None: 0.
          depth_grads: running gradients of the slots, a pair [S, B, Td, K, H], float32 or bfloat16.
            The gradients of the visible slots are added to them, in place where XLA can, and the
            sums returned in their dtype; other slots keep their bits. None: the slots' gradients
            are returned in the slots' dtype, 0 for slots that are not visible.
          depth: False: the slots' gradients are neither computed nor written, and None stands in
            their place; `depth_grads` is None then.
        """


class UnsupportedReason(Protocol):
    """Whether a backend can do a call."""

    def __call__(self, operands: Operands, options: Options, platform: str, /) -> str | None:
        """Why it cannot, on a platform ("cpu", "gpu", "tpu"); None: it can."""


class KeepLayer(Protocol):
    """What gathering needs of one layer."""

    def __call__(
        self,
        operands: Operands,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
        d_lse: jax.Array | None,
        /,
    ) -> KeptLayers:
        """Queries, output gradients, lse and delta, without the axis R. Arguments as `Backward`."""


class GatherDepthGrads(Protocol):
    """The gradients of a few slots from all layers whose queries read them."""

    def __call__(
        self,
        kept: KeptLayers,
        depth_key: jax.Array,
        depth_value: jax.Array,
        layers: tuple[Any, Any],
        first: Any,
        count: int,
        *,
        scale: float,
        dtype: Any,
        so_far: ArrayPair | None = None,
        offset: Any = 0,
    ) -> ArrayPair:
        """The slots' gradients dkd, dvd [count, B, T, K, H]: each is written once.

        Args:
          kept: of R layers, stacked; what the backend's `KeepLayer` returned.
          depth_key, depth_value: [S, B, T, K, H]. No chunk-visible slots.
          layers: (start, stop), int32 scalars, may be traced: the layers that read the slots, all
            `count` of them. The arrays of other layers may be uninitialized.
          first, count: the slots first ... first + count - 1; `first` may be traced.
          scale: of the scores.
          dtype: of the results, which are summed in float32.
          so_far: a pair [C, B, T, K, H], of which the `count` slots from `offset` on are added.
        """


class GatherUnsupportedReason(Protocol):
    """Whether gathering is worth it."""

    def __call__(self, operands: Operands, /) -> str | None:
        """Why it would cost more than adding for a call of these shapes; None if it would not."""


class GatheringKernels(NamedTuple):
    """How a backend computes a slot's gradient at once, from the layers whose queries read it."""

    keep: KeepLayer
    gather: GatherDepthGrads
    unsupported_reason: GatherUnsupportedReason
