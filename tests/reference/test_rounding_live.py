"""Activations that are rounded row by row, judged by the export's own check, which runs PyTorch."""

from pathlib import Path

import pytest
from support.checkpoints import MakeCheckpoint
from support.quantized import add_second_graph

import gpt2onnx
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.graph.input_rounding import PerTensor
from gpt2onnx.exporter.validate.parity import check


@pytest.mark.parametrize("function", ["relu", "relu2", "gelu_new"])
def test_rows_are_scaled_where_some_are_large_or_all_zero(
    function: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Per-tensor rounding of scaled rows in every layer, against PyTorch; zeros are what is left of most rows by relu."""
    source = make_checkpoint(activation_function=function, initializer_range=0.1)
    made = gpt2onnx.export(source, tmp_path / "bundle", dtype="int8", calibrate=False, quality=False)
    report = check(add_second_graph(made, PerTensor(0.01)).folder, Checkpoint.open(str(source)))
    assert report["wide"]["positions"]
    assert report["passed"], report
