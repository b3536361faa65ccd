"""The fused forward: one online softmax over the depth slots and the sequence."""
