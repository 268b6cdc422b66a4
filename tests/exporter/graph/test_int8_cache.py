"""A key-value cache in 8 bits: what is stored, how far logits are off, and where it can't be had."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.graphs import CONFIGS
from support.quantized import in_numpy, root_mean_square

import gpt2onnx
from gpt2onnx.cli import serve
from gpt2onnx.errors import BackendError, OptionError, OutputError
from gpt2onnx.experiments.benchmark import benchmark
from gpt2onnx.exporter.graph import int8_cache
from gpt2onnx.exporter.validate.logits import divergence, log_softmax
from gpt2onnx.models.bundle import INT8_CACHE_GRAPHS, RAGGED_GRAPH, SECOND_GRAPH, TWIN_GRAPH, Bundle
from gpt2onnx.models.tales import FOLDER
from gpt2onnx.runtime.engine import graphs
from gpt2onnx.runtime.engine.kv_cache import KVCache
from gpt2onnx.runtime.engine.runner import Runner
from gpt2onnx.runtime.engine.speculation import Drafter

FEW, MANY = int8_cache._MIN_TOKENS - 1, int8_cache._MIN_TOKENS
ROW = slice(0, 1)


def scales_of(bundle: Bundle) -> np.ndarray:
    """float32 [layer, 2, head, size], from the graph file."""
    graph = onnx.load(bundle.folder / INT8_CACHE_GRAPHS[RAGGED_GRAPH], load_external_data=False).graph
    found = {each.name: numpy_helper.to_array(each) for each in graph.initializer if each.name.endswith("_scale")}
    size = bundle.config.head_size
    names = [[f"h.{layer}.attn.{part}_scale" for part in ("key", "value")] for layer in range(bundle.config.n_layer)]
    return np.array([[found[name][0, :, 0, :size] for name in pair] for pair in names])


def runners(bundle: Bundle, **options: Any) -> tuple[Runner, Runner]:
    """With a cache in floats, and in int8."""
    return tuple(Runner(each, threads=1, **options) for each in (bundle, bundle.with_cache("int8")))  # type: ignore[return-value]


def read(runner: Runner, tokens: np.ndarray, *parts: int) -> tuple[np.ndarray, KVCache]:
    """The logits [length, vocab] of tokens [length] that pass in parts, and the cache behind them."""
    cache = runner.new_cache(1, len(tokens) + 3)
    ends = np.cumsum(parts)
    assert ends[-1] == len(tokens)
    passes = (tokens[None, end - count : end] for end, count in zip(ends, parts, strict=True))
    return np.concatenate([runner.forward(cache, ROW, each, logits="all").copy() for each in passes]), cache


def random_tokens(bundle: Bundle, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(bundle.config.vocab_size, size=count)


@pytest.fixture(scope="module")
def tales(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return gpt2onnx.export("tales", tmp_path_factory.mktemp("tales") / "bundle", twin=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_holds_rounded_keys_and_values(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    bundle = gpt2onnx.export(make_checkpoint(**CONFIGS[name]), tmp_path / "bundle", twin=False)
    plain, rounding = runners(bundle)
    tokens, scales = random_tokens(bundle, min(2 * MANY, bundle.config.n_positions)), scales_of(bundle)[..., None, :]
    for parts in ([len(tokens)], [MANY, len(tokens) - MANY] if len(tokens) > MANY else [1] * len(tokens)):
        (_, floats), (logits, cache) = (read(each, tokens, *parts) for each in (plain, rounding))
        assert cache.data.dtype == np.int8
        used = floats.data[:, :, 0, :, : len(tokens)]
        found = cache.data[:, :, 0, :, : len(tokens)] * scales
        # Attention in a first pass over many tokens takes floats, so nothing but the cache is rounded.
        layers = slice(None) if parts == [len(tokens)] and len(tokens) >= MANY else slice(0, 1)
        error = np.abs(found - np.clip(used, -128 * scales, 127 * scales))[layers]
        assert (error <= 0.5001 * scales[layers] + 1e-5).all()
        assert np.isfinite(logits).all()


def test_a_prompt_has_the_logits_of_a_cache_in_floats(tales: Bundle) -> None:
    tokens = random_tokens(tales, 100)
    (expected, _), (found, _) = (read(each, tokens, len(tokens)) for each in runners(tales))
    assert np.abs(found - expected).max() < 1e-3


def assert_off_by_rounding(found: np.ndarray, bundle: Bundle, tokens: np.ndarray) -> None:
    """Fails where logits are further off from those of a network in float64 than rounded keys and values put them.

    The operator rounds nothing else. What lies near the middle of two steps may go the other way, which is another draw of
    the same errors; one bit less would double them, and half of that is allowed.
    """
    scales = scales_of(bundle)[:, :, :, None]  # [layer, 2, head, 1, size]

    def on_cache(layer: int, part: int, x: np.ndarray) -> np.ndarray:
        scale = scales[layer, part]
        return np.clip(np.rint(x / scale), -128, 127) * scale

    network = in_numpy(FOLDER)
    (exact,), (rounded,) = network.logits(tokens[None]), network.logits(tokens[None], on_cache=on_cache)
    assert 0 < root_mean_square(found - exact) < 1.5 * root_mean_square(rounded - exact)
    assert divergence(log_softmax(exact), log_softmax(found)).mean() < 0.002


@pytest.mark.parametrize("parts", [[1] * 64, [MANY] + [FEW] * 3 + [3], [40] + [8] * 3, [32, 32]], ids=str)
def test_logits_are_off_by_the_roundings_effect(parts: list[int], tales: Bundle) -> None:
    text = (Path(__file__).parents[3] / "docs" / "the-verdict.txt").read_text(encoding="utf-8")
    tokens = np.array(gpt2onnx.load(tales.folder).tokenizer.encode(text[:600])[:64])
    found, _ = read(Runner(tales.with_cache("int8"), threads=1), tokens, *parts)
    assert_off_by_rounding(found, tales, tokens)


@pytest.mark.parametrize("first", [[20, 17, 0], [20, 20, 20], [3, 1, 2]], ids=str)
def test_rows_of_a_batch(first: list[int], tales: Bundle) -> None:
    """They begin with few and many tokens, wait, and go on with others behind pasts of their own."""
    runner = Runner(tales.with_cache("int8"), threads=1)
    texts = [random_tokens(tales, 60, seed) for seed in range(3)]
    passes = [first, [1, 0, 4], [5, 1, 0], [17, 17, 17], [1, 1, 1]]
    cache, found = runner.new_cache(3, 64), [list[np.ndarray]() for _ in texts]
    for counts in passes:
        begins, width = cache.lengths.copy(), max(counts)
        padded = np.zeros((3, width), np.int64)
        for row, text, begin, count in zip(padded, texts, begins, counts, strict=True):
            row[:count] = text[begin : begin + count]
        logits = runner.forward(cache, slice(0, 3), padded, np.array(counts), "all").copy()
        for part, each in zip(found, np.split(logits, np.cumsum(counts)[:-1]), strict=True):
            part.append(each)
    for text, part in zip(texts, found, strict=True):
        together = np.concatenate(part)
        assert_off_by_rounding(together, tales, text[: len(together)])


def test_a_row_that_is_trimmed_goes_on_as_a_fresh_one(tales: Bundle) -> None:
    runner, tokens = Runner(tales.with_cache("int8"), threads=1), random_tokens(tales, 30)
    _, cache = read(runner, np.append(tokens[:20], random_tokens(tales, 10, 1)), 20, 10)
    cache.trim(0, 20)
    found = runner.forward(cache, ROW, tokens[None, 20:], logits="all").copy()
    fresh, _ = read(runner, tokens, 20, 10)
    np.testing.assert_array_equal(found, fresh[20:])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_with_quantised_weights_and_a_second_graph(dtype: str, export_short_tales: Callable[..., Bundle]) -> None:
    bundle = export_short_tales(second_graph=True, calibrate=True, quality=False, dtype=dtype)
    assert (bundle.folder / INT8_CACHE_GRAPHS[SECOND_GRAPH]).exists()
    plain, rounding = runners(bundle, wide_after=0)
    tokens = random_tokens(bundle, 48)
    for parts in ([48], [40] + [1] * 8, [20] + [7] * 4):
        (expected, _), (found, _) = (read(each, tokens, *parts) for each in (plain, rounding))
        assert divergence(log_softmax(expected), log_softmax(found)).mean() < 0.005
    several, counts = np.stack([tokens, tokens[::-1], tokens]), np.array([48, 20, 0])
    expected, found = (
        each.forward(each.new_cache(3, 48), slice(0, 3), several, counts, "all").copy() for each in (plain, rounding)
    )
    assert divergence(log_softmax(expected), log_softmax(found)).max() < 0.02


def test_every_strategy_runs(tales: Bundle) -> None:
    model = gpt2onnx.load(tales.folder, cache_dtype="int8", threads=1)
    plain = gpt2onnx.load(tales.folder, threads=1)
    prompts = ["Once upon a time, there was a", "The king said to the fox: "]
    for options in (
        {"num_beams": 4, "num_return_sequences": 2},
        {"seed": 1, "num_return_sequences": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup": 5},
        {"guidance_scale": 1.5},
    ):
        for result in model.generate(prompts, max_new_tokens=12, **options):  # type: ignore[call-overload]
            for sequence in result.sequences:
                assert len(sequence.token_ids) == 12
    # Of greedy text each token is nearly the likeliest one of the network with a cache in floats, too.
    (result,) = model.generate(prompts[:1], max_new_tokens=40)
    scored = plain.score(result.sequences[0].token_ids, prompt=prompts[0])
    (best,) = plain.generate(prompts[:1], max_new_tokens=40)
    limit = sum(plain.score(best.sequences[0].token_ids, prompt=prompts[0]).logprobs) - 2
    assert sum(scored.logprobs) > limit


@pytest.mark.parametrize("source", ["twin", "lookup", "none"])
def test_drafts(source: str, tales: Bundle) -> None:
    """The twin works in the same cache."""
    assert (tales.folder / INT8_CACHE_GRAPHS[TWIN_GRAPH]).exists()
    model = gpt2onnx.load(tales.folder, cache_dtype="int8", draft=source, draft_length=4, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        learned: list[int] = []
        patch.setattr(Drafter, "learn", lambda self, decoding, drafts, right, *rest: learned.extend(right))
        result = model.generate("Once upon a time", max_new_tokens=40)
    assert result.usage["completion_tokens"] == 40
    # Nearly all drafts of four are right: the twin sees the network's own keys and values.
    assert (sum(learned) > 24) == (source == "twin")
    assert "".join(model.stream("Once upon a time", max_new_tokens=40)) == result.text


def test_takes_a_quarter_of_the_memory(tales: Bundle) -> None:
    plain, rounding = runners(tales)
    assert 4 * rounding.new_cache(3, 100).nbytes == plain.new_cache(3, 100).nbytes
    needed = []
    for runner in (plain, rounding):
        with pytest.raises(OptionError) as caught:
            runner.check_memory(10**9, 512)
        needed.append(float(re.search(r"need (?:about )?([\d,.]+) ", str(caught.value))[1].replace(",", "")))  # type: ignore[index]
    # The logits stay: 8,192 times 4 bytes a row, beside 512 positions of 6 layers, 256 wide, keys and values.
    logits, cache = 8192 * 4, 512 * 6 * 256 * 2
    assert needed[1] / needed[0] == pytest.approx((logits + cache) / (logits + 4 * cache), rel=0.02)


def test_results_are_told_apart(tales: Bundle) -> None:
    plain, rounding = (gpt2onnx.load(tales.folder, cache_dtype=each) for each in ("fp32", "int8"))
    hashes = plain.generate("Once").request_hash, rounding.generate("Once").request_hash
    assert hashes[0] != hashes[1]
    # Measured scales differ from machine to machine; with a cache in floats they don't count.
    assert tales.without(*INT8_CACHE_GRAPHS.values()).sha256() == tales.sha256()


def test_figures_are_of_the_cache_in_use(tales: Bundle) -> None:
    plain, rounding = (
        benchmark(gpt2onnx.load(tales.folder, cache_dtype=each), prompt_tokens=4, new_tokens=4, repetitions=1)
        for each in ("fp32", "int8")
    )
    assert plain.cache_bytes == 4 * rounding.cache_bytes


def test_models_that_are_served_on_demand(tales: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve.command.make_context(
        "serve", ["-m", f"a={tales.folder}", "-m", f"b={tales.folder}", "--cache-dtype", "int8"]
    )
    with served:
        on_demand = serve._on_demand(["a"], [("b", str(tales.folder))], "cpu", 1)
        assert on_demand["b"].load().bundle.cache_dtype == "int8"


def test_a_source_is_exported_for_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an earlier export in the user's cache has no graph for it; that one stays, since others may use it."""
    monkeypatch.setenv("GPT2ONNX_CACHE", str(tmp_path))
    monkeypatch.setattr("gpt2onnx.exporter.export._CHECKED_WEIGHTS", 0)
    checkpoint = make_checkpoint()
    earlier = gpt2onnx.load(checkpoint).bundle
    assert not earlier.has_int8_cache
    made = gpt2onnx.load(checkpoint, cache_dtype="int8").bundle
    assert made.cache_dtype == "int8"
    assert gpt2onnx.load(checkpoint).bundle.sha256() == earlier.sha256()
    shutil.rmtree(made.folder)
    (made.folder).touch()  # in the way of the export
    with pytest.raises(OutputError, match="is not a folder"):
        gpt2onnx.load(checkpoint, cache_dtype="int8")


