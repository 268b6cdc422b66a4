"""The fused graph against transformers in PyTorch, for every configuration that transformers runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import MakeCheckpoint, assert_same_tokens, load_reference, reference_tokens
from transformers.activations import ACT2CLS

import gpt2onnx
from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter import graph
from gpt2onnx.models import bundle
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.models.config import ACTIVATIONS, GPT2Config
from gpt2onnx.runtime.session import Session

TOLERANCE = 1e-4
TOKENS = 12

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "n_inner narrow": {"n_inner": 20},
    "n_inner odd": {"n_inner": 99},
    "epsilon large": {"layer_norm_epsilon": 0.1},
    "epsilon tiny": {"layer_norm_epsilon": 1e-12},
    "unscaled attention": {"scale_attn_weights": False, "initializer_range": 0.1},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "only scaled by layer": {
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "n_layer": 3,
        "initializer_range": 0.1,
    },
    "upcast attention": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "untied head": {"tie_word_embeddings": False},
    "vocabulary of 97": {"vocab_size": 97},
    "vocabulary of 50263": {"vocab_size": 50263, "n_embd": 8, "n_head": 1},
    "13 positions": {"n_positions": 13},
    "1 layer": {"n_layer": 1},
    "1 head": {"n_head": 1},
    "1 wide": {"n_embd": 1, "n_head": 1, "initializer_range": 1.0},
    "48 wide": {"n_embd": 48, "n_head": 3},
    "100 wide, heads of 20": {"n_embd": 100, "n_head": 5},
    "60 wide, heads of 12": {"n_embd": 60, "n_head": 5},
    "35 wide, heads of 5": {"n_embd": 35, "n_head": 7, "scale_attn_by_inverse_layer_idx": True},
    "heads of 1": {"n_embd": 6, "n_head": 6, "tie_word_embeddings": False},
}
QUANTIZED = (
    "plain",
    "n_inner odd",
    "untied head",
    "vocabulary of 97",
    "48 wide",
    "100 wide, heads of 20",
    "heads of 1",
)


def random_tokens(config: GPT2Config, rows: int) -> np.ndarray:
    return np.random.default_rng(1).integers(config.vocab_size, size=(rows, TOKENS))


def assert_close(actual: np.ndarray, expected: np.ndarray, label: str, tolerance: float = TOLERANCE) -> None:
    difference = np.abs(actual - expected).max()
    assert difference <= tolerance, f"{label}: logits differ by up to {difference:.3g}, allowed are {tolerance:.3g}"


def torch_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def assert_matches_pytorch(folder: Path, checkpoint: Path) -> None:
    opened = Bundle.open(folder)
    session = Session(opened, threads=1)
    tokens = random_tokens(opened.config, 2)
    expected = torch_logits(load_reference(checkpoint), tokens)
    assert np.abs(expected).max() > 0.1, "logits this small would hide an error"

    cache = session.new_cache(1, TOKENS)
    assert_close(session.forward(cache, slice(0, 1), tokens[:1], keep=TOKENS), expected[:1], "whole")

    cache = session.new_cache(1, TOKENS)
    for index in range(TOKENS):
        step = session.forward(cache, slice(0, 1), tokens[:1, index : index + 1])
        assert_close(step[:, 0], expected[:1, index], f"step {index}")

    # Two rows of unequal length, in a cache that is longer than they need and already partly filled.
    cache = session.new_cache(2, TOKENS + 3)
    session.forward(cache, slice(0, 1), tokens[:1, :5])
    session.forward(cache, slice(1, 2), tokens[1:, :2])
    for index in range(TOKENS - 5):
        columns = [5 + index, 2 + index]
        step = session.forward(cache, slice(0, 2), tokens[[0, 1], columns][:, None])
        assert_close(step[:, 0], expected[[0, 1], columns], f"ragged step {index}")

    # Two prompts of unequal length in one pass, not on the first row, and the token that follows each.
    cache = session.new_cache(3, TOKENS + 3)
    lengths = np.array([TOKENS - 4, TOKENS - 1])
    padded = tokens[:, : TOKENS - 1].copy()
    padded[0, lengths[0] :] = 0
    together = session.forward(cache, slice(1, 3), padded, keep=3, lengths=lengths)
    for row, length in enumerate(lengths):
        assert_close(together[row], expected[row, length - 3 : length], "prompts together")
    step = session.forward(cache, slice(1, 3), tokens[[0, 1], lengths][:, None])
    assert_close(step[:, 0], expected[[0, 1], lengths], "step after prompts together")

    # Several tokens on top of a past.
    cache = session.new_cache(1, TOKENS + 3)
    session.forward(cache, slice(0, 1), tokens[:1, :4])
    assert_close(session.forward(cache, slice(0, 1), tokens[:1, 4:], keep=8), expected[:1, 4:], "chunk after a past")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_pytorch(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(**CONFIGS[name])
    gpt2onnx.export(checkpoint, tmp_path / "bundle")
    assert_matches_pytorch(tmp_path / "bundle", checkpoint)


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations(function: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(activation_function=function)
    gpt2onnx.export(checkpoint, tmp_path / "bundle")
    assert_matches_pytorch(tmp_path / "bundle", checkpoint)


def test_every_activation_of_transformers_without_weights_is_supported() -> None:
    assert set(ACT2CLS) - set(ACTIVATIONS) == {"prelu", "xielu"}


@pytest.mark.parametrize("name", ["100 wide, heads of 20", "35 wide, heads of 5", "vocabulary of 97"])
def test_greedy_tokens_of_odd_configurations(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(**CONFIGS[name])
    gpt2onnx.export(checkpoint, tmp_path / "bundle")
    result = gpt2onnx.load(tmp_path / "bundle", threads=1).generate([5, 6, 7], max_new_tokens=20)
    expected = reference_tokens(load_reference(checkpoint), [5, 6, 7], do_sample=False, max_new_tokens=20)
    assert_same_tokens(result.sequences[0].token_ids, expected[0], name)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_graph_is_valid_onnx(dtype: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    gpt2onnx.export(make_checkpoint(n_embd=60, n_head=5), tmp_path / "bundle", dtype=dtype)
    onnx.checker.check_model(tmp_path / "bundle" / bundle.GRAPH)


def test_cache_has_the_true_head_size_whatever_the_operator_wants(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    gpt2onnx.export(make_checkpoint(n_embd=60, n_head=5), tmp_path / "bundle")
    model = onnx.load(tmp_path / "bundle" / bundle.GRAPH, load_external_data=False)
    shapes = {
        value.name: [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["past_key_values.0.key"] == ["batch_size", 5, "past_sequence_length", 12]
    assert shapes["present.1.value"] == ["batch_size", 5, "total_sequence_length", 12]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt_neo"}, "not a GPT-2"),
        ({"add_cross_attention": True}, "encoder"),
        ({"pruned_heads": {"0": [1]}}, "unequal heads"),
        ({"activation_function": "prelu"}, "prelu"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"activation_function": None}, "activation_function"),
        ({"n_head": 3}, "not divisible"),
        ({"n_head": 0}, "n_head"),
        ({"n_layer": "2"}, "n_layer"),
        ({"n_layer": 2.0}, "n_layer"),
        ({"n_embd": True}, "n_embd"),
        ({"n_embd": None}, "n_embd"),
        ({"n_inner": 0}, "n_inner"),
        ({"n_positions": -1}, "n_positions"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"scale_attn_weights": 1}, "scale_attn_weights"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_config_that_cant_be_exported_is_refused_with_the_reason(
    change: dict[str, Any], words: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=words) as caught:
        gpt2onnx.export(checkpoint, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_general_names_of_config_fields(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(n_positions=40, n_layer=1)
    config = json.loads((checkpoint / "config.json").read_text())
    general = {"n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_layer": "num_hidden_layers"}
    renamed = {general.get(name, name): value for name, value in config.items()}
    (checkpoint / "config.json").write_text(json.dumps(renamed))
    gpt2onnx.export(checkpoint, tmp_path / "bundle")
    assert_matches_pytorch(tmp_path / "bundle", checkpoint)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_large_head_comes_in_parts(
    dtype: str, tied: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part begins with a page, where it can be mapped, and together they are the head."""
    monkeypatch.setattr(graph, "_LARGEST_PART", 40_000)
    checkpoint = make_checkpoint(vocab_size=5000, n_embd=8, n_head=1, tie_word_embeddings=tied, initializer_range=0.3)
    folder = gpt2onnx.export(checkpoint, tmp_path / "bundle", dtype=dtype, parity=False, quality=False).folder
    model = onnx.load(folder / bundle.GRAPH, load_external_data=False)
    weights = {each.name: each for each in model.graph.initializer}
    parts = [weights[node.input[1]] for node in model.graph.node if node.op_type == "Gemm"]
    assert len(parts) == {"fp32": 3, "fp16": 2}[dtype], [list(part.dims) for part in parts]
    assert sum(part.dims[0] for part in parts) == 5000
    places = [
        {entry.key: int(entry.value) for entry in part.external_data if entry.key != "location"} for part in parts
    ]
    assert all((place["offset"] - places[0]["offset"]) % 4096 == 0 for place in places)
    if dtype == "fp32":
        assert_matches_pytorch(folder, checkpoint)
    else:
        tokens = random_tokens(Bundle.open(folder).config, 1)
        session = Session(Bundle.open(folder), threads=1)
        logits = session.forward(session.new_cache(1, TOKENS), slice(0, 1), tokens, keep=TOKENS)
        assert_close(logits, torch_logits(load_reference(checkpoint), tokens), dtype, tolerance=0.05)
