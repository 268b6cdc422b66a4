"""Quantised bundles: their weights, and a network without quantisation that judges them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.graph import ragged, second_graph
from gpt2onnx.exporter.graph.input_rounding import InputRounding, PerTensor
from gpt2onnx.exporter.graph.write import write_graphs
from gpt2onnx.exporter.quantize import statistics
from gpt2onnx.exporter.quantize.layers import Tensor
from gpt2onnx.exporter.validate.bundle_weights import BundleWeights
from gpt2onnx.models import bundle
from gpt2onnx.models.config import GPT2Config, read_json
from gpt2onnx.models.shapes import weight_shapes
from gpt2onnx.models.tales import FOLDER
from gpt2onnx.runtime.engine.runner import Runner

from .bundles import edit_graphs, sign
from .network import Network

QUANTIZED = (
    "plain",
    "n_inner odd",
    "untied head",
    "vocabulary of 97",
    "48 wide",
    "100 wide, heads of 20",
    "heads of 1",
)
CALIBRATED: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int4 pure": {"dtype": "int4", "pure": True},
}


def in_numpy(checkpoint: Path, weights: Mapping[str, np.ndarray] | None = None) -> Network:
    """A judge without PyTorch."""
    opened = Checkpoint.open(str(checkpoint))
    names = weight_shapes(opened.config, tied=opened.tied)
    return Network(opened.config, {name: opened.tensor(name) for name in names} if weights is None else weights)


def weights_of(opened: bundle.Bundle, *, second_graph: bool = False) -> dict[str, np.ndarray]:
    """All weights that a bundle holds, by their checkpoint names; the second graph may have a head of its own."""
    held = BundleWeights(opened, second_graph=second_graph)
    tied = opened.config.tie_word_embeddings and not second_graph
    return {name: held.tensor(name) for name in weight_shapes(opened.config, tied=tied)}


def roundings_of(opened: bundle.Bundle, *, second_graph: bool = False) -> Callable[[str], InputRounding]:
    """The rounding of a layer's input, by the layer's name."""
    held = BundleWeights(opened, second_graph=second_graph)

    def rounding(layer: str) -> InputRounding:
        found = held.rounding(f"{layer}.weight")
        assert found is not None
        return found

    return rounding


def rebuild(folder: Path, checkpoint: Checkpoint, tensor: Tensor) -> None:
    """Writes an fp32 bundle's network anew, with other weights."""
    write_graphs(folder, checkpoint.config, tensor, tied=True)
    sign(folder)


def add_second_graph(opened: bundle.Bundle, rounding: PerTensor) -> bundle.Bundle:
    """Gives an int8 bundle a second graph in which every layer rounds its input in this way."""
    model = onnx.load(opened.folder / bundle.GRAPH, load_external_data=False)
    matrices = [node.name.removesuffix(".matmul") for node in model.graph.node if node.op_type == "MatMulNBits"]
    layers = dict.fromkeys(["lm_head" if name == "logits" else name for name in matrices], rounding)
    second, weights_graph = second_graph.build(model, layers)
    (opened.folder / bundle.SECOND_GRAPH).write_bytes(ragged.build(second, opened.config).SerializeToString())
    (opened.folder / bundle.SECOND_GRAPH_WEIGHTS).write_bytes(weights_graph.SerializeToString())
    sign(opened.folder)
    return bundle.Bundle.open(opened.folder)


def fixed_texts(config: GPT2Config, rows: int) -> np.ndarray:
    """The same tokens everywhere to calibrate on: of a network's own texts, rounding may change a word."""
    return np.random.default_rng(0).integers(config.vocab_size, size=(rows, min(256, config.n_positions)))


@contextmanager
def few_texts() -> Iterator[None]:
    """Lets exports calibrate on four texts: by default it takes a minute, which is for tests of the quality only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "TEXTS", {"int8": 4, "int4": 4})
        patch.setattr(statistics, "MORE_TEXTS", 4)
        yield


def shortened_tales(folder: Path, layers: int = 2, vocabulary: int = 2048) -> Path:
    """Writes the first blocks of the embedded model, and the commonest of its tokens, as a checkpoint.

    Trained weights, in a network that is quick to quantise.
    """
    folder.mkdir()
    shutil.copy(FOLDER / "tokenizer_config.json", folder)
    end = vocabulary - 1
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"n_layer": layers, "vocab_size": vocabulary, "bos_token_id": end, "eos_token_id": end},
        "generation_config.json": {"bos_token_id": end, "eos_token_id": end},
    }
    for name, changed in changes.items():
        (folder / name).write_text(json.dumps(read_json(FOLDER / name) | changed))
    tokenizer = read_json(FOLDER / "tokenizer.json")
    model, (end_of_text,) = tokenizer["model"], tokenizer["added_tokens"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < end}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    end_of_text["id"] = end
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tensors = load_file(FOLDER / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if ".h." not in name or int(name.split(".")[2]) < layers}
    embedding = kept["transformer.wte.weight"]
    kept["transformer.wte.weight"] = np.concatenate([embedding[:end], embedding[-1:]])
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def compute_in_float32(folder: Path) -> None:
    """Tells a bundle's graph not to round activations."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    assert attribute.i == 4
                    attribute.i = 1

    edit_graphs(folder, change)


def many_tokens(config: GPT2Config) -> np.ndarray:
    """int64 [1, 64]."""
    return np.random.default_rng(1).integers(config.vocab_size, size=(1, 64))


def assert_off_by_rounding(
    found: np.ndarray, network: Network, tokens: np.ndarray, rounding: Callable[[str], InputRounding]
) -> None:
    """Fails where logits are further off from a network's than those are where its matrices' inputs are rounded.

    Kernels sum in orders of their own, so what lies near the middle of two steps goes up on one processor and down on
    another, and everything behind it is rounded anew. That is another draw of the same errors: each logit sums up those
    of thousands of inputs, so over 64 tokens the sizes of two draws differ by a few hundredths. One bit less, or sums
    that overflow, would at least double them: half of that is allowed.

    Args:
        found: logits [1, length, vocab].
        network: that rounds nothing.
        tokens: [1, length].
        rounding: of a layer's input, by the layer's name.
    """

    def rounded(name: str, x: np.ndarray) -> np.ndarray:
        (row,) = x.astype(np.float32)
        return rounding(name).rounded(row)[None]

    exact = network.logits(tokens)
    allowed = 1.5 * root_mean_square(network.logits(tokens, rounded) - exact)
    error = root_mean_square(found - exact)
    assert 0 < error <= allowed, f"logits are off by {error:.4g}, allowed are {allowed:.4g}"


def assert_second_graph_rounds_as_said(opened: bundle.Bundle) -> None:
    """Compares the second graph's logits with its own weights', by the effect of rounding activations on those."""
    tokens, session = many_tokens(opened.config), Runner(opened, threads=1, wide_after=0)
    found = session.forward(session.new_cache(1, 64), slice(0, 1), tokens, logits="all")[None]
    network = Network(opened.config, weights_of(opened, second_graph=True))
    assert_off_by_rounding(found, network, tokens, roundings_of(opened, second_graph=True))


def root_mean_square(x: np.ndarray) -> float:
    return math.sqrt(np.square(x, dtype=np.float64).mean())
