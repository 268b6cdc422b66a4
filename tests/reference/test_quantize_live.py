"""The quality of quantised bundles as they come by default, which takes minutes; tests/exporter/quantize has the rest."""

import math
from pathlib import Path

import pytest
from support.quantized import CALIBRATED

import gpt2onnx
from gpt2onnx.exporter.validate import quality
from gpt2onnx.models.bundle import Bundle

# Of the embedded model: mean KL divergence from fp32 in nats per token, on texts of its own.
LIMITS = {"int8": 0.001, "int4": 0.0045, "int4 pure": 0.022}


@pytest.mark.parametrize("precision", CALIBRATED)
def test_promised_quality(precision: str, tales_bundle: Path, tmp_path: Path) -> None:
    """On texts that the fp32 model samples, others than those that it calibrates with."""
    made = gpt2onnx.export("tales", tmp_path / "bundle", quality=False, **CALIBRATED[precision])
    found = quality.on_own_samples(made, Bundle.open(tales_bundle), tokens=2048, seed=7)
    most = LIMITS[precision]
    assert found.kl <= most, f"KL {found.kl:.5f}, promised is {most}"
    # Expected is that the logarithm of perplexity rises by the divergence; over few tokens it scatters.
    rise = math.log(found.perplexity / found.reference_perplexity)
    scatter = math.sqrt(2 * most / found.tokens)
    assert rise <= most + 3 * scatter, f"the loss rises by {rise:.5f} nats"