def test_where_it_cannot_be_had(
    tales: Bundle, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="cache_dtype must be one of fp32, int8, not 'int4'"):
        gpt2onnx.load(tales.folder, cache_dtype="int4")
    half = gpt2onnx.export(make_checkpoint(), tmp_path / "half", dtype="fp16")
    with pytest.raises(OptionError, match="has no graph with a cache in int8: export it again with --int8-cache"):
        gpt2onnx.load(half.folder, cache_dtype="int8")
    for options in ({"dtype": "fp16"}, {"graph": "portable"}):
        with pytest.raises(
            OptionError, match="int8_cache goes with dtype fp32, int8 or int4 and graph fused, not with"
        ):
            gpt2onnx.export(make_checkpoint(), tmp_path / "none", int8_cache=True, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(graphs, "runs_ragged", lambda: False)
    with pytest.raises(BackendError, match="a cache in int8 is for the CPU"):
        gpt2onnx.load(tales.folder, cache_dtype="int8")


def test_a_graph_with_another_cache_is_refused(tales: Bundle, tmp_path: Path) -> None:
    """Files that were exchanged: the signature tells."""
    exchanged = replace(tales, folder=tmp_path)
    (tmp_path / "onnx").symlink_to(tales.folder / "onnx")
    content = (tales.folder / RAGGED_GRAPH).read_bytes()
    (tmp_path / "onnx").unlink()
    (tmp_path / "onnx").mkdir()
    for path in (tales.folder / "onnx").iterdir():
        (tmp_path / "onnx" / path.name).hardlink_to(path)
    target = tmp_path / INT8_CACHE_GRAPHS[RAGGED_GRAPH]
    target.unlink()
    target.write_bytes(content)
    with pytest.raises(gpt2onnx.errors.BundleError, match=r"past_key_values.*is tensor\(float\).*not tensor\(int8\)"):
        Runner(exchanged.with_cache("int8"))


def test_on_the_command_line(tales: Bundle, command_line: CommandLine) -> None:
    model = gpt2onnx.load(tales.folder, cache_dtype="int8")
    options = ["-m", tales.folder, "--cache-dtype", "int8", "--max-new-tokens", 8, "--json"]
    output = json.loads(command_line("generate", "Once upon a time", *options).out)
    assert output["request_hash"] == model.generate("Once upon a time", max_new_tokens=8).request_hash


def test_networks_that_cannot_be_run_are_exported_without(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bundle: Bundle) -> np.ndarray:
        raise BackendError("the network's output is not a number")

    checkpoint = make_checkpoint()
    monkeypatch.setattr("gpt2onnx.exporter.quantize.cache_scales.measure", fail)
    assert not gpt2onnx.export(checkpoint, tmp_path / "bundle").has_int8_cache
    with pytest.raises(BackendError, match="not a number"):
        gpt2onnx.export(checkpoint, tmp_path / "asked", int8_cache=True)
    assert not (tmp_path / "asked").exists()
    monkeypatch.undo()
    assert not gpt2onnx.export(checkpoint, tmp_path / "not wanted", int8_cache=False).has_int8_cache
    monkeypatch.setattr("gpt2onnx.exporter.export._CHECKED_WEIGHTS", 0)
    assert not gpt2onnx.export(checkpoint, tmp_path / "large").has_int8_cache
    assert gpt2onnx.export(checkpoint, tmp_path / "large, asked", int8_cache=True).has_int8_cache
