"""The folder of what can be made again: exports that nobody named a place for, copies of bundles."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def folder() -> Path:
    """The one that GPT2ONNX_CACHE names, or else the platform's."""
    configured = os.environ.get("GPT2ONNX_CACHE")
    return Path(configured) if configured else user_cache_path("gpt2onnx", appauthor=False)
