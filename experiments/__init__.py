"""Experiments with a loaded model: grids of strategies, losses of texts, and what goes into a single draw."""
