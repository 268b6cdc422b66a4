"""Quantised bundles against the weights they hold, computed by a network that rounds nothing, and against fp32."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.golden import Golden, assert_close, digest
from support.graphs import CONFIGS, expected_logits, logits_of_prompt, random_tokens
from support.quantized import (
    CALIBRATED,
    QUANTIZED,
    JudgedBundles,
    few_texts,
    fixed_texts,
    in_numpy,
    rebuild,
    shortened_tales,
    weights_of,
)
from support.reference import Reference

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.graph.blocks import QuantizedMatrix, dequantize, quantize
from gpt2onnx.exporter.quantize.activations import Moments
from gpt2onnx.exporter.quantize.feedback import quantize_with_feedback
from gpt2onnx.exporter.quantize.statistics import Statistics, collect, sample
from gpt2onnx.exporter.quantize.transforms import centre
from gpt2onnx.exporter.validate import quality
from gpt2onnx.models import bundle
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.precision import memory
from gpt2onnx.runtime.decoding.torch_random import log_softmax
from gpt2onnx.runtime.engine.runner import Runner

pytestmark = pytest.mark.usefixtures("wide_at_any_width")


@pytest.fixture(scope="module", autouse=True)
def _few_texts() -> Iterator[None]:
    """Bundles as they come by default are tested in tests/reference/test_quantize_live.py."""
    with few_texts():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of the embedded model."""
    return shortened_tales(tmp_path_factory.mktemp("short") / "tales")


