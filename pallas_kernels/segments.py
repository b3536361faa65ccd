"""Which blocks of tokens a tile of tokens meets, by the segments of packed documents."""

import jax
import jax.numpy as jnp


def segment_bounds(tiles: jax.Array, others: jax.Array, block: int) -> jax.Array:
    """[B, tiles, 4]: the range of blocks that a tile may meet, and the range that it meets wholly.

    Both ranges [start, stop) count blocks of `others`. A tile meets a block wholly where all tokens
    of both are of one segment. The ranges follow from the smallest and largest segment of each tile
    and block: they are exact for packed documents. For other ids the first range may be too wide
    and the second too narrow.

    Args:
      tiles: [B, tiles, rows] int32, segments of a tile's rows; 0 is padding.
      others: [B, length] int32, segments of the other side's tokens.
      block: tokens of a block.
    """
    low, high = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min

    def extremes(x):
        return jnp.where(x == 0, low, x).min(-1), jnp.where(x == 0, high, x).max(-1)

    def alone(x):
        """The segment of all, or 0."""
        return jnp.where(x.min(-1) == x.max(-1), x[..., 0], 0)

    others = jnp.pad(others, ((0, 0), (0, -others.shape[1] % block)))
    others = others.reshape(others.shape[0], -1, block)
    (t_min, t_max), (o_min, o_max) = extremes(tiles), extremes(others)
    meet = (t_min[:, :, None] <= o_max[:, None]) & (o_min[:, None] <= t_max[:, :, None])
    some = meet.any(-1)
    first = jnp.where(some, meet.argmax(-1), 0)
    stop = jnp.where(some, others.shape[1] - meet[..., ::-1].argmax(-1), 0)
    one = alone(tiles)[:, :, None]
    whole = (one == alone(others)[:, None]) & (one != 0)
    whole_first = whole.argmax(-1)
    # The first run of such blocks; where segments are contiguous there is only one.
    beyond = ~whole & (jnp.arange(others.shape[1]) >= whole_first[..., None])
    whole_stop = jnp.where(beyond.any(-1), beyond.argmax(-1), others.shape[1])
    return jnp.stack([first, stop, whole_first, whole_stop], -1).astype(jnp.int32)
