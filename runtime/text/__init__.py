"""Text at the edges of generation: bytes and pipes, token ids, stop strings."""
