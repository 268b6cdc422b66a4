"""How a bundle is loaded."""

from dataclasses import replace
from pathlib import Path

import pytest

from gpt2onnx.models.bundle import Bundle, FileRecord
from gpt2onnx.runtime import session


def test_threads_are_no_more_than_the_weights_are_worth(
    tales_int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight megabytes of weights keep one core busy, whatever the machine has; more weights take more of them."""
    bundle = Bundle.open(tales_int8_bundle)
    monkeypatch.setattr(session, "available_cores", lambda: 4)
    assert session._suitable_threads(bundle) == 1
    files = bundle.manifest.files | {"onnx/more": FileRecord(17_000_000, "")}
    assert session._suitable_threads(replace(bundle, manifest=replace(bundle.manifest, files=files))) == 3
    files = bundle.manifest.files | {"onnx/more": FileRecord(10**9, "")}
    assert session._suitable_threads(replace(bundle, manifest=replace(bundle.manifest, files=files))) == 4
