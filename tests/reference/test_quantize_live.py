"""Quantised bundles against the weights they hold, computed in PyTorch, and the quality of bundles as they come by default."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.network import OnInput
from support.quantized import CALIBRATED, JudgedBundles
from support.reference import load_reference

from gpt2onnx.exporter.validate import quality
from gpt2onnx.models.bundle import Bundle

pytestmark = pytest.mark.usefixtures("wide_at_any_width")
# Of the embedded model: mean KL divergence from fp32 in nats per token, on texts of its own.
LIMITS = {"int8": 0.001, "int4": 0.0045, "int4 pure": 0.022}


@pytest.fixture(scope="module")
def source(tales_checkpoint: Path) -> Path:
    return tales_checkpoint


@pytest.fixture(scope="module")
def fp32(tales_bundle: Path) -> Path:
    return tales_bundle


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


class TestInPyTorch(JudgedBundles):
    judge = InPyTorch

    @pytest.mark.parametrize("precision", CALIBRATED)
    def test_promised_quality(self, precision: str, quantized: dict[str, Bundle], fp32: Path) -> None:
        """On texts that the fp32 model samples, others than those that it calibrates with."""
        found = quality.on_own_samples(quantized[precision], Bundle.open(fp32), tokens=2048, seed=7, threads=1)
        most = LIMITS[precision]
        assert found.kl <= most, f"KL {found.kl:.5f}, promised is {most}"
        # Expected is that the logarithm of perplexity rises by the divergence; over few tokens it scatters.
        rise = math.log(found.perplexity / found.reference_perplexity)
        scatter = math.sqrt(2 * most / found.tokens)
        assert rise <= most + 3 * scatter, f"the loss rises by {rise:.5f} nats"

    def test_calibration_helps(self, quantized: dict[str, Bundle], fp32: Path) -> None:
        kl, plain = (
            quality.on_own_samples(quantized[name], Bundle.open(fp32), tokens=512, seed=7, threads=1).kl
            for name in ("int8", "int8 plain")
        )
        assert kl < 0.75 * plain, f"KL {kl:.5f}, without calibration {plain:.5f}"
