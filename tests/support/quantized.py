"""Quantised bundles: their weights, and a network without quantisation that judges them."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

import gpt2onnx
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.graph import ragged, second_graph
from gpt2onnx.exporter.graph.input_rounding import InputRounding, PerTensor
from gpt2onnx.exporter.graph.write import write_graphs
from gpt2onnx.exporter.quantize import statistics
from gpt2onnx.exporter.quantize.activations import Moments
from gpt2onnx.exporter.quantize.layers import Tensor
from gpt2onnx.exporter.quantize.sequential import SequentialCalibrator
from gpt2onnx.exporter.validate import quality
from gpt2onnx.exporter.validate.bundle_weights import BundleWeights
from gpt2onnx.models import bundle
from gpt2onnx.models.config import GPT2Config, read_json
from gpt2onnx.models.precision import blocks
from gpt2onnx.models.shapes import weight_shapes
from gpt2onnx.models.tales import FOLDER
from gpt2onnx.runtime.decoding.torch_random import log_softmax
from gpt2onnx.runtime.engine.runner import Runner

from .checkpoints import MakeCheckpoint
from .golden import assert_close
from .graphs import CONFIGS, logits_of_prompt, random_tokens
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
CALIBRATED: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int4 pure": {"dtype": "int4", "pure": True},
}
PRECISIONS: dict[str, dict[str, Any]] = CALIBRATED | {
    "int8 in blocks of 16": {"dtype": "int8", "block_size": 16, "calibrate": False},
    "int4 in blocks of 256": {"dtype": "int4", "block_size": 256, "calibrate": False},
}
# Logits of some tens, summed over matrices of some hundred columns in float32.
EXACT_TOLERANCE = 2e-4


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


def replace_graph(folder: Path, model: onnx.ModelProto | None = None) -> None:
    """Puts another graph into a bundle, or finds it there, and describes it in the manifest."""
    if model is not None:
        config = GPT2Config.from_dict(json.loads((folder / bundle.CONFIG).read_text()))
        (folder / bundle.GRAPH).write_bytes(model.SerializeToString())
        (folder / bundle.RAGGED_GRAPH).write_bytes(ragged.build(model, config).SerializeToString())
    dataclasses.replace(bundle.Manifest.read(folder), files=bundle.describe_files(folder)).write(folder)


def rebuild(folder: Path, checkpoint: Checkpoint, tensor: Tensor) -> None:
    """Writes an fp32 bundle's network anew, with other weights."""
    write_graphs(folder, checkpoint.config, tensor, tied=True)
    replace_graph(folder)


def add_second_graph(opened: bundle.Bundle, rounding: PerTensor) -> bundle.Bundle:
    """Gives an int8 bundle a second graph in which every layer rounds its input in this way."""
    model = onnx.load(opened.folder / bundle.GRAPH, load_external_data=False)
    matrices = [node.name.removesuffix(".matmul") for node in model.graph.node if node.op_type == "MatMulNBits"]
    layers = dict.fromkeys(["lm_head" if name == "logits" else name for name in matrices], rounding)
    second, weights_graph = second_graph.build(model, layers)
    (opened.folder / bundle.WIDE_GRAPH).write_bytes(ragged.build(second, opened.config).SerializeToString())
    (opened.folder / bundle.WIDE_WEIGHTS).write_bytes(weights_graph.SerializeToString())
    replace_graph(opened.folder)
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


