"""Forward passes: which sequences take part, their KV cache, the session's call."""
