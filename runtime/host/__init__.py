"""Cores, memory and locks of the machine."""
