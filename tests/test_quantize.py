"""Quantised bundles against the very weights they hold, computed in PyTorch, and against fp32."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import MakeCheckpoint, load_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from test_graph import CONFIGS, QUANTIZED, TOKENS, assert_close, random_tokens, torch_logits

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.exporter import quality
from gpt2onnx.exporter.quantize import QuantizedMatrix, dequantize, quantize
from gpt2onnx.models import bundle
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.runtime.session import Session

PRECISIONS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int4 pure": {"dtype": "int4", "pure": True},
    "int8 in blocks of 16": {"dtype": "int8", "block_size": 16},
    "int4 in blocks of 256": {"dtype": "int4", "block_size": 256},
}
# Logits of some tens, summed over matrices of some hundred columns in float32.
EXACT_TOLERANCE = 2e-4
# accuracy_level 4 lets MatMulNBits round its other operand, the activations, to 8 bits in each block: by up
# to 1/254 of the block's largest, about 1/254 of their root mean square on average. A trained network of
# 6 blocks has 25 such matrices in a row, so that their errors add up to about 1/50 of the logits' spread.
ACTIVATION_TOLERANCE = 0.02


def stored_matrices(folder: Path, width: int) -> dict[str, np.ndarray]:
    """Every quantised matrix [out, in] of a bundle, by its node's weight name."""
    model = onnx.load(folder / bundle.GRAPH)
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    matrices = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {each.name: each.i for each in node.attribute}
            name = node.input[1].removesuffix(".data")
            data, scales = arrays[node.input[1]], arrays[node.input[2]]
            scales = scales.reshape(attributes["N"], -1).astype(np.float32)
            stored = QuantizedMatrix(data, scales, attributes["bits"], attributes["block_size"], attributes["K"])
            matrices[name] = dequantize(stored)
        if node.op_type == "GatherBlockQuantized":
            attributes = {each.name: each.i for each in node.attribute}
            scales = arrays[node.input[2]].astype(np.float32)
            bits, block_size = attributes["bits"], attributes["block_size"]
            stored = QuantizedMatrix(arrays["wte.data"], scales, bits, block_size, width)
            matrices["wte"] = dequantize(stored)
    return matrices


def with_stored_weights(checkpoint: Path, folder: Path) -> torch.nn.Module:
    """The checkpoint in PyTorch, its matrices replaced by what the bundle holds."""
    model = load_reference(checkpoint)
    matrices = stored_matrices(folder, model.config.n_embd)
    tied = model.config.tie_word_embeddings
    assert len(matrices) == 4 * model.config.n_layer + (1 if tied else 2)
    state = model.state_dict()
    head = matrices.pop("lm_head", None)
    with torch.no_grad():
        for name, matrix in matrices.items():
            if name == "wte":
                state["transformer.wte.weight"].copy_(torch.from_numpy(matrix))
            else:
                state[f"transformer.{name}.weight"].copy_(torch.from_numpy(matrix.T.copy()))
        if head is not None:
            state["lm_head.weight"].copy_(torch.from_numpy(head))
    return model


