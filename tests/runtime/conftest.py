"""A small network here and in transformers."""

import pytest
from support.checkpoints import MakeCheckpoint
from support.reference import Reference

import gpt2onnx


@pytest.fixture(scope="module")
def pair(
    make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path_factory: pytest.TempPathFactory
) -> tuple[gpt2onnx.Model, Reference]:
    """The model, and what transformers answers for its checkpoint."""
    folder = make_checkpoint(vocab_size=97, weights_seed=6)
    bundle = gpt2onnx.export(folder, tmp_path_factory.mktemp("bundle") / "fp32").folder
    return gpt2onnx.load(bundle, threads=1), reference_of(folder)
