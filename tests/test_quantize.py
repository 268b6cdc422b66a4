"""Quantised bundles against the very weights they hold, computed in PyTorch, and against fp32."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import CommandLine, MakeCheckpoint, load_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from test_graph import CONFIGS, QUANTIZED, TOKENS, assert_close, random_tokens, torch_logits

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.exporter import quality
from gpt2onnx.exporter.calibrate import Calibration, observe, sample
from gpt2onnx.exporter.checkpoint import Checkpoint
from gpt2onnx.exporter.graph import build
from gpt2onnx.exporter.inputs import Moments, Tensor, centre
from gpt2onnx.exporter.operators import Precision
from gpt2onnx.exporter.quantize import QuantizedMatrix, dequantize, quantize
from gpt2onnx.exporter.twins import Part, Twins
from gpt2onnx.exporter.weights import WeightsFile
from gpt2onnx.models import bundle
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.precision import blocks, memory
from gpt2onnx.runtime.session import Session

pytestmark = pytest.mark.usefixtures("wide_at_any_width")
PRECISIONS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int4 pure": {"dtype": "int4", "pure": True},
    "int8 in blocks of 16": {"dtype": "int8", "block_size": 16, "calibrate": False},
    "int4 in blocks of 256": {"dtype": "int4", "block_size": 256, "calibrate": False},
}
# Of the embedded model: mean KL divergence from fp32 in nats per token, on texts of its own.
LIMITS = {"int8": 0.001, "int4": 0.0045, "int4 pure": 0.022}
# Logits of some tens, summed over matrices of some hundred columns in float32.
EXACT_TOLERANCE = 2e-4
# accuracy_level 4 lets MatMulNBits round its other operand, the activations, to 8 bits in each block: by up
# to 1/254 of the block's largest, about 1/254 of their root mean square on average. A trained network of
# 6 blocks has 25 such matrices in a row, so that their errors add up to about 1/50 of the logits' spread.
ACTIVATION_TOLERANCE = 0.02


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


def with_stored_weights(checkpoint: Path, folder: Path) -> torch.nn.Module:
    """The checkpoint in PyTorch, its weights replaced by what the bundle holds: matrices, biases, norms, positions."""
    model = load_reference(checkpoint)
    matrices = stored_matrices(folder, model.config.n_embd)
    tied = model.config.tie_word_embeddings
    assert len(matrices) == 4 * model.config.n_layer + (1 if tied else 2)
    state = model.state_dict()
    head = matrices.pop("lm_head", None)
    vectors = {
        name: array
        for name, array in stored_arrays(onnx.load(folder / bundle.GRAPH)).items()
        if f"transformer.{name}" in state
    }
    assert len(vectors) == 8 * model.config.n_layer + 3
    with torch.no_grad():
        for name, array in vectors.items():
            state[f"transformer.{name}"].copy_(torch.from_numpy(array.copy()))
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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_logits_are_those_of_the_stored_weights(
    name: str, precision: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(**CONFIGS[name])
    gpt2onnx.export(checkpoint, tmp_path / "bundle", **PRECISIONS[precision], quality=False)
    stored = with_stored_weights(checkpoint, tmp_path / "bundle")
    compute_in_float32(tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    session = Session(opened, threads=1)
    tokens = random_tokens(opened.config, 1)
    expected = torch_logits(stored, tokens)

    cache = session.new_cache(1, TOKENS)
    assert_close(session.forward(cache, slice(0, 1), tokens, keep=TOKENS), expected, "whole", EXACT_TOLERANCE)

    cache = session.new_cache(1, TOKENS)
    for index in range(TOKENS):
        step = session.forward(cache, slice(0, 1), tokens[:, index : index + 1])
        assert_close(step[:, 0], expected[:, index], f"step {index}", EXACT_TOLERANCE)


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
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_feedback_lowers_the_error_of_what_was_not_calibrated_with(bits: int, block_size: int) -> None:
    """Inputs of 90 numbers that come from 30; error of the outputs for others of the same kind."""
    random = np.random.default_rng(bits)
    mixing = random.standard_normal((30, 90))

    def inputs(count: int) -> np.ndarray:
        return random.standard_normal((count, 30)) @ mixing + 0.1 * random.standard_normal((count, 90))

    matrix = random.standard_normal((50, 90)).astype(np.float32)
    covariance = np.cov(inputs(2000).T).astype(np.float32)
    others = inputs(500)

    def error(quantized: QuantizedMatrix) -> float:
        return float((((dequantize(quantized) - matrix) @ others.T) ** 2).mean())

    nearest, fed_back = error(quantize(matrix, bits, block_size)), error(quantize(matrix, bits, block_size, covariance))
    assert fed_back < 0.3 * nearest, f"mean squared error {fed_back:.3g}, rounding to nearest has {nearest:.3g}"


@pytest.mark.parametrize("bits", [4, 8])
def test_feedback_without_correlations_is_rounding_to_nearest(bits: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((7, 40)).astype(np.float32)
    plain, fed_back = quantize(matrix, bits, 16), quantize(matrix, bits, 16, np.diag(np.full(40, 3.0, np.float32)))
    np.testing.assert_array_equal(fed_back.scales, plain.scales.astype(np.float16))  # in which they are stored
    # What lies halfway between two values may go either way, since scales are refitted after rounding.
    moved = np.abs(dequantize(fed_back) - matrix).sum() / np.abs(dequantize(plain) - matrix).sum()
    assert moved <= 1 + 1e-3


def test_feedback_between_rows_lowers_what_errors_cost() -> None:
    """Outputs whose gradients are those of a few directions; cost for other inputs and gradients of the same kind."""
    random = np.random.default_rng(0)
    mixing, directions = random.standard_normal((30, 90)), random.standard_normal((12, 50))

    def of(mixed: np.ndarray, count: int) -> np.ndarray:
        noise = 0.1 * random.standard_normal((count, mixed.shape[1]))
        return random.standard_normal((count, len(mixed))) @ mixed + noise

    matrix = random.standard_normal((50, 90)).astype(np.float32)
    covariance = np.cov(of(mixing, 2000).T).astype(np.float32)
    seen = of(directions, 2000)
    gradients = (seen.T @ seen / len(seen)).astype(np.float32)
    inputs, others = of(mixing, 500), of(directions, 500)

    def cost(*given: np.ndarray) -> float:
        errors = inputs @ (dequantize(quantize(matrix, 4, 32, *given)) - matrix).T
        return float(((errors @ others.T) ** 2).mean())

    alone, together = cost(covariance), cost(covariance, gradients)
    assert together < 0.4 * alone, f"cost {together:.4g}, with rows on their own {alone:.4g}"


def test_the_last_row_makes_up_for_the_others() -> None:
    """With 8 bits it comes close to what is best for it, after rows of 4 bits that say the same of the output."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((16, 48)).astype(np.float32)
    matrix[-1] = 0
    gradients = np.ones((16, 16), np.float32) + 1e-3 * np.eye(16, dtype=np.float32)
    found = dequantize(quantize(matrix, 4, 16, np.eye(48, dtype=np.float32), gradients))
    errors = matrix - found
    # The damping, 0.2 of the variance, leaves the last row 1 / 1.2 of the sum to take on itself, and it rounds that.
    best = errors[:-1].sum(0) / 1.2
    assert np.abs(found[-1] - best).max() < 0.6 * np.abs(best).max() / 7
    rest = np.abs(errors[:-1].sum(0)).mean()
    plain = np.abs((matrix - dequantize(quantize(matrix, 4, 16, np.eye(48, dtype=np.float32)))).sum(0)).mean()
    assert rest < plain, f"errors add up to {rest:.3g}, with rows on their own to {plain:.3g}"