def compute_in_float32(folder: Path) -> None:
    """Tells the bundle's graph not to round activations, so that its weights' layout can be judged alone."""
    model = onnx.load(folder / bundle.GRAPH, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                assert attribute.i == 4
                attribute.i = 1
    (folder / bundle.GRAPH).write_bytes(model.SerializeToString())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_logits_are_those_of_the_stored_weights(
    name: str, precision: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(**CONFIGS[name])
    gpt2onnx.export(checkpoint, tmp_path / "bundle", **PRECISIONS[precision], quality=False)
    compute_in_float32(tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    session = Session(opened, threads=1)
    tokens = random_tokens(opened.config, 1)
    expected = torch_logits(with_stored_weights(checkpoint, opened.folder), tokens)

    cache = session.new_cache(1, TOKENS)
    assert_close(session.forward(cache, slice(0, 1), tokens, keep=TOKENS), expected, "whole", EXACT_TOLERANCE)

    cache = session.new_cache(1, TOKENS)
    for index in range(TOKENS):
        step = session.forward(cache, slice(0, 1), tokens[:, index : index + 1])
        assert_close(step[:, 0], expected[:, index], f"step {index}", EXACT_TOLERANCE)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounded_activations_change_little(precision: str, tales_checkpoint: Path, tmp_path: Path) -> None:
    gpt2onnx.export(tales_checkpoint, tmp_path / "bundle", **PRECISIONS[precision], quality=False)
    opened = Bundle.open(tmp_path / "bundle")
    session = Session(opened, threads=1)
    tokens = random_tokens(opened.config, 1)
    expected = torch_logits(with_stored_weights(tales_checkpoint, opened.folder), tokens)
    found = session.forward(session.new_cache(1, TOKENS), slice(0, 1), tokens, keep=TOKENS)
    error = np.sqrt(((found - expected) ** 2).mean()) / expected.std()
    assert error <= ACTIVATION_TOLERANCE, f"logits are off by {error:.4f} of their spread"


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    width=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 64]),
)
def test_error_is_no_larger_than_that_of_plain_rounding(
    seed: int, rows: int, width: int, bits: int, block_size: int
) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    quantized = quantize(matrix, bits, block_size)
    blocks = -(-width // block_size)
    assert quantized.data.shape == (rows, blocks, block_size * bits // 8)
    assert quantized.scales.shape == (rows, blocks)
    found = dequantize(quantized)
    assert found.shape == matrix.shape
    padded = np.pad(matrix, ((0, 0), (0, blocks * block_size - width))).reshape(rows, blocks, block_size)
    step = np.abs(padded).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    plain = np.rint(padded / np.where(step == 0, 1, step)) * step
    error, plain_error = ((found - matrix) ** 2).sum(), ((plain - padded) ** 2).sum()
    assert error <= plain_error * (1 + 1e-5) + 1e-12, f"squared error {error:.4g}, plain rounding has {plain_error:.4g}"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("matrix", [np.zeros((3, 40)), np.full((2, 33), -7.5), np.eye(20), np.full((1, 1), 3e-30)])
def test_matrices_that_need_no_rounding_come_back(matrix: np.ndarray, bits: int) -> None:
    matrix = matrix.astype(np.float32)
    np.testing.assert_allclose(dequantize(quantize(matrix, bits, 16)), matrix, rtol=1e-6, atol=0)


def test_tied_embedding_is_stored_once(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        checkpoint = make_checkpoint(vocab_size=4096, tie_word_embeddings=tied)
        made = gpt2onnx.export(checkpoint, tmp_path / str(tied), dtype="int8", quality=False)
        sizes[tied] = made.manifest.files[bundle.WEIGHTS].size
    table = 4096 * 32
    assert table < sizes[False] - sizes[True] < 1.5 * table


def test_quality_in_the_manifest(tales_checkpoint: Path, tales_bundle: Path, tmp_path: Path) -> None:
    made = gpt2onnx.export(tales_checkpoint, tmp_path / "int8", dtype="int8")
    figures = made.manifest.quality
    assert figures is not None
    assert figures["text"] == "own samples"
    assert figures["tokens"] == 256
    assert 0 < figures["kl"] < 0.002
    assert gpt2onnx.export(tales_checkpoint, tmp_path / "without", dtype="int8", quality=False).manifest.quality is None
    assert Bundle.open(tales_bundle).manifest.quality is None
    assert sorted(path.name for path in (tmp_path / "int8").iterdir() if path.is_dir()) == ["onnx"]


def test_quality_is_that_of_pytorch(tales_checkpoint: Path, tales_bundle: Path, tmp_path: Path) -> None:
    made = gpt2onnx.export(tales_checkpoint, tmp_path / "int4", dtype="int4", quality=False)
    text = "Once upon a time there was a fox who wished to see the sea. " * 20
    found = quality.on_text(made, Bundle.open(tales_bundle), text, threads=1)

    ids = gpt2onnx.load(tales_bundle, threads=1).tokenizer.encode(text)
    assert len(ids) < made.config.n_positions
    tokens = np.array([ids])
    truth = torch.from_numpy(torch_logits(load_reference(tales_checkpoint), tokens))[0, :-1].double().log_softmax(-1)
    ours = torch_logits(with_stored_weights(tales_checkpoint, made.folder), tokens)
    candidate = torch.from_numpy(ours)[0, :-1].double().log_softmax(-1)
    following = torch.tensor(ids[1:])[:, None]
    divergence = float((truth.exp() * (truth - candidate)).sum(-1).mean())
    assert found.tokens == len(ids) - 1
    assert found.reference_perplexity == pytest.approx(math.exp(-truth.gather(-1, following).mean()), rel=1e-4)
    # Rounded activations, again: the figures are those of what runs, PyTorch's of the weights alone.
    assert found.perplexity == pytest.approx(math.exp(-candidate.gather(-1, following).mean()), rel=0.02)
    assert found.kl == pytest.approx(divergence, rel=0.2)


def test_quality_of_equal_bundles_is_perfect(tales_bundle: Path) -> None:
    opened = Bundle.open(tales_bundle)
    figures = quality.on_own_samples(opened, opened, tokens=40, threads=1)
    assert figures.kl == 0
    assert figures.perplexity == figures.reference_perplexity


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int2"},
        {"pure": True},
        {"dtype": "int8", "pure": True},
        {"block_size": 32},
        {"dtype": "int4", "block_size": 24},
        {"dtype": "int4", "block_size": 512},
        {"quality": True},
        {"graph": "other"},
        {"graph": "portable", "dtype": "int8"},
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], tales_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        gpt2onnx.export(tales_checkpoint, tmp_path / "bundle", **options)
    assert not any(tmp_path.iterdir())
