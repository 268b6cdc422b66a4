"""The graph that unpacks its weights at loading, as browsers run it, against the same weights in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from support.checkpoints import MakeCheckpoint
from support.quantized import in_numpy, weights_of

import gpt2onnx
from gpt2onnx.exporter.graph import unpacked
from gpt2onnx.models import contract
from gpt2onnx.models.bundle import GRAPH, Bundle

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied head": {"tie_word_embeddings": False},
    "100 wide, heads of 20": {"n_embd": 100, "n_head": 5},
    "n_inner odd": {"n_inner": 99},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_logits_are_those_of_the_stored_weights(
    dtype: str, shape: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(**SHAPES[shape])
    options = {} if dtype == "fp16" else {"calibrate": False, "quality": False}
    made = gpt2onnx.export(checkpoint, tmp_path / "bundle", dtype=dtype, **options)
    path = made.folder / "onnx" / "unpacked.onnx"
    path.write_bytes(unpacked.build(onnx.load(made.folder / GRAPH, load_external_data=False)).SerializeToString())
    onnx.checker.check_model(path)
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(path, settings, ["CPUExecutionProvider"])
    tokens = np.random.default_rng(1).integers(0, made.config.vocab_size, 9)
    expected = in_numpy(checkpoint, weights_of(made)).logits(tokens[None])
    np.testing.assert_allclose(run(session, made, tokens[None]), expected, atol=1e-4)
    operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node}
    assert operators & {"DequantizeLinear", "MatMulNBits"} == set(), "unpacked at loading, not in each pass"


def run(session: onnxruntime.InferenceSession, made: Bundle, tokens: np.ndarray) -> np.ndarray:
    """Logits [1, length, vocabulary] of tokens [1, length]."""
    feeds = {
        contract.INPUT_IDS: tokens,
        contract.ATTENTION_MASK: np.ones_like(tokens),
        contract.POSITION_IDS: np.arange(tokens.shape[1])[None],
    }
    empty = np.zeros((1, made.config.n_head, 0, made.config.head_size), np.float32)
    feeds |= {name: empty for layer in range(made.config.n_layer) for name in contract.past_names(layer)}
    (logits,) = session.run([contract.LOGITS], feeds)
    return np.asarray(logits)
