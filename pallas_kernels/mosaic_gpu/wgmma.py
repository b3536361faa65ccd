"""What the kernels share: tiles of 64 rows, their products, scalars, work per thread block."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms
from pallas_kernels.mosaic_gpu import common

ROWS = 64  # of a tile: the M of one wgmma
TOKEN_ALIGNMENT = 8  # rows of a swizzled TMA tile; token axes are padded to it
LOG2E = 1.4426950408889634
NO_SEGMENT = -(2**31)  # of a padding query: equals no key's segment
L2_BYTES = 24 * 2**20  # for keys and values; the cache has 50 MB (H100) or 60 MB (H200)


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def i32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def div(x: jax.Array, y: int) -> jax.Array:
    return lax.div(x, i32(y))


def rem(x: jax.Array, y: int) -> jax.Array:
    return lax.rem(x, i32(y))


def divmod_i32(x: jax.Array, y: int) -> tuple[jax.Array, jax.Array]:
    return div(x, y), rem(x, y)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    plgpu = common.mosaic()
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector along one axis of a tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def load_columns(ref: Any) -> jax.Array:
    """A vector of a ring stage, along a tile's columns."""
    plgpu = common.mosaic()
    vector = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))
    end_reads()
    return vector


def end_reads() -> None:
    """Tells the interpreter that ordinary reads of a stage precede the copy that overwrites it.

    It asks for a fence between the two; on the chip the barrier that frees the stage orders them.
    """
    if platforms.interpreted():
        common.mosaic().commit_smem()


def accumulate(total: jax.Array, *products: tuple[jax.Array, Any]) -> jax.Array:
    """total + a @ b + ... by wgmma; a in registers, b in shared memory."""
    pl, plgpu = common.pallas(), common.mosaic()
    if platforms.interpreted():  # the interpreter multiplies references only, from zero
        for a, b in products:
            total += jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        end_reads()
        return total

    def add(acc):
        for a, b in products:
            plgpu.wgmma(acc, a, b)

    return pl.run_state(add)(plgpu.ACC.init(total))


def two_products(first, second, shape: tuple[int, int], use_first):
    """a @ b twice, issued together; `use_first` runs beside the second product."""
    pl, plgpu = common.pallas(), common.mosaic()

    def products(first_acc, second_acc):
        plgpu.wgmma(first_acc, *first)
        plgpu.wgmma(second_acc, *second)
        used = use_first(plgpu.wgmma_accumulator_load(first_acc, wait_n=1))
        return used, plgpu.wgmma_accumulator_load(second_acc, wait_n=0)

    acc = plgpu.ACC(shape, jnp.float32)
    return pl.run_scoped(products, acc, acc)


def key_products(tiles, shape: tuple[int, int], weights, minus_delta, dk, dv):
    """dk / scale and dv with a block of queries added: four products, two of which run at a time.

    tiles: keys, values, queries and their do, in shared memory. shape: [keys, queries], since the
    scores are transposed. weights: scores -> p. The accumulator of v do^T starts from -delta, which
    saves the subtraction.
    """
    pl, plgpu = common.pallas(), common.mosaic()
    k_ref, v_ref, q_ref, do_ref = tiles
    dtype = q_ref.dtype
    scores = (k_ref, q_ref.transpose((1, 0)))
    d_weights = (v_ref, do_ref.transpose((1, 0)))
    if platforms.interpreted():  # the interpreter cannot initialise an accumulator
        p, dp = two_products(scores, d_weights, shape, weights)
        ds = p * (dp + minus_delta)
        dv = accumulate(dv, (p.astype(dtype), do_ref))
        return accumulate(dk, (ds.astype(dtype), q_ref)), dv

    def update(accs):
        dk_acc, dv_acc, dp_acc = accs

        def products(s_acc):
            plgpu.wgmma(s_acc, *scores)
            plgpu.wgmma(dp_acc, *d_weights)
            p = weights(plgpu.wgmma_accumulator_load(s_acc, wait_n=1))
            plgpu.wgmma(dv_acc, p.astype(dtype), do_ref)
            ds = p * plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
            plgpu.wgmma(dk_acc, ds.astype(dtype), q_ref)

        pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))

    accs = (plgpu.ACC.init(x) for x in (dk, dv, minus_delta))
    return pl.run_state(update)(tuple(accs))[:2]