def test_independent_rows_are_rounded_on_their_own() -> None:
    random = np.random.default_rng(0)
    matrix = random.standard_normal((35, 40)).astype(np.float32)
    covariance = np.cov(random.standard_normal((300, 40)).T).astype(np.float32)
    alone = quantize(matrix, 4, 16, covariance)
    for gradients in (np.diag(random.uniform(1, 9, 35)), np.zeros((35, 35))):
        found = quantize(matrix, 4, 16, covariance, gradients.astype(np.float32))
        np.testing.assert_array_equal(found.scales, alone.scales)
        np.testing.assert_array_equal(found.data, alone.data)


def test_feedback_heeds_constant_and_dead_inputs() -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    for covariance in (np.zeros((32, 32)), np.ones((32, 32))):
        found = dequantize(quantize(matrix, 4, 16, covariance.astype(np.float32)))
        assert np.isfinite(found).all()
        assert np.abs(found - matrix).max() < 1


@pytest.fixture(scope="module")
def observed(tales_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    copy = shutil.copytree(tales_bundle, tmp_path_factory.mktemp("observed") / "fp32")
    return observe(Bundle.open(copy), threads=1, texts=8)


def test_inputs_are_those_of_pytorch(observed: Calibration, tales_bundle: Path, tales_reference: Any) -> None:
    opened = Bundle.open(tales_bundle)
    layers = [0, opened.config.n_layer - 1]
    names = [
        f"h.{layer}.{name}" for layer in layers for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        tales_reference.transformer.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: seen[name].append(arguments[0].flatten(0, -2))
        )
        for name in names
    ]
    heads: list[torch.Tensor] = []
    hooks.append(
        tales_reference.transformer.ln_f.register_forward_hook(
            lambda module, arguments, output: heads.append(output.flatten(0, -2))
        )
    )
    for row in observed.tokens:
        torch_logits(tales_reference, row[None])
    for hook in hooks:
        hook.remove()
    for name in names:
        x = torch.cat(seen[name]).double().numpy()
        spread = x.std()
        inputs = observed.inputs[name]
        np.testing.assert_allclose(inputs.mean, x.mean(0), atol=1e-3 * spread, err_msg=name)
        first = inputs.sample[0]  # of the first text's first token, as anywhere in the sample
        np.testing.assert_allclose(first, x[0], atol=1e-3 * spread, err_msg=name)
        farthest = max(np.abs(x - row).max(-1).min() for row in inputs.sample[::32])
        assert farthest < 2e-3 * spread, f"{name}: a row of the sample is off by {farthest / spread:.4f} of the spread"
    x = torch.cat(heads).double().numpy()
    assert observed.head is not None
    np.testing.assert_allclose(observed.head.second_moment, x.T @ x / len(x), atol=3e-3 * (x**2).mean())


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": False, "n_embd": 35, "n_head": 7},
        {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "n_head": 1},
        {"scale_attn_weights": False, "layer_norm_epsilon": 0.1, "initializer_range": 0.1},
        {"n_inner": 99, "n_layer": 1},
        *({"activation_function": each} for each in ("gelu", "relu2", "quick_gelu", "laplace", "linear")),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_gradients_are_those_of_pytorch(
    settings: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(**settings)
    made = gpt2onnx.export(source, tmp_path / "fp32")
    calibration = observe(made, threads=1, texts=3)
    reference = load_reference(source)
    outputs: dict[str, torch.Tensor] = {}
    names = [f"h.{layer}.{each}" for layer in range(made.config.n_layer) for each in ("attn.c_attn", "mlp.c_proj")]
    for name in names:
        reference.transformer.get_submodule(name).register_forward_hook(
            lambda module, arguments, output, name=name: outputs.update({name: output})
        )
    expected = dict.fromkeys(names, 0.0)
    for text in torch.from_numpy(calibration.tokens):
        logits = reference(text[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, text[1:], reduction="sum")
        for name, gradient in zip(names, torch.autograd.grad(loss, [outputs[each] for each in names]), strict=True):
            expected[name] += (gradient[0].T @ gradient[0]).numpy() / calibration.tokens.size
    for name, moment in expected.items():
        found, largest = calibration.gradients[name], np.abs(moment).max()
        np.testing.assert_allclose(found, moment, atol=1e-3 * largest, rtol=0, err_msg=name)


def test_twins_are_the_network_and_its_quantised_one(
    observed: Calibration, tales_checkpoint: Path, tales_reference: Any, tmp_path: Path
) -> None:
    """What each matrix is quantised for: outputs as in PyTorch, inputs as in PyTorch with the bundle's weights."""
    seen: dict[str, Moments] = {}

    class Recorder(Twins):
        def reach(self, part: Part, x: str, *rest: Any) -> Moments | None:
            moments = super().reach(part, x, *rest)
            assert moments is not None
            return seen.setdefault(x, moments)

    made = gpt2onnx.export(tales_checkpoint, tmp_path / "int8", dtype="int8", calibrate=False, quality=False)
    checkpoint = Checkpoint.open(str(tales_checkpoint))
    tokens = observed.tokens[:3]
    twins = Recorder(tokens, observed.head, {}, threads=1)
    precision = Precision(blocks=lambda name: blocks(checkpoint.config, "int8", name))
    with (made.folder / bundle.WEIGHTS).open("wb") as file:
        weights = WeightsFile(made.folder / bundle.WEIGHTS, file)
        model, _ = build(
            checkpoint.config, checkpoint.tensor, tied=True, precision=precision, weights=weights, twins=twins
        )
    replace_graph(made.folder, model)
    quantised = with_stored_weights(tales_checkpoint, made.folder)

    names = {
        node.input[0]: node.name.removesuffix(".matmul") for node in model.graph.node if node.name.endswith(".matmul")
    }
    assert seen.keys() == names.keys()
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names.values()}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names.values()}
    for name in names.values():
        tales_reference.transformer.get_submodule(name).register_forward_hook(
            lambda module, arguments, output, name=name: outputs[name].append(output.flatten(0, -2))
        )
        quantised.get_submodule(f"transformer.{name}").register_forward_pre_hook(
            lambda module, arguments, name=name: inputs[name].append(arguments[0].flatten(0, -2))
        )
    for network in (tales_reference, quantised):
        for row in tokens:
            torch_logits(network, row[None])
    for value, name in names.items():
        x, y = torch.cat(inputs[name]).double().numpy(), torch.cat(outputs[name][: len(tokens)]).double().numpy()
        moments = seen[value]
        limits = {"mean": x.std(), "covariance": x.var(), "wanted": y.std(), "cross": x.std() * y.std()}
        expected = {
            "mean": x.mean(0),
            "covariance": np.cov(x.T, bias=True),
            "wanted": y.mean(0),
            "cross": (x - x.mean(0)).T @ (y - y.mean(0)) / len(x),
        }
        for figure, limit in limits.items():
            found = getattr(moments, figure)
            np.testing.assert_allclose(found, expected[figure], atol=3e-3 * limit, err_msg=f"{name} {figure}")


