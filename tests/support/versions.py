"""What depends on the version of transformers that a live comparison finds."""

from importlib.metadata import version

import pytest

from .golden import golden


def skip_with_transformers_4(what: str) -> None:
    """Skips a test of what transformers 4 does otherwise, and this project does as 5 does."""
    if golden.mode != "stored" and version("transformers").startswith("4."):
        pytest.skip(f"transformers 4: {what}")
