"""Experiments with a loaded model: sweeps, losses of texts, draws of the next token, benchmarks, energy."""
