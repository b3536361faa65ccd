"""The linear-memory stack for other people's layers, given as the pieces around attention."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moda_jax.config import ExecutionConfig
from moda_jax.depth.mechanism import DepthView, GatherLayout, Step
from moda_jax.model.stack import StackParams, StackSpec, TokenInfo, run_stack
from moda_jax.ops.checks import check_integers, to_jax
from moda_jax.ops.history import History

Before = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
After = Callable[[Any, jax.Array, jax.Array], Any]


def depth_stack(
    before: Before,
    after: After,
    weights: Any,
    x: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    depth: bool = True,
    window: int | None = None,
    reserved: int = 0,
    execution: ExecutionConfig = ExecutionConfig(),
) -> jax.Array:
    """y = x after L layers of Mixture-of-Depths Attention, differentiable in `weights` and `x`.

    A layer is  query, key, value = before(w, x, positions);  o = attention(query; key, value, and
    the depth keys and values that earlier layers wrote at the same token);  x = after(w, x, o).
    Each layer writes its own key and value and, if `after` gives them, a second pair (its FFN's).
    Compiled once, whatever L is; memory is linear in L. Source: arXiv 2603.15619, Alg. 1.

    Args:
      before: a pure function, of one layer's weights, x [B, T, ...] and positions [B, T] int32, to
        query [B, T, N, H], key and value [B, T, K, H] (normed and rotated as the layer wants it; a
        depth key meets queries of its own position, so rotate all keys or none).
      after: a pure function, of one layer's weights, x and o [B, T, N, H], to y like x, or to
        (y, (depth_key, depth_value)), each [B, T, K, H].
      weights: a pytree of arrays with a leading axis [L, ...]; gradients have its dtypes.
      x: [B, T, ...], in the dtype that the layers compute in.
      positions: [B, T] int32; None: 0 … T−1.
      segment_ids: [B, T] int32, packed documents, 0 is padding, where x may hold anything; None:
        one document a row.
      depth: False: attention reads the sequence alone, the plain model to compare with.
      window, reserved: bounded slots: only the last `window` slots and the first `reserved` ones
        are visible (section 6.2 of the paper).
      execution: remat policy, attention implementation, how slots get their gradients.
        `compute_dtype` must be "auto": x and the weights have theirs.

    Raises:
      ValueError: shapes or dtypes that do not fit together; names what was expected and what came.
    """
    if execution.compute_dtype != "auto":
        raise ValueError(
            f'execution.compute_dtype: expected "auto", since x has its dtype, got '
            f"{execution.compute_dtype!r}"
        )
    num_layers = _num_layers(weights)
    x, weights = to_jax(x), jax.tree.map(to_jax, weights)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    else:
        positions = check_integers("positions", positions, x.shape[:2])
    if segment_ids is not None:
        segment_ids = check_integers("segment_ids", segment_ids, x.shape[:2])
        real = (segment_ids != 0).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        x = jnp.where(real, x, 0)
    program = _program(before, after, weights, x, positions, num_layers, depth, window, reserved)
    remat = "save_attention" if execution.remat == "auto" else execution.remat
    dtype: Any = str(x.dtype)
    execution = dataclasses.replace(execution, compute_dtype=dtype, remat=remat)
    spec = StackSpec(program, execution)
    return run_stack(spec, StackParams(weights, {}), x, TokenInfo(positions, segment_ids))


@dataclasses.dataclass(frozen=True)
class _Layers:
    """The stack's program for layers in two pieces."""

    before: Before
    after: After
    num_layers: int
    num_kv_heads: int
    head_dim: int
    per_layer: int
    """Slots that a layer writes: 0 without depth."""
    window: int | None
    reserved: int

    rope_theta = None

    def start(self, x: jax.Array, history: History) -> tuple[jax.Array, History]:
        """The layers' input."""
        return x, history

    def layer(
        self, weights: Any, step: Step, x: jax.Array, history: History
    ) -> tuple[jax.Array, History]:
        """before, attention, after; then what both of them wrote."""
        query, key, value = self.before(weights, x, step.positions)
        slot = step.layer * self.per_layer
        view = DepthView(slot, self.window, self.reserved, slot) if self.capacity else None
        out, history = step.attend(query, key, value, history, depth=view)
        result = self.after(weights, x, out)
        y, ffn = result if isinstance(result, tuple) else (result, None)
        if self.per_layer:
            entries = [(key, value), *([ffn] if self.per_layer == 2 else [])]
            history, y = history.append_after(entries, slot, y)
        return y, history

    def finish(self, x: jax.Array, history: History) -> tuple[jax.Array, History]:
        """The layers' result."""
        return x, history

    def entry_shapes(self, batch: int, length: int) -> tuple[tuple[int, ...], ...]:
        """A key and a value."""
        if not self.per_layer:
            return ()
        return ((batch, length, self.num_kv_heads, self.head_dim),) * 2

    @property
    def capacity(self) -> int:
        """Slots, the last layer's included."""
        return self.num_layers * self.per_layer

    @property
    def inference_capacity(self) -> int:
        """As in training."""
        return self.capacity

    @property
    def gathers(self) -> GatherLayout | None:
        """Attention alone reads the slots."""
        read = self.capacity - self.per_layer
        return GatherLayout(self.per_layer, 1, read) if read else None


def _program(before, after, weights, x, positions, num_layers, depth, window, reserved) -> _Layers:
    """Checks the two pieces against each other, without computing anything."""
    one = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), weights)
    query, key, value = jax.eval_shape(before, one, x, positions)
    batch, length = x.shape[:2]
    heads_ok = query.ndim == key.ndim == 4 and query.shape[3] == key.shape[3]
    if not heads_ok or key.shape[:2] != (batch, length) or value.shape != key.shape:
        raise ValueError(
            f"before: expected query [B, T, N, H], key and value [B, T, K, H] with B, T = "
            f"{(batch, length)}, got {query.shape}, {key.shape}, {value.shape}"
        )
    result = jax.eval_shape(after, one, x, query)
    y, ffn = result if isinstance(result, tuple) else (result, None)
    if (y.shape, y.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"after: expected y like x, {x.dtype}{list(x.shape)}, got {y.dtype}{list(y.shape)}"
        )
    if ffn is not None and [p.shape for p in ffn] != [key.shape] * 2:
        raise ValueError(
            f"after: expected a depth key and value of {key.shape}, got {[p.shape for p in ffn]}"
        )
    per_layer = (1 if ffn is None else 2) if depth else 0
    if window is not None and not depth:
        raise ValueError(f"window: expected None without depth, got {window}")
    return _Layers(
        before, after, num_layers, key.shape[2], key.shape[3], per_layer, window, reserved
    )


def _num_layers(weights: Any) -> int:
    lengths = {w.shape[0] if w.ndim else 0 for w in jax.tree.leaves(weights)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"weights: expected arrays with one leading axis of L layers, got lengths {lengths}"
        )
    return lengths.pop()
