"""Quantised bundles against the very weights they hold, computed in PyTorch, and how good they are as they come by default."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import MakeCheckpoint
from support.graphs import CONFIGS
from support.network import OnInput
from support.quantized import (
    PRECISIONS,
    QUANTIZED,
    assert_logits_of_stored_weights,
    assert_quality,
    assert_rounds_activations_as_said,
    assert_twins,
)
from support.reference import load_reference

import gpt2onnx
from gpt2onnx.exporter.quantize.blocks.calibrate import observe
from gpt2onnx.exporter.validate import quality
from gpt2onnx.models.bundle import Bundle

pytestmark = pytest.mark.usefixtures("wide_at_any_width")
# Of the embedded model: mean KL divergence from fp32 in nats per token, on texts of its own.
LIMITS = {"int8": 0.001, "int4": 0.0045, "int4 pure": 0.022}


class InPyTorch:
    """A judge: the checkpoint in transformers, its weights replaced by others."""

    def __init__(self, checkpoint: Path, weights: Mapping[str, np.ndarray] | None = None) -> None:
        self._model = load_reference(checkpoint)
        state = self._model.state_dict()
        with torch.no_grad():
            for name, array in (weights or {}).items():
                place = name if name.startswith("lm_head") else f"transformer.{name}"
                assert state[place].shape == array.shape
                state[place].copy_(torch.from_numpy(array.copy()))
        blocks = dict(self._model.transformer.named_modules())
        self._matrices: dict[str, Any] = {
            name: module for name, module in blocks.items() if name.endswith(("c_attn", "c_proj", "c_fc"))
        }

    def logits(self, tokens: np.ndarray, on_input: OnInput | None = None) -> np.ndarray:
        def hook(name: str) -> Any:
            return lambda module, arguments: (torch.from_numpy(on_input(name, arguments[0].numpy())),)

        matrices = self._matrices | {"lm_head": self._model.lm_head} if on_input else {}
        hooks = [module.register_forward_pre_hook(hook(name)) for name, module in matrices.items()]
        with torch.no_grad():
            logits = self._model(torch.from_numpy(tokens)).logits.numpy()
        for each in hooks:
            each.remove()
        return logits

    def matrices(self, tokens: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

        def keep(name: str) -> Any:
            def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
                seen[name] = tuple(each.flatten(0, -2).double().numpy() for each in (arguments[0], output))

            return hook

        hooks = [module.register_forward_hook(keep(name)) for name, module in self._matrices.items()]
        self.logits(tokens)
        for each in hooks:
            each.remove()
        return seen


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_logits_are_those_of_the_stored_weights(
    name: str, precision: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(**CONFIGS[name])
    gpt2onnx.export(checkpoint, tmp_path / "bundle", **PRECISIONS[precision], quality=False)
    assert_logits_of_stored_weights(checkpoint, tmp_path / "bundle", InPyTorch)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The embedded model in each quantised precision, as it comes by default, and int8 without calibration."""
    folder = tmp_path_factory.mktemp("quantized")
    options = {name: PRECISIONS[name] for name in LIMITS} | {"int8 plain": {"dtype": "int8", "calibrate": False}}
    return {name: gpt2onnx.export("tales", folder / name, quality=False, **each) for name, each in options.items()}


@pytest.mark.parametrize("precision", LIMITS)
def test_rounded_activations_change_little(
    precision: str, quantized: dict[str, Bundle], tales_checkpoint: Path
) -> None:
    assert_rounds_activations_as_said(tales_checkpoint, quantized[precision].folder, InPyTorch)


@pytest.mark.parametrize("precision", LIMITS)
def test_promised_quality(precision: str, quantized: dict[str, Bundle], tales_bundle: Path) -> None:
    """On texts that the fp32 model samples, others than those that it calibrates with."""
    found = quality.on_own_samples(quantized[precision], Bundle.open(tales_bundle), tokens=2048, seed=7, threads=1)
    most = LIMITS[precision]
    assert found.kl <= most, f"KL {found.kl:.5f}, promised is {most}"
    # Expected is that the logarithm of perplexity rises by the divergence, and of so many tokens it scatters.
    rise = math.log(found.perplexity / found.reference_perplexity)
    scatter = math.sqrt(2 * most / found.tokens)
    assert rise <= most + 3 * scatter, f"the loss rises by {rise:.5f} nats"


def test_calibration_helps(quantized: dict[str, Bundle], tales_bundle: Path) -> None:
    reference = Bundle.open(tales_bundle)
    kl = {
        name: quality.on_own_samples(quantized[name], reference, tokens=512, seed=7, threads=1).kl
        for name in ("int8", "int8 plain")
    }
    assert kl["int8"] < 0.75 * kl["int8 plain"], f"KL {kl}"


def test_twins_are_the_network_and_its_quantised_one(tales_checkpoint: Path, tmp_path: Path) -> None:
    made = gpt2onnx.export(tales_checkpoint, tmp_path / "int8", dtype="int8", calibrate=False, quality=False)
    seen = observe(gpt2onnx.export(tales_checkpoint, tmp_path / "fp32"), threads=1, texts=3, gradients=False)
    assert_twins(tales_checkpoint, seen, made.folder, InPyTorch)


def test_quality_is_that_of_pytorch(tales_checkpoint: Path, tales_bundle: Path, tmp_path: Path) -> None:
    made = gpt2onnx.export(tales_checkpoint, tmp_path / "int4", dtype="int4", calibrate=False, quality=False)
    assert_quality(tales_checkpoint, made.folder, tales_bundle, InPyTorch)
