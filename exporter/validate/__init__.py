"""Comparison with PyTorch (parity) and with fp32 (quality)."""
