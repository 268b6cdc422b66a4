"""Weights to blocks of 4 or 8 bits: activation statistics, transforms that suit them, sequential calibration."""
