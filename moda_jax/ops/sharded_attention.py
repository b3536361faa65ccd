"""The model's attention call, run by every device on its own rows and heads.

The compiler cannot split a kernel: left to itself it gathers all operands on every device, or
fails. Attention mixes neither rows nor key/value heads, so under a mesh of several devices the
call runs per shard (`jax.shard_map`), with nothing to exchange; on one device it is a plain call.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moda_jax.ops import attention, backends, depth_bias
from moda_jax.ops.explicit import OPERAND_AXES
from moda_jax.ops.sharding import compiler_axes, partition_spec
from pallas_kernels.contract import ArrayPair, GatheringKernels
from pallas_kernels.operands import Gradients, KeptLayers, Operands, Options, num_kv_heads
from pallas_kernels.varying import vary_like

_QUERY, _KEY = OPERAND_AXES["query"], OPERAND_AXES["key"]


@dataclasses.dataclass(frozen=True)
class ShardedAttention:
    """One checked call. Each device picks the backend by the shapes that it gets itself."""

    operands: Operands
    options: Options
    implementation: str | None
    depth_bias: jax.Array | None = None
    """[N] float32, added to the scores of depth slots; only beside a sequence."""

    @classmethod
    def of(
        cls,
        *arrays: Any,
        implementation: str | None = None,
        depth_bias: jax.Array | None = None,
        **settings: Any,
    ) -> "ShardedAttention":
        """A call with the arguments of `moda_attention` but `return_lse`; raises what it raises."""
        operands, options = attention.check(*arrays, implementation=implementation, **settings)
        return cls(operands, options, implementation, depth_bias)

    def forward(self) -> tuple[jax.Array, jax.Array]:
        """(o, lse), as `moda_attention` with return_lse; not differentiable.

        Raises:
          ValueError: the current mesh's tensor axis does not divide the key/value heads.
        """
        if self.depth_bias is not None:
            return depth_bias.forward(self, self.depth_bias)

        def attend(operands: Operands) -> tuple[jax.Array, jax.Array]:
            return vary_like(self.backend_for(operands).forward(operands, self.options), operands)

        specs = self.specs()
        return _per_shard(attend, (self.operands,), (specs,), (specs.query, _of_lse(specs)))

    def gradients(
        self,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
        depth_grads: ArrayPair | None,
    ) -> Gradients:
        """The backward of `forward`; `depth_grads`: see `contract.Backward`."""
        self.assert_rows(out, lse, d_out)
        if depth_grads is not None:
            assert self.operands.depth_key is not None
            chex.assert_shape(depth_grads, self.operands.depth_key.shape)
        if self.depth_bias is not None:
            return depth_bias.gradients(self, self.depth_bias, out, lse, d_out, depth_grads)

        def attend(operands, out, lse, d_out, depth_grads) -> Gradients:
            gradients = self.backend_for(operands).gradients(
                operands, self.options, out, lse, d_out, None, depth_grads
            )
            return vary_like(gradients, operands)

        specs = self.specs()
        query, lse_spec, depth = specs.query, _of_lse(specs), specs.depth_key
        return _per_shard(
            attend,
            (self.operands, out, lse, d_out, depth_grads),
            (specs, query, lse_spec, query, None if depth_grads is None else (depth, depth)),
            Gradients(*specs[: len(Gradients._fields)]),
        )

    def bias_gradient(self, out: jax.Array, lse: jax.Array, d_out: jax.Array) -> jax.Array | None:
        """Of `depth_bias`, [N] float32; None if there is none."""
        if self.depth_bias is None:
            return None
        return depth_bias.bias_gradient(self, self.depth_bias, out, lse, d_out)

    def assert_rows(self, out: jax.Array, lse: jax.Array, d_out: jax.Array) -> None:
        """o and do are [B, Tq, N, H], lse is [B, Tq, N]."""
        shape = self.operands.query.shape
        chex.assert_shape([out, d_out], shape)
        chex.assert_shape(lse, shape[:3])

    def backend(self) -> backends.Backend:
        """The backend that a device picks."""
        return backends.BACKENDS[self.choice().name]

    def choice(self) -> backends.AttentionChoice:
        """Which backend a device picks, and why not the others."""
        found = []

        def attend(operands: Operands) -> jax.Array:
            found.append(backends.choose(operands, self.options, self.implementation))
            return operands.query

        specs = self.specs()
        jax.eval_shape(lambda x: _per_shard(attend, (x,), (specs,), specs.query), self.operands)
        return found[0]

    def backend_for(self, operands: Operands) -> backends.Backend:
        """The backend that is picked for the operands of one shard."""
        return backends.resolve(operands, self.options, self.implementation)

    def specs(self) -> Any:
        """Operands of PartitionSpecs: how each is split; None in the place of a missing one."""
        sizes = compiler_axes()
        tensor, kv_heads = sizes.get("tensor", 1), num_kv_heads(self.operands)
        if kv_heads % tensor:
            raise ValueError(
                f"num_kv_heads: expected a multiple of the mesh's tensor axis, {tensor}, got "
                f"{kv_heads}; make mesh.tensor smaller and mesh.fsdp larger"
            )
        specs: Any = {
            name: None if x is None else partition_spec(OPERAND_AXES[name], x.shape, sizes)
            for name, x in self.operands._asdict().items()
        }
        return Operands(**specs)


@dataclasses.dataclass(frozen=True)
class ShardedGathering:
    """Depth gradients from the layers whose queries read the slots.

    The calls of all layers pick the same backend, the one that `kernels` are of.
    """

    kernels: GatheringKernels
    scale: float

    def empty(self, call: ShardedAttention, num_layers: int) -> KeptLayers:
        """Uninitialized memory [num_layers, ...] for what `gradients` keeps of such calls.

        Every device allocates its own shard: XLA allocates an array that is made whole and split
        afterwards in full on every device.
        """

        def make(operands: Operands) -> KeptLayers:
            def keep(operands):
                out, lse = operands.query, jnp.zeros(operands.query.shape[:3], jnp.float32)
                return self.kernels.keep(operands, out, lse, out, None)

            one = jax.eval_shape(keep, operands)
            return KeptLayers(*(lax.empty((num_layers, *x.shape), x.dtype) for x in one))

        specs = call.specs()
        kept: Any = (PartitionSpec(None, *x) for x in _of_kept(specs.query, specs.key))
        return _per_shard(make, (call.operands,), (specs,), KeptLayers(*kept))

    def gradients(
        self, call: ShardedAttention, out: jax.Array, lse: jax.Array, d_out: jax.Array
    ) -> tuple[Gradients, KeptLayers]:
        """The backward without the slots' gradients, and what is kept for those."""
        call.assert_rows(out, lse, d_out)

        def attend(operands, out, lse, d_out) -> tuple[Gradients, KeptLayers]:
            grads = call.backend_for(operands).gradients(
                operands, call.options, out, lse, d_out, None, depth=False
            )
            kept = self.kernels.keep(operands, out, lse, d_out, None)
            return vary_like((grads, kept), operands)

        specs = call.specs()
        query, key, value = specs[:3]
        return _per_shard(
            attend,
            (call.operands, out, lse, d_out),
            (specs, query, _of_lse(specs), query),
            (Gradients(query, key, value, None, None), _of_kept(query, key)),
        )

    def gather(
        self,
        kept: KeptLayers,
        depth_key: jax.Array,
        depth_value: jax.Array,
        *,
        layers: tuple[jax.Array | int, jax.Array | int],
        first: jax.Array | int,
        count: int,
        dtype: Any,
        so_far: ArrayPair | None = None,
        offset: jax.Array | int = 0,
    ) -> ArrayPair:
        """What the layers start ... stop - 1 of `kept` [L, ...] contribute to `count` slots.

        Arguments as `contract.GatherDepthGrads`.
        """
        chex.assert_rank([kept.query, kept.d_out], 5)
        chex.assert_rank(kept.rows, 4)
        chex.assert_shape([depth_key, depth_value], (None, *kept.query.shape[1:3], None, None))
        chex.assert_equal_shape_suffix([depth_key, depth_value, *(so_far or ())], 4)
        sizes = compiler_axes()
        query = partition_spec(_QUERY, kept.query.shape[1:], sizes)
        key = partition_spec(_KEY, depth_key.shape[1:], sizes)
        kept_specs: Any = (PartitionSpec(None, *x) for x in _of_kept(query, key))
        depth = PartitionSpec(None, *key)

        def on_shard(kept, depth_key, depth_value, scalars, so_far):
            start, stop, first, offset = scalars
            gradients = self.kernels.gather(
                kept,
                depth_key,
                depth_value,
                (start, stop),
                first,
                count,
                scale=self.scale,
                dtype=dtype,
                so_far=so_far,
                offset=offset,
            )
            return vary_like(gradients, kept)

        scalars = tuple(jnp.int32(x) for x in (*layers, first, offset))
        pair = depth, depth
        return _per_shard(
            on_shard,
            (kept, depth_key, depth_value, scalars, so_far),
            (
                KeptLayers(*kept_specs),
                depth,
                depth,
                (PartitionSpec(),) * 4,
                None if so_far is None else pair,
            ),
            pair,
        )


def _of_kept(query: Any, key: Any) -> KeptLayers:
    rows: Any = PartitionSpec(key[0], key[2], None)
    return KeptLayers(query, query, rows)


def _of_lse(specs: Any) -> PartitionSpec:
    return PartitionSpec(*specs.query[:3])


def _per_shard(function: Callable, arguments: Any, in_specs: Any, out_specs: Any) -> Any:
    sizes = compiler_axes(at_least=1)
    if max(sizes.values(), default=1) == 1:
        return function(*arguments)
    # Axes of one device are taken along: a TPU kernel wants every axis of the mesh to be manual.
    # Kernels do not say over which axes their results vary, so that cannot be checked.
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=set(sizes), check_vma=False
    )(*arguments)
