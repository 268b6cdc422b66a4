"""Smoothing: the same network for any scale of its channels, and the same quantised weights."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import MakeCheckpoint, scale_channels
from support.golden import assert_close
from support.graphs import logits_of_prompt, random_tokens
from support.quantized import fixed_texts, in_numpy, rebuild, root_mean_square, weights_of

import gpt2onnx
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.quantize.activations import InputStats
from gpt2onnx.exporter.quantize.layers import Tensor
from gpt2onnx.exporter.quantize.statistics import collect
from gpt2onnx.exporter.quantize.transforms import Ranges, Smoothing, range_by_weights, range_on
from gpt2onnx.exporter.validate import quality
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.models.precision import Blocks
from gpt2onnx.runtime.engine.kv_cache import HostStorage
from gpt2onnx.runtime.engine.runner import Runner

# Precisions with matrices of 8 and 4 bits; `pure` has no others.
PRECISIONS = ("int8", "int4")
ExportTales = Callable[..., Bundle]


def smoothing(checkpoint: Checkpoint, ranges: Ranges, bits: int = 8) -> Smoothing:
    return Smoothing(checkpoint.config, checkpoint.tensor, lambda layer: Blocks(bits, 32), ranges)


def divided(inputs: InputStats, checkpoint: Checkpoint, tensor: Tensor, layer: str) -> InputStats:
    """A matrix' inputs divided by what smoothing multiplied it by, channel by channel."""
    name = f"{layer}.weight"
    factors = tensor(name)[:, 0] / checkpoint.tensor(name)[:, 0]
    return InputStats(inputs.mean / factors, inputs.sample / factors)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_smoothed_network_is_the_same_network(
    bits: int, calibrated: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint()
    made, checkpoint = gpt2onnx.export(source, tmp_path / "fp32"), Checkpoint.open(str(source))
    tokens = fixed_texts(made.config, 32)
    before = collect(made, tokens)
    by_weights = partial(range_by_weights, checkpoint.config, checkpoint.tensor)
    smoothed = smoothing(checkpoint, partial(range_on, before.inputs) if calibrated else by_weights, bits)
    expected_inputs = {
        name: each if name.endswith(("mlp.c_proj", "lm_head")) else divided(each, checkpoint, smoothed.tensor, name)
        for name, each in before.inputs.items()
    }
    rebuild(made.folder, checkpoint, smoothed.tensor)

    opened = Bundle.open(made.folder)
    prompt = random_tokens(checkpoint.config, 1)
    expected = in_numpy(source).logits(prompt)
    assert_close(logits_of_prompt(opened, prompt), expected, 1e-5 * np.abs(expected).max(), "smoothed")

    after = collect(opened, tokens)
    for name, inputs in after.inputs.items():
        sample, scale = expected_inputs[name].sample, np.abs(expected_inputs[name].sample).max()
        np.testing.assert_allclose(inputs.sample, sample, rtol=0, atol=1e-4 * scale, err_msg=name)
    for name, moment in smoothed.gradients(before.gradients).items():
        np.testing.assert_allclose(after.gradients[name], moment, atol=1e-4 * np.abs(moment).max(), err_msg=name)


def test_smoothing_evens_channels_out(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint.open(str(make_checkpoint()))
    sample = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    sample[:, 5] *= 100
    inputs = {"h.1.mlp.c_fc": InputStats(sample.mean(0), sample)}
    tensor = smoothing(checkpoint, partial(range_on, inputs)).tensor
    largest = np.abs(divided(inputs["h.1.mlp.c_fc"], checkpoint, tensor, "h.1.mlp.c_fc").sample).max(0)
    assert largest.max() / np.median(largest) < 15


@pytest.mark.parametrize("weights", ["none", "of one channel"])
def test_channels_that_no_weight_reads_are_no_outliers(weights: str, make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint.open(str(make_checkpoint()))
    ranges = np.ones(32, np.float32)
    ranges[5] = 100

    def tensor(name: str) -> np.ndarray:
        array = checkpoint.tensor(name)
        if name == "h.1.mlp.c_fc.weight":
            array = np.zeros_like(array) if weights == "none" else array * (np.arange(32) != 5)[:, None]
        return array

    found = Smoothing(checkpoint.config, tensor, lambda layer: Blocks(8, 32), lambda layer: ranges).tensor
    divisors = checkpoint.tensor("h.1.ln_2.weight") / found("h.1.ln_2.weight")
    after = ranges / divisors
    if weights == "none":
        np.testing.assert_array_equal(after, ranges)
    else:
        assert after[5] < np.delete(after, 5).max()


def test_ranges_without_data_are_those_of_normal_numbers(make_checkpoint: MakeCheckpoint) -> None:
    """Root mean squares, where a norm multiplies normal numbers by its weight."""
    checkpoint = Checkpoint.open(str(make_checkpoint()))
    random, tensor = np.random.default_rng(0), checkpoint.tensor

    def behind(norm: str) -> np.ndarray:
        return random.standard_normal((40_000, 32)) * tensor(f"h.1.{norm}.weight") + tensor(f"h.1.{norm}.bias")

    outputs = behind("ln_1") @ tensor("h.1.attn.c_attn.weight") + tensor("h.1.attn.c_attn.bias")
    expected = {"attn.c_attn": behind("ln_1"), "mlp.c_fc": behind("ln_2"), "attn.c_proj": outputs[:, 64:]}
    for layer, inputs in expected.items():
        found = range_by_weights(checkpoint.config, tensor, f"h.1.{layer}")
        np.testing.assert_allclose(found, np.sqrt(np.square(inputs).mean(0)), rtol=0.03, err_msg=layer)


@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_quantised_weights_are_those_of_the_network_without_scales(
    dtype: str, calibrate: bool, short_tales: Path, export_short_tales: ExportTales, tmp_path: Path
) -> None:
    """To the last bit for a power of two, by which float32 multiplies exactly."""
    options = {"dtype": dtype, "calibrate": calibrate, "quality": False}
    scaled = scale_channels(short_tales, tmp_path / "source", 32)
    original, changed = (Checkpoint.open(str(each)).tensor("h.1.ln_2.weight") for each in (short_tales, scaled))
    assert (original != changed).sum() == 3
    expected = weights_of(export_short_tales(**options))
    found = weights_of(export_short_tales(scaled, **options))
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_scaled_channels_cost_nothing(
    dtype: str, calibrate: bool, short_tales: Path, export_short_tales: ExportTales, tmp_path: Path
) -> None:
    kl: list[float] = []
    for each in (short_tales, scale_channels(short_tales, tmp_path / "source", 30)):
        fp32, made = (
            export_short_tales(each, **options)
            for options in ({}, {"dtype": dtype, "calibrate": calibrate, "quality": False})
        )
        kl.append(quality.on_own_samples(made, fp32, tokens=256, seed=7).kl)
    assert kl[1] < 1.3 * kl[0], f"KL {kl[1]:.5f}, without scales {kl[0]:.5f}"


def test_keys_and_values_of_the_twin_are_those_of_the_network(short_tales: Path, tmp_path: Path) -> None:
    """Both read one cache, so scaled values must stay scaled."""
    made = gpt2onnx.export(scale_channels(short_tales, tmp_path / "source", 30), tmp_path / "bundle", twin=True)
    tokens, found = random_tokens(made.config, 1), []
    for twin in (False, True):
        runner = Runner(made, threads=1, twin=twin)
        cache = runner.new_cache(1, tokens.shape[1])
        runner.forward(cache, slice(0, 1), tokens)
        assert isinstance(cache.storage, HostStorage)
        found.append(cache.data.copy())
    for layer, (network, twin_network) in enumerate(zip(*found, strict=True)):
        for channels in np.ndindex(*network.shape[:3]):
            expected, values = network[channels], twin_network[channels]
            scale = np.sqrt(np.square(expected).mean(0)) + 0.01 * root_mean_square(expected)
            assert_close(values / scale, expected / scale, 0.3, f"layer {layer}, {channels}")