@pytest.fixture(scope="module")
def fp32(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2onnx.export(source, tmp_path_factory.mktemp("short") / "fp32").folder


# KL divergence from fp32 of what is calibrated, as a share of that without: at most, and where it was measured.
SHARES = {"int8": 0.75, "int4": 0.2, "int4 pure": 0.2}  # 0.57, 0.04, 0.07


class TestInNumPy(JudgedBundles):
    judge = staticmethod(in_numpy)

    @pytest.mark.parametrize("precision", CALIBRATED)
    def test_calibration_helps(self, precision: str, quantized: dict[str, Bundle], fp32: Path) -> None:
        kl, plain = (
            quality.on_own_samples(quantized[name], Bundle.open(fp32), tokens=256, seed=7, threads=1).kl
            for name in (precision, f"{precision} plain")
        )
        assert kl < SHARES[precision] * plain, f"KL {kl:.5f}, without calibration {plain:.5f}"


@pytest.mark.parametrize("name", QUANTIZED)
def test_judge_is_pytorch(name: str, make_checkpoint: MakeCheckpoint, reference_of: type[Reference]) -> None:
    """The judge in NumPy computes what PyTorch computes."""
    reference = reference_of(make_checkpoint(**CONFIGS[name]))
    config = GPT2Config.from_file(reference.folder / "config.json")
    expected = expected_logits(reference, config)
    assert_close(in_numpy(reference.folder).logits(random_tokens(config, 2)), expected, 1e-4)


def test_judge_of_tales_is_pytorch(tales_reference: Reference) -> None:
    ids = np.random.default_rng(0).integers(8192, size=200)
    logits = in_numpy(tales_reference.folder).logits(ids[None])[0]
    assert_close(logits, tales_reference.logits(ids), 1e-4)


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

    nearest, fed_back = (
        error(quantize(matrix, bits, block_size)),
        error(quantize_with_feedback(matrix, bits, block_size, covariance)),
    )
    assert fed_back < 0.3 * nearest, f"mean squared error {fed_back:.3g}, rounding to nearest has {nearest:.3g}"


@pytest.mark.parametrize("bits", [4, 8])
def test_feedback_without_correlations_is_rounding_to_nearest(bits: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((7, 40)).astype(np.float32)
    plain = quantize(matrix, bits, 16)
    fed_back = quantize_with_feedback(matrix, bits, 16, np.diag(np.full(40, 3.0, np.float32)))
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
        errors = inputs @ (dequantize(quantize_with_feedback(matrix, 4, 32, *given)) - matrix).T
        return float(((errors @ others.T) ** 2).mean())

    alone, together = cost(covariance), cost(covariance, gradients)
    assert together < 0.4 * alone, f"cost {together:.4g}, with rows on their own {alone:.4g}"


def test_the_last_row_makes_up_for_the_others() -> None:
    """With 8 bits it comes close to what is best for it, after rows of 4 bits that say the same of the output."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((16, 48)).astype(np.float32)
    matrix[-1] = 0
    gradients = np.ones((16, 16), np.float32) + 1e-3 * np.eye(16, dtype=np.float32)
    found = dequantize(quantize_with_feedback(matrix, 4, 16, np.eye(48, dtype=np.float32), gradients))
    errors = matrix - found
    # The damping, 0.2 of the variance, leaves the last row 1 / 1.2 of the sum to take on itself, and it rounds that.
    best = errors[:-1].sum(0) / 1.2
    assert np.abs(found[-1] - best).max() < 0.6 * np.abs(best).max() / 7
    rest = np.abs(errors[:-1].sum(0)).mean()
    plain = np.abs(
        (matrix - dequantize(quantize_with_feedback(matrix, 4, 16, np.eye(48, dtype=np.float32)))).sum(0)
    ).mean()
    assert rest < plain, f"errors add up to {rest:.3g}, with rows on their own to {plain:.3g}"


def test_independent_rows_are_rounded_on_their_own() -> None:
    random = np.random.default_rng(0)
    matrix = random.standard_normal((35, 40)).astype(np.float32)
    covariance = np.cov(random.standard_normal((300, 40)).T).astype(np.float32)
    alone = quantize_with_feedback(matrix, 4, 16, covariance)
    for gradients in (np.diag(random.uniform(1, 9, 35)), np.zeros((35, 35))):
        found = quantize_with_feedback(matrix, 4, 16, covariance, gradients.astype(np.float32))
        np.testing.assert_array_equal(found.scales, alone.scales)
        np.testing.assert_array_equal(found.data, alone.data)


def test_feedback_heeds_constant_and_dead_inputs() -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    for covariance in (np.zeros((32, 32)), np.ones((32, 32))):
        found = dequantize(quantize_with_feedback(matrix, 4, 16, covariance.astype(np.float32)))
        assert np.isfinite(found).all()
        assert np.abs(found - matrix).max() < 1


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    made = gpt2onnx.export("tales", tmp_path_factory.mktemp("collected") / "fp32")
    return collect(made, fixed_texts(made.config, 4), threads=1, gradients=False)


def test_inputs_are_those_of_pytorch(collected: Statistics, tales_reference: Reference, golden: Golden) -> None:
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = [f"h.{layer}.{name}" for layer in (0, 5) for name in matrices]
    texts, length = collected.tokens.shape
    about = ["inputs", digest(collected.tokens.flat)]

    @functools.cache
    def torchs() -> dict[str, np.ndarray]:
        """What reaches the matrices and the head, [texts * length, in]."""
        import torch

        transformer, seen = tales_reference.model.transformer, {}
        hooks = [
            transformer.get_submodule(name).register_forward_pre_hook(
                lambda module, arguments, name=name: seen.update({name: arguments[0].flatten(0, -2)})
            )
            for name in names
        ]
        hooks.append(
            transformer.ln_f.register_forward_hook(
                lambda module, arguments, output: seen.update(head=output.flatten(0, -2))
            )
        )
        with torch.no_grad():
            tales_reference.model(torch.from_numpy(collected.tokens))
        for hook in hooks:
            hook.remove()
        return {name: x.double().numpy() for name, x in seen.items()}

    def mean(name: str) -> np.ndarray:
        return torchs()[name].mean(0) / torchs()[name].std()

    def first_rows(name: str) -> np.ndarray:
        """Of each text the token that the sample begins with: the first of the first text, the second of the second."""
        return torchs()[name][np.arange(texts) * (length + 1)] / torchs()[name].std()

    spreads = golden.answer([*about, "spreads"], lambda: {name: torchs()[name].std() for name in names})
    for name in names:
        inputs, spread = collected.inputs[name], spreads[name]
        expected = golden.array([*about, name, "mean"], lambda name=name: mean(name))
        assert_close(inputs.mean / spread, expected, 1e-3, name)
        expected = golden.array([*about, name, "rows"], lambda name=name: first_rows(name))
        assert_close(inputs.sample[:: len(inputs.sample) // texts] / spread, expected, 1e-3, name)

    def second_moment() -> np.ndarray:
        x = torchs()["head"]
        return x.T @ x / len(x)

    square = golden.answer([*about, "square"], lambda: np.square(torchs()["head"]).mean())
    assert collected.head is not None
    moment = golden.array([*about, "second moment"], lambda: second_moment() / square)
    assert_close(collected.head.second_moment / square, moment, 3e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": False, "n_embd": 15, "n_head": 3},
        {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "n_head": 1},
        {"scale_attn_weights": False, "layer_norm_epsilon": 0.1, "initializer_range": 0.1},
        {"n_inner": 99, "n_layer": 1},
        *({"activation_function": each} for each in ("gelu", "relu2", "quick_gelu", "laplace", "linear")),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_gradients_are_those_of_pytorch(
    settings: dict[str, Any], make_checkpoint: MakeCheckpoint, reference_of: type[Reference], golden: Golden,
    tmp_path: Path,
) -> None:  # fmt: skip
    source = make_checkpoint(**{"n_embd": 16} | settings)
    made, reference = gpt2onnx.export(source, tmp_path / "fp32"), reference_of(source)
    tokens = fixed_texts(made.config, 3)
    gradients = collect(made, tokens, threads=1).gradients
    names = [f"h.{layer}.{each}" for layer in range(made.config.n_layer) for each in ("attn.c_attn", "mlp.c_proj")]
    about = ["gradients", reference.name, digest(tokens.flat)]

    @functools.cache
    def torchs() -> dict[str, np.ndarray]:
        import torch

        outputs: dict[str, torch.Tensor] = {}
        for name in names:
            reference.model.transformer.get_submodule(name).register_forward_hook(
                lambda module, arguments, output, name=name: outputs.update({name: output})
            )
        moments = dict.fromkeys(names, 0.0)
        for text in torch.from_numpy(tokens):
            logits = reference.model(text[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, text[1:], reduction="sum")
            for name, gradient in zip(names, torch.autograd.grad(loss, [outputs[each] for each in names]), strict=True):
                moments[name] += (gradient[0].T @ gradient[0]).numpy() / tokens.size
        return moments

    largest = golden.answer([*about, "largest"], lambda: {name: float(np.abs(x).max()) for name, x in torchs().items()})
    for name in names:
        found = gradients[name] / largest[name]
        triangle = np.triu_indices(len(found))  # half of a symmetric matrix
        expected = golden.array([*about, name], lambda name=name, at=triangle: (torchs()[name] / largest[name])[at])
        assert_close(found[triangle], expected, 1e-3, name)
        np.testing.assert_array_equal(found, found.T)


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


def test_samples_follow_the_network(fp32: Path) -> None:
    """Their mean loss is the network's own entropy."""
    opened = Bundle.open(fp32)
    figures = quality.on_own_samples(opened, opened, tokens=1024, seed=3, threads=1)
    session = Runner(opened, threads=1)
    tokens = sample(session, 16, 65, seed=5)
    losses = []
    for row in tokens:
        logits = session.forward(session.new_cache(1, 64), slice(0, 1), row[None, :-1], logits="all")
        losses.append(-log_softmax(logits)[np.arange(64), row[1:]])
    # Two samples of 1024 losses that scatter.
    allowed = 4 * np.std(losses) * math.sqrt(2 / 1024)
    assert abs(np.mean(losses) - math.log(figures.reference_perplexity)) < allowed < 0.5


def test_centred_network_is_the_same_network(collected: Statistics, tales_reference: Reference, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open("tales")
    tensor, after = centre(checkpoint.config, checkpoint.tensor, collected.inputs)
    folder = gpt2onnx.export("tales", tmp_path / "centred").folder
    rebuild(folder, checkpoint, tensor)

    opened = Bundle.open(folder)
    tokens = random_tokens(checkpoint.config, 1)
    expected = tales_reference.logits(tokens)
    assert_close(logits_of_prompt(opened, tokens), expected, 1e-5 * np.nanmax(np.abs(expected)), "centred")

    again = collect(opened, collected.tokens, threads=1, gradients=False)
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
    made = gpt2onnx.export(checkpoint, tmp_path / "bundle", dtype="int8", calibrate=False, quality=False)
    original = load_file(checkpoint / "model.safetensors")["transformer.wte.weight"]
    assert np.abs(weights_of(made)["wte.weight"] - original).max() < np.abs(original).max() / 200


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


def test_quality_in_the_manifest(source: Path, fp32: Path, tmp_path: Path) -> None:
    texts = {"fox.txt": "Once upon a time there was a fox. " * 9, "sea.txt": "He wished to see the sea. " * 9}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    paths = [tmp_path / name for name in texts]
    made = gpt2onnx.export(source, tmp_path / "int8", dtype="int8", calibrate=False, quality_texts=paths)
    figures = made.manifest.quality
    assert figures is not None
    assert figures["text"] == "own samples"
    assert figures["tokens"] == 256
    assert 0 < figures["kl"] < 0.0005
    assert [each["text"] for each in figures["texts"]] == list(texts)
    for each in figures["texts"]:
        measured = quality.on_text(made, Bundle.open(fp32), texts[each["text"]], name=each["text"])
        assert each["tokens"] == measured.tokens
        assert each["perplexity"] == pytest.approx(measured.perplexity, rel=1e-4)
        assert each["reference_perplexity"] == pytest.approx(measured.reference_perplexity, rel=1e-4)
        assert each["kl"] == pytest.approx(measured.kl, rel=1e-2)
    assert Bundle.open(fp32).manifest.quality is None
    assert sorted(path.name for path in (tmp_path / "int8").iterdir() if path.is_dir()) == ["onnx"]


def test_quality_texts_on_the_command_line(command_line: CommandLine, source: Path, tmp_path: Path) -> None:
    text = tmp_path / "sea.txt"
    text.write_text("He wished to see the sea. " * 9, encoding="utf-8")
    options = ["--dtype", "int4", "--no-calibrate", "--no-parity", "--quality-text", text]
    done = command_line("export", source, tmp_path / "int4", *options)
    assert done.code == 0, done.err
    assert "sea.txt: perplexity" in done.out
    assert "own samples: perplexity" in done.out
    done = command_line("export", source, tmp_path / "other", *options[:-1], tmp_path / "missing.txt")
    assert done.code == 1
    assert "missing.txt" in done.err


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
