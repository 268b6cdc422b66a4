"""The model that servers serve."""

from pathlib import Path

import pytest

import gpt2onnx


@pytest.fixture(scope="module")
def model(tales_bundle: Path) -> gpt2onnx.Model:
    """The embedded model, for one engine's thread at a time."""
    return gpt2onnx.load(tales_bundle, threads=1)
