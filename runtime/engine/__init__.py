"""Forward passes: scheduler, KV cache and runner."""