def test_fitted_weights_make_up_for_inputs_that_are_off() -> None:
    """Inputs that depend on each other reach the matrix with errors; outputs for others of the same kind."""
    random = np.random.default_rng(0)
    mixing, weight = random.standard_normal((10, 40)), random.standard_normal((40, 20)).astype(np.float32)
    errors = 0.3 * random.standard_normal((40, 40)) / math.sqrt(40)

    def inputs(count: int) -> tuple[np.ndarray, np.ndarray]:
        exact = random.standard_normal((count, 10)) @ mixing + 0.5
        return exact, exact + exact @ errors + 0.1 * random.standard_normal((count, 40)) + 0.2

    exact, found = inputs(4000)
    moments = Moments.of(found.astype(np.float32), (exact @ weight).astype(np.float32))
    fitted = moments.fitted(weight)
    exact, found = inputs(1000)
    before = np.square(found @ weight - exact @ weight).mean()
    after = np.square(found @ fitted + moments.bias(fitted) - exact @ weight).mean()
    assert after < 0.1 * before, f"mean squared error {after:.3g}, with the weight as it was {before:.3g}"


def test_samples_follow_the_network(tales_bundle: Path) -> None:
    """Their mean loss is the network's own entropy."""
    figures = quality.on_own_samples(
        Bundle.open(tales_bundle), Bundle.open(tales_bundle), tokens=1024, seed=3, threads=1
    )
    session = Session(Bundle.open(tales_bundle), threads=1)
    tokens = sample(session, 16, 65, seed=5)
    losses = []
    for row in tokens:
        logits = session.forward(session.new_cache(1, 64), slice(0, 1), row[None, :-1], keep=64)[0]
        losses.append(torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(row[1:])).item())
    # Two samples of 1024 losses that scatter by about 2.5 nats.
    assert abs(np.mean(losses) - math.log(figures.reference_perplexity)) < 4 * 2.5 * math.sqrt(2 / 1024)


