"""Inputs that are rounded row by row, judged by the export's own check, which runs PyTorch."""

from pathlib import Path

import pytest
from support.checkpoints import MakeCheckpoint

import gpt2onnx
from gpt2onnx.exporter.checkpoint.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.graph.fused import operators
from gpt2onnx.exporter.quantize.rounding import OneScale
from gpt2onnx.exporter.validate.parity import check
from gpt2onnx.models.bundle import WIDE_GRAPH


@pytest.mark.usefixtures("wide_at_any_width")
@pytest.mark.parametrize("function", ["relu", "relu2", "gelu_new"])
def test_rows_are_scaled_where_some_are_large_or_all_zero(
    function: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaled form's nodes, forced on every matrix, against PyTorch; zeros are what is left of most rows by relu."""
    monkeypatch.setattr(operators, "choose", lambda sample, weight, size: OneScale(0.01))
    source = make_checkpoint(activation_function=function, initializer_range=0.1)
    made = gpt2onnx.export(source, tmp_path / "bundle", dtype="int8", quality=False)
    assert WIDE_GRAPH in made.manifest.files
    report = check(made.folder, Checkpoint.open(str(source)))
    assert report["wide"]["positions"]
    assert report["passed"], report
