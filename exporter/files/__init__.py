"""Folders that appear whole or not at all, and archives."""
