"""Quantised bundles: the weights they hold, and what has to become of them in a network that knows no quantisation."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

import gpt2onnx
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.graph.fused import build
from gpt2onnx.exporter.graph.operators import Precision
from gpt2onnx.exporter.graph.stored import StoredWeights
from gpt2onnx.exporter.graph.weights import WeightsFile
from gpt2onnx.exporter.quantize.blocks import calibrate
from gpt2onnx.exporter.quantize.blocks.blocks import QuantizedMatrix, dequantize
from gpt2onnx.exporter.quantize.blocks.calibrate import Calibration
from gpt2onnx.exporter.quantize.blocks.inputs import Moments, Tensor
from gpt2onnx.exporter.quantize.blocks.sequential import Part, Twins
from gpt2onnx.exporter.quantize.rounding import InBlocks, Rounding
from gpt2onnx.exporter.validate import quality
from gpt2onnx.models import bundle
from gpt2onnx.models.config import GPT2Config, read_json
from gpt2onnx.models.precision import blocks
from gpt2onnx.models.shapes import weight_shapes
from gpt2onnx.models.tales import FOLDER
from gpt2onnx.runtime.decoding.torch_random import log_softmax
from gpt2onnx.runtime.engine.runner import Runner

from .golden import assert_close
from .graphs import logits_of_prompt, random_tokens
from .network import Network, OnInput

QUANTIZED = (
    "plain",
    "n_inner odd",
    "untied head",
    "vocabulary of 97",
    "48 wide",
    "100 wide, heads of 20",
    "heads of 1",
)
PRECISIONS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int4 pure": {"dtype": "int4", "pure": True},
    "int8 in blocks of 16": {"dtype": "int8", "block_size": 16, "calibrate": False},
    "int4 in blocks of 256": {"dtype": "int4", "block_size": 256, "calibrate": False},
}
# Logits of some tens, summed over matrices of some hundred columns in float32.
EXACT_TOLERANCE = 2e-4


def stored_arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Every initializer by name, and what casts make of them."""
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in arrays:
            arrays[node.output[0]] = arrays[node.input[0]].astype(np.float32)
    return arrays


def stored_matrices(folder: Path, width: int) -> dict[str, np.ndarray]:
    """Every quantised matrix [out, in] of a bundle, by its node's weight name."""
    model = onnx.load(folder / bundle.GRAPH)
    arrays = stored_arrays(model)
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


def stored_weights(folder: Path) -> dict[str, np.ndarray]:
    """All weights that a bundle holds, by their checkpoint names: matrices, biases, norms, positions."""
    config = bundle.Bundle.open(folder).config
    matrices, shapes = stored_matrices(folder, config.n_embd), weight_shapes(config, tied=config.tie_word_embeddings)
    assert len(matrices) == 4 * config.n_layer + (1 if config.tie_word_embeddings else 2)
    weights = {
        f"{name}.weight": matrix if name in ("wte", "lm_head") else matrix.T for name, matrix in matrices.items()
    }
    vectors = {name: array for name, array in stored_arrays(onnx.load(folder / bundle.GRAPH)).items() if name in shapes}
    assert len(vectors) == 8 * config.n_layer + 3
    weights |= {name: array.astype(np.float32) for name, array in vectors.items()}
    assert {name: array.shape for name, array in weights.items()} == shapes
    return weights


class Judged(Protocol):
    """A network that rounds nothing: `Network`, or the same in PyTorch."""

    def logits(self, tokens: np.ndarray, on_input: OnInput = ...) -> np.ndarray: ...

    def matrices(self, tokens: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]: ...


# Makes one from a checkpoint's folder, with weights that take the place of the checkpoint's own, or without.
Judge = Callable[[Path, Mapping[str, np.ndarray] | None], Judged]


def in_numpy(checkpoint: Path, weights: Mapping[str, np.ndarray] | None = None) -> Network:
    """A judge without PyTorch."""
    opened = Checkpoint.open(str(checkpoint))
    names = weight_shapes(opened.config, tied=opened.tied)
    return Network(opened.config, {name: opened.tensor(name) for name in names} if weights is None else weights)


