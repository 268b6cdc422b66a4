"""Quantised bundles against the weights they hold, computed by a network that rounds nothing, and against fp32."""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file
from support.bundles import sign
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.golden import assert_close
from support.graphs import CONFIGS, logits_of_prompt, random_tokens
from support.isolated import COMMAND_LINE, REFERENCES, run
from support.quantized import (
    CALIBRATED,
    QUANTIZED,
    assert_off_by_rounding,
    compute_in_float32,
    few_texts,
    fixed_texts,
    in_numpy,
    many_tokens,
    roundings_of,
    weights_of,
)

import gpt2onnx
from gpt2onnx.errors import OptionError, PromptError, install_command
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.graph.write import write_graphs
from gpt2onnx.exporter.quantize import statistics
from gpt2onnx.exporter.quantize.activations import Moments
from gpt2onnx.exporter.quantize.sequential import SequentialCalibrator
from gpt2onnx.exporter.validate import quality
from gpt2onnx.models import bundle
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.precision import blocks, memory
from gpt2onnx.runtime.decoding.torch_random import log_softmax
from gpt2onnx.runtime.engine.runner import Runner

pytestmark = pytest.mark.usefixtures("second_graph_at_any_width")
PRECISIONS: dict[str, dict[str, Any]] = CALIBRATED | {
    "int8 in blocks of 16": {"dtype": "int8", "block_size": 16, "calibrate": False},
    "int4 in blocks of 256": {"dtype": "int4", "block_size": 256, "calibrate": False},
}
# All of them for the plain network; for each other network two in turn, so that all of them meet several odd widths.
CASES = [("plain", precision) for precision in PRECISIONS] + [
    (name, list(PRECISIONS)[(index + shift) % len(PRECISIONS)])
    for index, name in enumerate(name for name in QUANTIZED if name != "plain")
    for shift in (0, 2)
]
# Logits of some tens, summed over matrices of some hundred columns in float32.
EXACT_TOLERANCE = 2e-4
# KL divergence from fp32 of what is calibrated, as a share of that without: at most, and where it was measured.
SHARES = {"int8": 0.75, "int4": 0.2, "int4 pure": 0.2}  # 0.57, 0.04, 0.07


@pytest.fixture(scope="module", autouse=True)
def _few_texts() -> Iterator[None]:
    """Bundles as they come by default are tested in tests/reference/test_quantize_live.py."""
    with few_texts():
        yield


@pytest.fixture(scope="module")
def fp32(export_short_tales: Callable[..., Bundle]) -> Path:
    return export_short_tales().folder


