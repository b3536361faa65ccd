"""The functional depth-KV carry: what earlier layers wrote for the tokens at hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moda_jax.ops.explicit import spec_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DepthCache:
    """Depth keys and values, slot-major, and the number of slots written so far.

    Three kinds, chosen by `empty`:
      * unbounded: every written slot is visible;
      * bounded (`window`, `reserved`): the buffer keeps every slot, but only the first `reserved`
        and the last `window` written ones are visible. For training: the backward still finds
        each layer's view as a range of one append-only buffer;
      * ring (`ring=True`): the same visible slots in a buffer of only reserved + window slots;
        an append to a full ring overwrites the oldest slot that is not reserved. For inference
        only: what was overwritten cannot be differentiated.

    Source: design of bounded slots, arXiv 2603.15619 section 6.2.
    """

    key: jax.Array  # [S, B, T, K, H]
    value: jax.Array  # [S, B, T, K, H]
    length: jax.Array  # int32 scalar: slots appended so far, evicted ones included
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    reserved: int = dataclasses.field(default=0, metadata={"static": True})
    ring: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        num_slots: int,
        batch: int,
        length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any = jnp.bfloat16,
        *,
        window: int | None = None,
        reserved: int = 0,
        ring: bool = False,
    ) -> "DepthCache":
        """A cache for `num_slots` appends to `length` tokens.

        A ring holds reserved + window slots and takes any number of appends; where `num_slots` is
        no more than that, nothing is ever evicted and the cache is the bounded kind.

        Inside `jax.shard_map` its arrays vary over all manual axes, so that a loop can carry them.

        Raises ValueError on negative sizes, on `reserved` or `ring` without a `window`.
        """
        for name, size in (("num_slots", num_slots), ("reserved", reserved)):
            if size < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {size}")
        if window is not None and window < 1:
            raise ValueError(f"window: expected None or a positive number of slots, got {window}")
        if window is None and (reserved or ring):
            raise ValueError(
                f"window: expected slots, since reserved={reserved} and ring={ring}, got None"
            )
        if ring and num_slots > reserved + window:  # type: ignore[operator]
            num_slots = reserved + window  # type: ignore[operator]
        else:  # a buffer that holds every append never turns
            ring = False
        shape = (num_slots, batch, length, num_kv_heads, head_dim)
        # Two buffers, not one twice: the cache may be donated.
        key, value = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        # Inside `shard_map` a loop's carry must vary over the axes that what is appended does.
        manual = jax.sharding.get_abstract_mesh().manual_axes
        if manual:
            key, value = (lax.pcast(x, manual, to="varying") for x in (key, value))
        return cls(key, value, jnp.int32(0), window, reserved, ring)

    @property
    def capacity(self) -> int:
        """Slots of the buffer."""
        return self.key.shape[0]

    def visible(self) -> jax.Array:
        """[S] bool: which slots of the buffer attention sees now."""
        slot = jnp.arange(self.capacity)
        seen = slot < self.length
        if self.ring or self.window is None:
            return seen
        return seen & ((slot < self.reserved) | (slot >= self.length - self.window))

    def evicts(self) -> jax.Array:
        """int32: the buffer index that the next append overwrites, or -1 if it takes a free one.

        Only a full ring evicts; the other kinds hide slots, but keep them.
        """
        if not self.ring:
            return jnp.int32(-1)
        return jnp.where(self.length < self.capacity, -1, self._next_index())

    def _next_index(self) -> jax.Array:
        if not self.ring:
            return self.length
        turning = self.capacity - self.reserved
        wrapped = self.reserved + (self.length - self.reserved) % turning
        return jnp.where(self.length < self.reserved, self.length, wrapped)

    def append(
        self,
        key: jax.Array,
        value: jax.Array,
        *,
        where: jax.Array | bool = True,
        fits: bool = False,
    ) -> "DepthCache":
        """The cache with one more slot: key and value [B, T, K, H], one contiguous write each.

        With a leading axis, [n, B, T, K, H], n slots: still one write each, unless it is a ring.
        `where` (bool scalar, may be traced): False leaves the cache as it is. Raises ValueError on
        a wrong shape, and on a full cache where the length is concrete; where it is traced, an
        append to a full cache that is no ring is dropped. `fits`: the caller vouches for room under
        a traced length, and nothing is dropped; with `where` True, too, the write need not read
        what it overwrites.
        """
        for name, x in (("key", key), ("value", value)):
            if x.shape[-4:] != self.key.shape[1:] or x.ndim > 5 or x.shape != key.shape:
                raise ValueError(
                    f"{name}: expected {self.key.shape[1:]} (or several slots, with a leading "
                    f"axis), got {x.shape}"
                )
        if key.ndim == 4:
            key, value = key[None], value[None]
        count = key.shape[0]
        if self.ring and count > 1:
            cache = self
            for n in range(count):
                cache = cache.append(key[n], value[n], where=where)
            return cache
        if not self.ring:
            room = self.length + count <= self.capacity
            overflows = ~room & where
            if not isinstance(overflows, jax.core.Tracer) and overflows:
                raise ValueError(
                    f"append: expected at most {self.capacity} slots in all, got {count} more "
                    f"after {self.length}"
                )
            where = where if fits else room & where
        index = self._next_index()
        return dataclasses.replace(
            self,
            key=_write(self.key, key, index, where),
            value=_write(self.value, value, index, where),
            length=self.length + count * jnp.int32(where),
        )

    def attention_kwargs(self) -> dict[str, Any]:
        """The depth arguments of `moda_attention` for the slots that are visible now."""
        depth = {"depth_key": self.key, "depth_value": self.value}
        if self.ring:  # a softmax does not care for the order of the slots
            return depth | {"depth_length": jnp.minimum(self.length, self.capacity)}
        return depth | {
            "depth_length": self.length,
            "depth_window": self.window,
            "depth_reserved": self.reserved,
        }


def _write(buffer: jax.Array, slots: jax.Array, index: jax.Array, where: jax.Array | bool):
    """buffer[index : index + n] = slots if `where`; touches nothing else: it stays in place."""
    if spec_of(slots) != spec_of(buffer):  # a loop's carry keeps its type
        slots = jax.sharding.reshard(slots, spec_of(buffer))
    if where is True:
        return lax.dynamic_update_slice_in_dim(buffer, slots.astype(buffer.dtype), index, 0)
    if buffer.shape[0] < slots.shape[0]:
        return buffer
    old = lax.dynamic_slice_in_dim(buffer, index, slots.shape[0], 0)
    slots = jnp.where(where, slots.astype(buffer.dtype), old)
    return lax.dynamic_update_slice_in_dim(buffer, slots, index, 0)
