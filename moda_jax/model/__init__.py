"""The language model: layers, the stack of layers and its gradient, generation."""