def split_roles(
    count: int,
    compute: Callable[[jax.Array], None],
    load: Callable[[], None],
    depth: Callable[[jax.Array], None] | None = None,
) -> None:
    """The first `count` warpgroups compute, the next one loads; `depth`: `count` more do slots."""
    plgpu = common.mosaic()
    warpgroup = lax.axis_index("warpgroup")
    registers: tuple[int, ...] = {1: (240, 40), 2: (232, 40), 3: (160, 32)}[count]
    if depth is not None:  # each thread of the five warpgroups starts with 96
        registers = (136, 24, 88)

    def compute_role():
        plgpu.set_max_registers(registers[0], action="increase")
        compute(warpgroup)

    def load_role():
        plgpu.set_max_registers(registers[1], action="decrease")
        load()

    def depth_role():
        plgpu.set_max_registers(registers[2], action="decrease")
        depth(warpgroup - count - 1)

    common.when(warpgroup < count, compute_role)
    common.when(warpgroup == count, load_role)
    if depth is not None:
        common.when(warpgroup > count, depth_role)


def wait_free(barriers: Any, step: jax.Array, stages: int) -> None:
    """Waits until the previous block in this step's ring stage has been read, if there was one."""
    plgpu = common.mosaic()
    common.when(step >= stages, lambda: plgpu.barrier_wait(barriers.at[rem(step, stages)]))


def drain(barriers: Any, steps: jax.Array, stages: int) -> None:
    """Waits for every arrival, so that no barrier ends in the middle of a phase."""
    plgpu = common.mosaic()

    def wait(step, _):
        plgpu.barrier_wait(barriers.at[rem(step, stages)])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)


def heads_together(count: int, length: int, head_dim: int) -> int:
    """How many of `count` KV heads are worked on side by side: as many as the L2 cache holds.

    The tiles of several heads, sorted by their work, keep the multiprocessors busy until the end.
    """
    fit = max(1, L2_BYTES // max(1, 2 * length * head_dim * 2))
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= fit)


def place(number: jax.Array, together: int, per_head: int) -> tuple[jax.Array, jax.Array]:
    """The head and the tile within it of the `number`-th piece of work."""
    span, rest = divmod_i32(number, per_head * together)
    index, head = divmod_i32(rest, together)
    return span * together + head, index


def pad_tokens(x: jax.Array, axis: int) -> jax.Array:
    """The token axis padded with zeros to what TMA tiles need; a copy only where it must be."""
    return common.pad_tokens(x, axis, TOKEN_ALIGNMENT)


def pad_rows(x: jax.Array, tokens: int) -> jax.Array:
    """[B, T, ...] with T padded, and never exactly one tile's tokens.

    A slice as long as its axis loses its start when compiled: tiles past the end would overwrite
    the first one.
    """
    x = pad_tokens(x, 1)
    return common.pad_tokens(x, 1, tokens + TOKEN_ALIGNMENT) if x.shape[1] == tokens else x


class Walk(NamedTuple):
    """The blocks that a tile meets, [start, stop): those that need no mask, then the others."""

    start: Any
    stop: Any
    plain_start: Any
    plain_stop: Any

    @classmethod
    def of(cls, start, stop, plain_start, plain_stop, bounds=None) -> "Walk":
        """Narrowed by `bounds`, a reference to a tile's row of `segment_bounds`, if given."""
        if bounds is not None:
            start = jnp.maximum(start, jnp.minimum(bounds[0], stop))
            stop = jnp.maximum(start, jnp.minimum(bounds[1], stop))
            plain_start = jnp.maximum(plain_start, bounds[2])
            plain_stop = jnp.minimum(plain_stop, bounds[3])
        plain_start = jnp.clip(plain_start, start, stop)
        return cls(start, stop, plain_start, jnp.clip(plain_stop, plain_start, stop))

    @property
    def plain(self) -> Any:
        """How many need no mask."""
        return self.plain_stop - self.plain_start

    @property
    def count(self) -> Any:
        return self.stop - self.start

    def nth(self, i: Any) -> Any:
        """The i-th block of the walk."""
        masked = i - self.plain
        before = self.plain_start - self.start
        after = self.plain_stop + (masked - before)
        masked = jnp.where(masked < before, self.start + masked, after)
        return jnp.where(i < self.plain, self.plain_start + i, masked)