def compute_in_float32(folder: Path) -> None:
    """Tells the bundle's graph not to round activations, so that its weights' layout can be judged alone."""
    model = onnx.load(folder / bundle.GRAPH, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                assert attribute.i == 4
                attribute.i = 1
    replace_graph(folder, model)


def replace_graph(folder: Path, model: onnx.ModelProto) -> None:
    """Puts another graph into a bundle, and into its manifest."""
    (folder / bundle.GRAPH).write_bytes(model.SerializeToString())
    dataclasses.replace(bundle.Manifest.read(folder), files=bundle.describe_files(folder)).write(folder)


def rebuild(folder: Path, checkpoint: Checkpoint, tensor: Tensor) -> None:
    """Makes an fp32 bundle's network anew, of other weights."""
    with (folder / bundle.WEIGHTS).open("wb") as file:
        weights = WeightsFile(folder / bundle.WEIGHTS, file)
        model, _ = build(checkpoint.config, tensor, tied=True, precision=Precision(), weights=weights)
    replace_graph(folder, model)


@contextmanager
def fixed_texts() -> Iterator[None]:
    """Lets calibration see the same tokens everywhere: of a network's own texts, rounding may change a word."""

    def fixed(session: Runner, rows: int, length: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(session.config.vocab_size, size=(rows, length))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "sample", fixed)
        yield


@contextmanager
def few_texts() -> Iterator[None]:
    """Lets exports calibrate on four texts: by default it takes a minute, which is for tests of the quality only."""
    exports = import_module("gpt2onnx.exporter.export")  # of which the package has a function by that name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "_CALIBRATION_TEXTS", {"int8": 4, "int4": 4})
        patch.setattr(exports, "_MORE_TEXTS", 4)
        yield


def shortened_tales(folder: Path, layers: int = 2) -> Path:
    """Writes the first blocks of the embedded model as a checkpoint: trained weights, in a network that is quick to quantise."""
    folder.mkdir()
    for path in FOLDER.glob("*.json"):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(read_json(FOLDER / "config.json") | {"n_layer": layers}))
    tensors = load_file(FOLDER / "model.safetensors")
    kept = {name for name in tensors if ".h." not in name or int(name.split(".")[2]) < layers}
    save_file({name: tensors[name] for name in kept}, folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_logits_of_stored_weights(checkpoint: Path, folder: Path, judge: Judge) -> None:
    """Compares a bundle that rounds no activations with its own weights. It is changed to be one."""
    stored = judge(checkpoint, stored_weights(folder))
    compute_in_float32(folder)
    opened = bundle.Bundle.open(folder)
    tokens = random_tokens(opened.config, 1)
    expected = stored.logits(tokens)
    assert_close(logits_of_prompt(opened, tokens), expected, EXACT_TOLERANCE, "whole")

    session = Runner(opened, threads=1)
    cache = session.new_cache(1, tokens.shape[1])
    for index in range(tokens.shape[1]):
        step = session.forward(cache, slice(0, 1), tokens[:, index : index + 1])
        assert_close(step[:, 0], expected[:, index], EXACT_TOLERANCE, f"step {index}")


def assert_rounds_activations_as_said(checkpoint: Path, folder: Path, judge: Judge) -> None:
    """Compares a bundle's logits with its own weights', by what rounding of activations does to those."""
    opened, sizes = bundle.Bundle.open(folder), block_sizes(folder)
    tokens = many_tokens(opened.config)
    network = judge(checkpoint, stored_weights(folder))
    found = logits_of_prompt(opened, tokens)
    assert_off_by_rounding(found, network, tokens, lambda name: InBlocks(sizes[name]))


def many_tokens(config: GPT2Config) -> np.ndarray:
    """int64 [1, 64]."""
    return np.random.default_rng(1).integers(config.vocab_size, size=(1, 64))


def assert_off_by_rounding(
    found: np.ndarray, network: Judged, tokens: np.ndarray, kind: Callable[[str], Rounding]
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
        kind: how a matrix' input is rounded, by the matrix' name.
    """

    def rounded(name: str, x: np.ndarray) -> np.ndarray:
        (row,) = x.astype(np.float32)
        return kind(name).rounded(row)[None]

    exact = network.logits(tokens)
    allowed = 1.5 * root_mean_square(network.logits(tokens, rounded) - exact)
    error = root_mean_square(found - exact)
    assert 0 < error <= allowed, f"logits are off by {error:.4g}, allowed are {allowed:.4g}"


def wide_network(opened: bundle.Bundle) -> tuple[Network, Callable[[str], Rounding]]:
    """What a bundle's second graph computes: its weights in a network that rounds nothing, and how it rounds inputs."""
    stored = StoredWeights(opened, wide=True)
    names = weight_shapes(opened.config, tied=False)

    def kind(name: str) -> Rounding:
        found = stored.rounding(f"{name}.weight")
        assert found is not None
        return found

    return Network(opened.config, {name: stored.tensor(name) for name in names}), kind


def root_mean_square(x: np.ndarray) -> float:
    return math.sqrt(np.square(x, dtype=np.float64).mean())


def block_sizes(folder: Path) -> dict[str, int]:
    """Inputs that share a scale, by the names of the matrices that they reach."""
    nodes = onnx.load(folder / bundle.GRAPH, load_external_data=False).graph.node
    matrices = {
        node.name: {each.name: each.i for each in node.attribute} for node in nodes if node.op_type == "MatMulNBits"
    }
    sizes = {name.removesuffix(".matmul"): attributes["block_size"] for name, attributes in matrices.items()}
    sizes["lm_head"] = sizes.pop("logits")
    return sizes


def assert_twins(source: Path, observed: Calibration, folder: Path, judge: Judge) -> None:
    """Compares what matrices are quantised for: the exact network's outputs, and inputs behind the bundle's weights.

    Args:
        source: the checkpoint.
        observed: of its fp32 bundle.
        folder: its int8 bundle, whose weights are made anew.
        judge: computes both.
    """
    seen: dict[str, Moments] = {}

    class Recorder(Twins):
        def reach(self, part: Part, x: str, *rest: Any) -> Moments | None:
            moments = super().reach(part, x, *rest)
            assert moments is not None
            return seen.setdefault(x, moments)

    checkpoint = Checkpoint.open(str(source))
    tokens = observed.tokens[:3]
    twins = Recorder(tokens, observed.head, {}, threads=1)
    precision = Precision(blocks=lambda name: blocks(checkpoint.config, "int8", name))
    with (folder / bundle.WEIGHTS).open("wb") as file:
        weights = WeightsFile(folder / bundle.WEIGHTS, file)
        model, _ = build(
            checkpoint.config, checkpoint.tensor, tied=True, precision=precision, weights=weights, twins=twins
        )
    replace_graph(folder, model)

    names = {
        node.input[0]: node.name.removesuffix(".matmul") for node in model.graph.node if node.name.endswith(".matmul")
    }
    assert seen.keys() == names.keys()
    exact = judge(source, None).matrices(tokens)
    quantised = judge(source, stored_weights(folder)).matrices(tokens)
    assert set(exact) == set(quantised) == set(names.values())
    for value, name in names.items():
        x, y, moments = quantised[name][0], exact[name][1], seen[value]
        limits = {"mean": x.std(), "covariance": x.var(), "wanted": y.std(), "cross": x.std() * y.std()}
        expected = {
            "mean": x.mean(0),
            "covariance": np.cov(x.T, bias=True),
            "wanted": y.mean(0),
            "cross": (x - x.mean(0)).T @ (y - y.mean(0)) / len(x),
        }
        for figure, limit in limits.items():
            assert_close(getattr(moments, figure), expected[figure], 3e-3 * limit, f"{name} {figure}")


def assert_quality(source: Path, folder: Path, reference: Path, judge: Judge) -> None:
    """Compares a quantised bundle's figures on a text with those of the weights that it and its source have.

    Args:
        source: the checkpoint.
        folder: the bundle.
        reference: the bundle in fp32.
        judge: computes both.
    """
    text = "Once upon a time there was a fox who wished to see the sea. " * 20
    made = bundle.Bundle.open(folder)
    found = quality.on_text(made, bundle.Bundle.open(reference), text, threads=1)

    ids = gpt2onnx.load(reference, threads=1).tokenizer.encode(text)
    assert len(ids) < made.config.n_positions
    networks = judge(source, None), judge(source, stored_weights(folder))
    truth, candidate = (log_softmax(each.logits(np.array([ids]))[0, :-1].astype(np.float64)) for each in networks)
    rows, following = np.arange(len(ids) - 1), ids[1:]
    divergence = float((np.exp(truth) * (truth - candidate)).sum(-1).mean())
    assert found.tokens == len(ids) - 1
    assert found.reference_perplexity == pytest.approx(math.exp(-truth[rows, following].mean()), rel=1e-4)
    # Activations are rounded, too: the figures are those of what runs, the judge's of the weights alone.
    assert found.perplexity == pytest.approx(math.exp(-candidate[rows, following].mean()), rel=0.02)
    assert found.kl == pytest.approx(divergence, rel=0.2)