def test_centred_network_is_the_same_network(
    observed: Calibration, tales_checkpoint: Path, tales_reference: Any, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(str(tales_checkpoint))
    tensor, after = centre(checkpoint.config, checkpoint.tensor, observed.inputs)
    folder = gpt2onnx.export(tales_checkpoint, tmp_path / "centred").folder
    rebuild(folder, checkpoint, tensor)

    session = Session(Bundle.open(folder), threads=1)
    tokens = random_tokens(checkpoint.config, 1)
    expected = torch_logits(tales_reference, tokens)
    found = session.forward(session.new_cache(1, TOKENS), slice(0, 1), tokens, keep=TOKENS)
    assert_close(found, expected, "centred", 1e-5 * np.abs(expected).max())

    again = observe(Bundle.open(folder), threads=1, texts=len(observed.tokens))
    for name, inputs in again.inputs.items():
        if not name.endswith("mlp.c_proj"):
            assert not after[name].mean.any()
            largest = np.abs(inputs.mean).max() / np.sqrt(inputs.sample.var(0).mean())
            assert largest < 0.02, f"{name}: a mean is {largest:.3f} of the spread"


@pytest.mark.parametrize(("dtype", "most"), [("fp32", 500e6), ("int8", 140e6), ("int4", 100e6)])
def test_size_of_gpt2(dtype: str, most: float) -> None:
    """Weights in the data file (`memory` is compared with exports in test_inspect) and 1.4 MB of GPT-2's tokenizer."""
    assert memory(GPT2Config(), dtype).weights + 1.4e6 + 0.5e6 < most


def test_scales_beyond_float16_stay_float32(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(initializer_range=1e-5)
    made = gpt2onnx.export(checkpoint, tmp_path / "bundle", dtype="int8", quality=False)
    matrices = stored_matrices(made.folder, made.config.n_embd)
    original = load_reference(checkpoint).transformer.wte.weight.detach().numpy()
    assert np.abs(matrices["wte"] - original).max() < np.abs(original).max() / 200


def test_weights_begin_where_they_can_be_mapped(tales_bundle: Path) -> None:
    model = onnx.load(tales_bundle / bundle.GRAPH, load_external_data=False)
    places = [
        {each.key: each.value for each in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.external_data
    ]
    assert all(int(place["offset"]) % 64 == 0 for place in places)
    large = [place for place in places if int(place["length"]) >= 1 << 20]
    assert large
    assert all(int(place["offset"]) % 4096 == 0 for place in large)


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
    opened = quantized[precision]
    session = Session(opened, threads=1)
    tokens = random_tokens(opened.config, 1)
    expected = torch_logits(with_stored_weights(tales_checkpoint, opened.folder), tokens)
    found = session.forward(session.new_cache(1, TOKENS), slice(0, 1), tokens, keep=TOKENS)
    error = np.sqrt(((found - expected) ** 2).mean()) / expected.std()
    assert error <= ACTIVATION_TOLERANCE, f"logits are off by {error:.4f} of their spread"


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


def test_quality_in_the_manifest(tales_checkpoint: Path, tales_bundle: Path, tmp_path: Path) -> None:
    texts = {"fox.txt": "Once upon a time there was a fox. " * 9, "sea.txt": "He wished to see the sea. " * 9}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    paths = [tmp_path / name for name in texts]
    made = gpt2onnx.export(tales_checkpoint, tmp_path / "int8", dtype="int8", calibrate=False, quality_texts=paths)
    figures = made.manifest.quality
    assert figures is not None
    assert figures["text"] == "own samples"
    assert figures["tokens"] == 256
    assert 0 < figures["kl"] < 0.002
    assert [each["text"] for each in figures["texts"]] == list(texts)
    for each in figures["texts"]:
        measured = quality.on_text(made, Bundle.open(tales_bundle), texts[each["text"]], name=each["text"])
        assert each["tokens"] == measured.tokens
        assert each["perplexity"] == pytest.approx(measured.perplexity, rel=1e-4)
        assert each["reference_perplexity"] == pytest.approx(measured.reference_perplexity, rel=1e-4)
        assert each["kl"] == pytest.approx(measured.kl, rel=1e-2)
    assert Bundle.open(tales_bundle).manifest.quality is None
    assert sorted(path.name for path in (tmp_path / "int8").iterdir() if path.is_dir()) == ["onnx"]


def test_quality_texts_on_the_command_line(command_line: CommandLine, tmp_path: Path) -> None:
    text = tmp_path / "sea.txt"
    text.write_text("He wished to see the sea. " * 9, encoding="utf-8")
    options = ["--dtype", "int4", "--no-calibrate", "--no-parity", "--quality-text", text]
    done = command_line("export", "tales", tmp_path / "int4", *options)
    assert done.code == 0, done.err
    assert "sea.txt: perplexity" in done.out
    assert "own samples: perplexity" in done.out
    done = command_line("export", "tales", tmp_path / "other", *options[:-1], tmp_path / "missing.txt")
    assert done.code == 1
    assert "missing.txt" in done.err


def test_quality_is_that_of_pytorch(tales_checkpoint: Path, tales_bundle: Path, tmp_path: Path) -> None:
    made = gpt2onnx.export(tales_checkpoint, tmp_path / "int4", dtype="int4", calibrate=False, quality=False)
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
        {"calibrate": True},
        {"dtype": "fp16", "calibrate": True},
        {"quality_texts": ["missing.txt"]},
        {"dtype": "int8", "quality_texts": ["missing.txt"]},
        {"dtype": "int8", "quality_texts": [__file__], "quality": False},
        {"graph": "other"},
        {"graph": "portable", "dtype": "int8"},
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], tales_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        gpt2onnx.export(tales_checkpoint, tmp_path / "bundle", **options)
    assert not any(tmp_path.iterdir())
