"""MoDA for TPU v4 and later, in Pallas Mosaic TPU: two pairs of kernels, merged through (o, lse).

*Tokens in the lanes.* All arrays are read as [..., K, H, T]: a register holds 128 tokens of one
feature. A slot's tile is [K·H, tokens].

- No lane is empty at H = 64, in HBM or in registers; a tile of [tokens, H] would fill half of each.
- Sums over H and over keys run down the sublanes: plain additions, no exchange across lanes. What
  belongs to a query (maximum, sum, lse, delta) is a row of lanes, not a padded column.
- It costs no copy. XLA lays the cache [S, B, T, K, H] out this way by itself when a kernel reads
  its transpose. The other tile without empty lanes, [tokens, K·H], is no layout of that array:
  both caches were copied in every layer (`tests/test_mosaic_tpu_compiled.py` shows that none is).

*Depth* (`depth_forward`, `depth_backward`): a query meets S keys of its own token. As matrix
products that would be the diagonals of [tokens, tokens] tiles, 128 times the work on the MXU, so
it is done on the vector unit, exactly, in float32. K and V of a slot are read once for all query
heads, slot after slot as `depth_length` and the window say: prefetched scalars drive the index
maps, so that an invisible slot is never fetched (where not one slot is visible, one is fetched and
not looked at). Running gradients are input and output of the same memory.

*Tokens* (`forward`, `backward`): flash attention with a query block's G heads against a key block,
products on the MXU; the sequence, and chunk-visible slots, which are S sequences with another mask.
Pairs of blocks that are masked wholly are neither fetched nor computed; those that are visible in
full need no mask. The backward is one kernel with five products a pair, dq staying in VMEM.

*Why two kernels.* Apart, the depth part costs its memory time and one float32 o; it runs first, so
that this o is read under the sequence's products. A fused kernel would fetch the slots under those
products too, which the roofline (`benchmarks/tpu_roofline.py`) puts at most of the overhead at T =
16K. It is not built: a pipeline fetches one step ahead, and a query block has T / 1024 key blocks
on average against S slots, so that every step would have to carry its share of slots by copies of
its own, in VMEM that the state of all heads of a tile already fills.

Decoding works, at a price: in the tokens kernels a row's few queries have 128 lanes to themselves.
`schedule` says which blocks are visited, how many bytes they take and what is computed.
"""

from pallas_kernels.mosaic_tpu.operator import backward, forward, unsupported_reason

__all__ = ["backward", "forward", "unsupported_reason"]
