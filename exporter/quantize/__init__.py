"""Weights to blocks of 4 or 8 bits, and their calibration."""
