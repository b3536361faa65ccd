"""Text into rows of tokens: reading, tokenizing, packing."""
