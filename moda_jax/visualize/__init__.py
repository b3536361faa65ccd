"""Pictures of a model's attention, and of how it changed in training: `moda-jax visualize`."""