class JudgedBundles:
    """Tests of quantised bundles by a judge; a subclass has one, and fixtures `source` and `fp32`, its bundle in fp32."""

    judge: Judge

    @pytest.fixture(scope="class")
    @classmethod
    def quantized(cls, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bundle.Bundle]:
        """The source in each precision, calibrated and, as "int8 plain", not."""
        folder = tmp_path_factory.mktemp("quantized")
        return {
            name + suffix: gpt2onnx.export(
                source, folder / (name + suffix), calibrate=not suffix, quality=False, **CALIBRATED[name]
            )
            for name in CALIBRATED
            for suffix in ("", " plain")
        }

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("name", QUANTIZED)
    def test_logits_are_those_of_the_stored_weights(
        self, name: str, precision: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
    ) -> None:
        """In a bundle that rounds no activations, so that its weights' layout is judged alone."""
        checkpoint = make_checkpoint(**CONFIGS[name])
        made = gpt2onnx.export(checkpoint, tmp_path / "bundle", **PRECISIONS[precision], quality=False)
        tokens = random_tokens(made.config, 1)
        expected = self.judge(checkpoint, weights_of(made)).logits(tokens)
        compute_in_float32(made.folder)
        opened = bundle.Bundle.open(made.folder)
        assert_close(logits_of_prompt(opened, tokens), expected, EXACT_TOLERANCE, "whole")

        session = Runner(opened, threads=1)
        cache = session.new_cache(1, tokens.shape[1])
        for index in range(tokens.shape[1]):
            step = session.forward(cache, slice(0, 1), tokens[:, index : index + 1])
            assert_close(step, expected[:, index], EXACT_TOLERANCE, f"step {index}")

    @pytest.mark.parametrize("precision", CALIBRATED)
    def test_rounded_activations_change_little(
        self, precision: str, source: Path, quantized: dict[str, bundle.Bundle]
    ) -> None:
        opened = quantized[precision]
        tokens, network = many_tokens(opened.config), self.judge(source, weights_of(opened))
        assert_off_by_rounding(logits_of_prompt(opened, tokens), network, tokens, roundings_of(opened))

    def test_layers_are_quantised_for_both_networks(self, source: Path, fp32: Path, tmp_path: Path) -> None:
        """Their targets are the exact network's outputs, their inputs those behind the bundle's weights."""
        checkpoint, reference = Checkpoint.open(str(source)), bundle.Bundle.open(fp32)
        config, seen, tokens = checkpoint.config, dict[str, Moments](), fixed_texts(checkpoint.config, 3)

        class Recorder(SequentialCalibrator):
            def observe(self, name: str, inputs: np.ndarray, outputs: np.ndarray) -> Moments:
                return seen.setdefault(name, super().observe(name, inputs, outputs))

        collected = statistics.collect(reference, tokens, threads=1, gradients=False)
        recorder = Recorder(
            config,
            checkpoint.tensor,
            lambda name: blocks(config, "int8", name),
            collected,
            tied=checkpoint.tied,
            per_tensor=False,
        )
        folder = shutil.copytree(fp32, tmp_path / "int8")
        write_graphs(folder, config, recorder.run().weights, tied=checkpoint.tied)
        replace_graph(folder)

        exact = self.judge(source, None).matrices(tokens)
        quantised = self.judge(source, weights_of(bundle.Bundle.open(folder))).matrices(tokens)
        assert set(exact) == set(quantised) == set(seen)
        for name, moments in seen.items():
            x, y = quantised[name][0], exact[name][1]
            limits = {"mean": x.std(), "covariance": x.var(), "target": y.std(), "cross": x.std() * y.std()}
            expected = {
                "mean": x.mean(0),
                "covariance": np.cov(x.T, bias=True),
                "target": y.mean(0),
                "cross": (x - x.mean(0)).T @ (y - y.mean(0)) / len(x),
            }
            for figure, limit in limits.items():
                assert_close(getattr(moments, figure), expected[figure], 3e-3 * limit, f"{name} {figure}")

    def test_quality_is_that_of_the_stored_weights(
        self, source: Path, fp32: Path, quantized: dict[str, bundle.Bundle]
    ) -> None:
        made = quantized["int4 plain"]
        text = "Once upon a time there was a fox who wished to see the sea. " * 20
        found = quality.on_text(made, bundle.Bundle.open(fp32), text, threads=1)

        ids = gpt2onnx.load(fp32, threads=1).tokenizer.encode(text)
        assert len(ids) < made.config.n_positions
        networks = self.judge(source, None), self.judge(source, weights_of(made))
        truth, candidate = (log_softmax(each.logits(np.array([ids]))[0, :-1].astype(np.float64)) for each in networks)
        rows, following = np.arange(len(ids) - 1), ids[1:]
        divergence = float((np.exp(truth) * (truth - candidate)).sum(-1).mean())
        assert found.tokens == len(ids) - 1
        assert found.reference_perplexity == pytest.approx(math.exp(-truth[rows, following].mean()), rel=1e-4)
        # Activations are rounded, too: the figures are the bundle's, the judge's those of the weights alone.
        assert found.perplexity == pytest.approx(math.exp(-candidate[rows, following].mean()), rel=0.02)
        assert found.kl == pytest.approx(divergence, rel=0.2)


def compute_in_float32(folder: Path) -> None:
    """Tells a bundle's graph not to round activations."""
    model = onnx.load(folder / bundle.GRAPH, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                assert attribute.i == 4
                attribute.i = 1
    replace_graph(folder, model)


def many_tokens(config: GPT2Config) -> np.ndarray:
    """int64 [1, 64]."""
    return np.random.default_rng(1).integers(config.vocab_size, size=(1, 64))


def assert_off_by_rounding(
    found: np.ndarray, network: Judged, tokens: np.ndarray, rounding: Callable[[str], InputRounding]
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
