"""Checkpoint to bundle: reads files, builds the graph, quantises, writes atomically.

Knows no decoding. It may use `runtime` to judge what it made; `runtime` never imports it.
"""
