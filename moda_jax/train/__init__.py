"""Training: the loop, its step, optimizer, checkpoints, and what a run shows."""