@pytest.fixture(scope="module")
def quantized(export_short_tales: Callable[..., Bundle]) -> Callable[..., Bundle]:
    """Exports in one of CALIBRATED."""

    def export(precision: str, *, calibrate: bool = True) -> Bundle:
        return export_short_tales(calibrate=calibrate, quality=False, **CALIBRATED[precision])

    return export


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_logits_are_those_of_the_stored_weights(
    name: str, precision: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """In a bundle that rounds no activations, so that its weights' layout is judged alone."""
    checkpoint = make_checkpoint(**CONFIGS[name])
    made = gpt2onnx.export(checkpoint, tmp_path / "bundle", **PRECISIONS[precision], quality=False)
    tokens = random_tokens(made.config, 1)
    expected = in_numpy(checkpoint, weights_of(made)).logits(tokens)
    compute_in_float32(made.folder)
    opened = Bundle.open(made.folder)
    assert_close(logits_of_prompt(opened, tokens), expected, EXACT_TOLERANCE, "whole")

    session = Runner(opened, threads=1)
    cache = session.new_cache(1, tokens.shape[1])
    for index in range(tokens.shape[1]):
        step = session.forward(cache, slice(0, 1), tokens[:, index : index + 1])
        assert_close(step, expected[:, index], EXACT_TOLERANCE, f"step {index}")


@pytest.mark.parametrize("precision", CALIBRATED)
def test_rounded_activations_change_little(precision: str, short_tales: Path, quantized: Callable[..., Bundle]) -> None:
    opened = quantized(precision)
    tokens, network = many_tokens(opened.config), in_numpy(short_tales, weights_of(opened))
    assert_off_by_rounding(logits_of_prompt(opened, tokens), network, tokens, roundings_of(opened))


def test_layers_are_quantised_for_both_networks(
    short_tales: Path, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their targets are the exact network's outputs, their inputs those behind the bundle's weights."""
    checkpoint, reference = Checkpoint.open(str(short_tales)), Bundle.open(fp32)
    config, seen, tokens = checkpoint.config, list[Moments](), fixed_texts(checkpoint.config, 3)
    moments_of = Moments.of

    def noted(inputs: np.ndarray, outputs: np.ndarray) -> Moments:
        seen.append(moments_of(inputs, outputs))
        return seen[-1]

    monkeypatch.setattr(Moments, "of", noted)
    collected = statistics.collect(reference, tokens, gradients=False)
    calibrator = SequentialCalibrator(
        config,
        checkpoint.tensor,
        lambda name: blocks(config, "int8", name),
        collected,
        tied=checkpoint.tied,
        per_tensor=False,
    )
    folder = shutil.copytree(fp32, tmp_path / "int8")
    write_graphs(folder, config, calibrator.run().weights, tied=checkpoint.tied)
    replace(bundle.Manifest.read(folder), dtype="int8").write(folder)
    sign(folder)

    exact = in_numpy(short_tales).matrices(tokens)
    quantised = in_numpy(short_tales, weights_of(Bundle.open(folder))).matrices(tokens)
    assert list(exact) == list(quantised)  # in the order of the network
    for name, moments in zip(exact, seen, strict=True):
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


def test_quality_is_that_of_the_stored_weights(short_tales: Path, fp32: Path, quantized: Callable[..., Bundle]) -> None:
    made = quantized("int4", calibrate=False)
    text = "Once upon a time there was a fox who wished to see the sea. " * 20
    ids = gpt2onnx.load(fp32, threads=1).tokenizer.encode(text)
    found = quality.on_text(made, Bundle.open(fp32), ids)
    assert len(ids) < made.config.n_positions
    networks = in_numpy(short_tales), in_numpy(short_tales, weights_of(made))
    truth, candidate = (log_softmax(each.logits(np.array([ids]))[0, :-1].astype(np.float64)) for each in networks)
    rows, following = np.arange(len(ids) - 1), ids[1:]
    divergence = float((np.exp(truth) * (truth - candidate)).sum(-1).mean())
    assert found.tokens == len(ids) - 1
    assert found.reference_perplexity == pytest.approx(math.exp(-truth[rows, following].mean()), rel=1e-4)
    # Activations are rounded, too: the figures are the bundle's, the judge's those of the weights alone.
    assert found.perplexity == pytest.approx(math.exp(-candidate[rows, following].mean()), rel=0.02)
    assert found.kl == pytest.approx(divergence, rel=0.2)


@pytest.mark.parametrize("precision", CALIBRATED)
def test_calibration_helps(precision: str, quantized: Callable[..., Bundle], fp32: Path) -> None:
    bundles = (quantized(precision, calibrate=calibrate) for calibrate in (True, False))
    reference = Bundle.open(fp32)
    kl, plain = (quality.on_own_samples(each, reference, tokens=256, seed=7).kl for each in bundles)
    assert kl < SHARES[precision] * plain, f"KL {kl:.5f}, without calibration {plain:.5f}"


def test_samples_follow_the_network(fp32: Path) -> None:
    """Their mean loss is the network's own entropy."""
    opened = Bundle.open(fp32)
    figures = quality.on_own_samples(opened, opened, tokens=1024, seed=3)
    session = Runner(opened, threads=1)
    tokens = statistics.sample(session, 16, 65, seed=5)
    losses = []
    for row in tokens:
        logits = session.forward(session.new_cache(1, 64), slice(0, 1), row[None, :-1], logits="all")
        losses.append(-log_softmax(logits)[np.arange(64), row[1:]])
    # Two samples of 1024 losses that scatter.
    allowed = 4 * np.std(losses) * math.sqrt(2 / 1024)
    assert abs(np.mean(losses) - math.log(figures.reference_perplexity)) < allowed < 0.5


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


def test_tied_embedding_is_stored_once(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        checkpoint = make_checkpoint(vocab_size=4096, tie_word_embeddings=tied)
        made = gpt2onnx.export(checkpoint, tmp_path / str(tied), dtype="int8", quality=False)
        sizes[tied] = made.manifest.files[bundle.WEIGHTS].size
    table = 4096 * 32
    assert table < sizes[False] - sizes[True] < 1.5 * table


def test_quality_in_the_manifest(short_tales: Path, fp32: Path, tmp_path: Path) -> None:
    texts = {"fox.txt": "Once upon a time there was a fox. " * 9, "sea.txt": "He wished to see the sea. " * 9}
    texts["further/sea.txt"] = texts["sea.txt"] * 2
    (tmp_path / "further").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    paths = [tmp_path / name for name in texts]
    made = gpt2onnx.export(short_tales, tmp_path / "int8", dtype="int8", calibrate=False, quality_texts=paths)
    figures = made.manifest.quality
    assert figures is not None
    assert figures["text"] == "own samples"
    assert figures["tokens"] == 256
    assert 0 < figures["kl"] < 0.0005
    assert [each["text"] for each in figures["texts"]] == ["fox.txt", "sea.txt", "sea.txt"]
    for each, text in zip(figures["texts"], texts.values(), strict=True):
        tokens = gpt2onnx.load(fp32, threads=1).tokenizer.encode(text)
        measured = quality.on_text(made, Bundle.open(fp32), tokens)
        assert each["tokens"] == measured.tokens
        assert each["perplexity"] == pytest.approx(measured.perplexity, rel=1e-4)
        assert each["reference_perplexity"] == pytest.approx(measured.reference_perplexity, rel=1e-4)
        assert each["kl"] == pytest.approx(measured.kl, rel=1e-2)
    assert Bundle.open(fp32).manifest.quality is None
    assert sorted(path.name for path in (tmp_path / "int8").iterdir() if path.is_dir()) == ["onnx"]


def test_quality_texts_on_the_command_line(command_line: CommandLine, short_tales: Path, tmp_path: Path) -> None:
    text = tmp_path / "sea.txt"
    text.write_text("He wished to see the sea. " * 9, encoding="utf-8")
    options = ["--dtype", "int4", "--no-calibrate", "--no-parity", "--quality-text", text]
    done = command_line("export", short_tales, tmp_path / "int4", *options)
    assert done.code == 0, done.err
    assert "of sea.txt: KL" in done.out
    assert "of own samples: KL" in done.out
    done = command_line("export", short_tales, tmp_path / "other", *options[:-1], tmp_path / "missing.txt")
    assert done.code == 1
    assert "missing.txt" in done.err


def test_one_position_predicts_nothing(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(n_positions=1)
    made = gpt2onnx.export(checkpoint, tmp_path / "bundle", dtype="int8")
    assert made.manifest.quality is None
    with pytest.raises(OptionError, match="room for one token"):
        gpt2onnx.export(checkpoint, tmp_path / "other", dtype="int8", quality=True)


def test_calibration_is_not_left_out_in_silence(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    export = ["export", make_checkpoint(), tmp_path / "bundle", "--dtype", "int4"]
    status, _, err = run(COMMAND_LINE, *export, without=(*REFERENCES, "onnxruntime"))
    assert status == 0, err
    assert err.count("\n") == 1
    assert all(part in err for part in ("not calibrated", install_command("cpu"))), err
    status, out, err = run(COMMAND_LINE, *export, "--force", "--calibrate", without=(*REFERENCES, "onnxruntime"))
    assert (status, out) == (1, "")
    assert install_command("cpu") in err


def test_quality_of_equal_bundles_is_perfect(tales_bundle: Path) -> None:
    opened = Bundle.open(tales_bundle)
    figures = quality.on_own_samples(opened, opened, tokens=40)
    assert figures.kl == 0
    assert figures.perplexity == figures.reference_perplexity


def test_quality_text_that_is_missing(tales_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="can't read the text missing"):
        gpt2onnx.export(tales_checkpoint, tmp_path / "bundle", dtype="int8", quality_texts=["missing.txt"])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "message"), [("Once upon", "need a tokenizer"), ("a", "fewer than two tokens")])
def test_quality_text_of_no_use(text: str, message: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """It is refused before anything is computed."""
    folder = make_checkpoint()
    assert (folder / "tokenizer.json").is_file()
    if "tokenizer" in message:
        (folder / "tokenizer.json").unlink()
    (tmp_path / "text.txt").write_text(text)
    seen: list[int] = []
    with pytest.raises(OptionError, match=message):
        gpt2onnx.export(
            folder, tmp_path / "bundle", dtype="int8", quality_texts=[tmp_path / "text.txt"],
            progress=lambda done, _: seen.append(done),
        )  # fmt: skip
    assert seen == []


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
        {"quality_texts": [__file__]},
        {"dtype": "int8", "quality_texts": [__file__], "quality": False},
        {"graph": "other"},
        {"graph": "portable", "dtype": "int8"},
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], tales_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        gpt2onnx.export(tales_checkpoint, tmp_path / "bundle", **options)
    assert not any(tmp_path.iterdir())
