"""The graph that computes only the largest logits in full: they are exact, and everything else is less."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import CommandLine
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

import gpt2onnx
from gpt2onnx.errors import BundleError, OptionError
from gpt2onnx.exporter import screening as exporter
from gpt2onnx.exporter.checkpoint import Checkpoint
from gpt2onnx.exporter.operators import MICROSOFT, Nodes, as_model
from gpt2onnx.exporter.quantize import dequantize
from gpt2onnx.models.bundle import SCREENING_GRAPH, WEIGHTS, Bundle, describe_files
from gpt2onnx.models.precision import memory
from gpt2onnx.runtime import resources, screening
from gpt2onnx.runtime.experiments.benchmark import weights_read
from gpt2onnx.runtime.options import GenerationConfig
from gpt2onnx.runtime.results import Request
from gpt2onnx.runtime.search import start
from gpt2onnx.runtime.session import Session

Export = Callable[..., Bundle]


@pytest.fixture(scope="module")
def screened(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports in fp32 with a graph that screens."""
    return lambda source, **options: gpt2onnx.export(
        source, tmp_path_factory.mktemp("screened") / "bundle", screen=True, **options
    )


@pytest.fixture(scope="module")
def made(screened: Export) -> Bundle:
    return screened("tales", parity=False)


@pytest.fixture(scope="module")
def tokens(made: Bundle) -> np.ndarray:
    """A text, int64 [1, 200]."""
    text = gpt2onnx.load(made.folder).generate("Once upon a time", max_new_tokens=200, do_sample=True, top_k=0, seed=1)
    return np.array(text.sequences[0].token_ids)[None, :200]


def last_logits(session: Session, tokens: np.ndarray, certain: int | None, keep: int = 1) -> np.ndarray:
    cache = session.new_cache(1, tokens.shape[1])
    return session.forward(cache, slice(0, 1), tokens, keep, certain=certain)[0].copy()


@pytest.mark.parametrize("certain", [1, 3, 20, 51])
def test_largest_logits_are_exact_and_the_others_less(made: Bundle, tokens: np.ndarray, certain: int) -> None:
    session = Session(made)
    estimated = 0
    for length in range(1, 160, 7):
        found, exact = (last_logits(session, tokens[:, :length], each)[0] for each in (certain, None))
        order = np.argsort(-exact)[:certain]
        np.testing.assert_array_equal(np.argsort(-found)[:certain], order)
        np.testing.assert_allclose(found[order], exact[order], rtol=0, atol=1e-5 * np.abs(exact).max())
        others = np.delete(found, order)
        assert others.max() <= found[order].min()
        # Within what rounding to 8 bits can do, which is far less than from token to token.
        assert np.abs(found - exact).max() < 0.1 * exact.std()
        estimated += not np.array_equal(found, exact)
    assert estimated > 15  # of 23


def test_all_logits_are_those_of_the_first_graph(made: Bundle, tokens: np.ndarray) -> None:
    first = replace(made, manifest=replace(made.manifest, files={WEIGHTS: made.manifest.files[WEIGHTS]}))
    for keep in (1, 40):
        expected = last_logits(Session(first, threads=1), tokens, None, keep)
        np.testing.assert_array_equal(last_logits(Session(made, threads=1), tokens, None, keep), expected)


def test_several_positions_and_rows(made: Bundle, tokens: np.ndarray) -> None:
    session = Session(made)
    exact = last_logits(session, tokens[:, :60], None, keep=8)
    found = last_logits(session, tokens[:, :60], 1, keep=8)
    assert not np.array_equal(found, exact)
    np.testing.assert_array_equal(found.argmax(-1), exact.argmax(-1))
    np.testing.assert_allclose(found.max(-1), exact.max(-1), rtol=1e-5)
    cache = session.new_cache(8, 1)
    rows = tokens[0, :8, None]
    together = session.forward(cache, slice(0, 8), rows, certain=1)[:, 0].copy()
    alone = np.stack([last_logits(session, row[None], None)[0] for row in rows])
    assert not np.array_equal(together, alone)
    np.testing.assert_array_equal(together.argmax(-1), alone.argmax(-1))


STRATEGIES: list[dict[str, Any]] = [
    {},
    {"prompt_lookup": 6},
    {"do_sample": True, "top_k": 40, "temperature": 0.7, "top_p": 0.9, "seed": 3},
    {"do_sample": True, "top_k": 5, "seed": 4, "num_return_sequences": 3},
    {"do_sample": True, "top_k": 0, "seed": 5},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "num_beams": 3},
    {"logprobs": 2},
]


def test_tokens_are_those_without_screening(made: Bundle, tales_bundle: Path) -> None:
    prompts = ["Once upon a time", "The old king", "One day the"]
    requests = [Request(each, GenerationConfig(max_new_tokens=40, **more)) for each in prompts for more in STRATEGIES]
    screened, plain = (
        [[one.token_ids for one in result.sequences] for _, result in gpt2onnx.load(folder).complete(requests, batch_size=5)]
        for folder in (made.folder, tales_bundle)
    )  # fmt: skip
    assert screened == plain


def test_same_tokens_as_transformers(screened: Export) -> None:
    pytest.importorskip("transformers")
    report = screened("tales", parity=True).manifest.parity
    assert report["passed"], report
    assert report["tokens"]["cases"] == report["tokens"]["equal"] > 10


@pytest.mark.parametrize("twins", [40, 600], ids=["enough candidates", "too few candidates"])
def test_tokens_that_rounding_confuses(
    twins: int, screened: Export, made: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the head that differ by less than 8 bits can say: the largest of their logits is found all the same."""
    monkeypatch.setattr(exporter, "_LEAST_SUCCESS", -1)
    tales = Checkpoint.open("tales").folder
    weights = {
        name.removeprefix("transformer."): array for name, array in load_file(tales / "model.safetensors").items()
    }
    random, head = np.random.default_rng(0), weights["wte.weight"].copy()
    prompts = [np.array([[first, 7, 8]]) for first in random.integers(len(head), size=60)]
    plain = Session(made)
    tokens = [int(last_logits(plain, prompt, None)[0].argmax()) for prompt in prompts]
    likeliest = head[max(tokens, key=tokens.count)]
    head[100 : 100 + twins] = likeliest * (1 + 1e-5 * random.standard_normal((twins, 1), np.float32))
    config = json.loads((tales / "config.json").read_text()) | {"tie_word_embeddings": False}
    for file in ("tokenizer.json", "generation_config.json"):
        (tmp_path / file).write_bytes((tales / file).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    session = Session(screened(tmp_path, parity=False))
    best = 0
    for prompt in prompts:
        exact, found = last_logits(session, prompt, None)[0], last_logits(session, prompt, 1)[0]
        assert found[exact.argmax()] == pytest.approx(exact.max(), rel=1e-5)
        assert exact[found.argmax()] == pytest.approx(exact.max(), rel=1e-6)
        best += 100 <= exact.argmax() < 100 + twins
    assert best > 5, "no prompt has twins for its likeliest tokens"


def test_margin_is_never_passed() -> None:
    """Estimates differ from exact logits by at most the margin, also for inputs that are made to differ most."""
    random = np.random.default_rng(0)
    width, vocabulary, size = 64, 400, 32
    head = random.standard_normal((vocabulary, width), np.float32) + random.standard_normal(width, np.float32)
    head[:5] *= 20
    states = random.standard_normal((300, width), np.float32) * random.uniform(0.1, 3, width).astype(np.float32) + 1
    ours = exporter.Head.of(head, states, size)
    rows = (head - ours.common) / ours.balance
    wrong = rows - dequantize(ours.matrix)
    # Along the rounding error of a row; and what falls between two steps in every block.
    along = wrong[::7] / ours.balance
    between = np.where(np.arange(width) % size == 0, 127, random.integers(-126, 126, (60, width)) + 0.499)
    inputs = np.concatenate([states, 50 * along, between / ours.balance]).astype(np.float32) + ours.mean
    inputs[: len(states)] -= ours.mean

    nodes = Nodes()
    data = [nodes.constant("data", ours.matrix.data), nodes.constant("scales", ours.matrix.scales)]
    nodes.op("MatMulNBits", ["x", *data], "y", domain=MICROSOFT, K=width, N=vocabulary, bits=8, block_size=size, accuracy_level=4)  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph(nodes.nodes, "product", values[:1], values[1:], nodes.initializers)
    network = ort.InferenceSession(as_model(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    centred = inputs - ours.mean
    (products,) = network.run(None, {"x": centred * ours.balance})
    estimates = products.astype(np.float64) + (centred @ ours.common)[:, None] + ours.bias
    errors = np.abs(estimates - inputs.astype(np.float64) @ head.T.astype(np.float64)).max(-1)
    margin = ours.margin(inputs)
    assert (errors <= margin).all()
    assert (errors / margin).max() > 0.2, "a bound that says nothing"


def test_left_out_where_estimates_are_too_rough(
    screened: Export,
    made: Bundle,
    tales_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(exporter, "_LEAST_SUCCESS", 1.1)
    plain = screened("tales", parity=False)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "tales: logits aren't screened, since few of them would be certain"
    ]
    assert SCREENING_GRAPH in made.manifest.files
    assert plain.manifest.files.keys() == Bundle.open(tales_bundle).manifest.files.keys()
    assert plain.manifest.files[WEIGHTS].size < made.manifest.files[WEIGHTS].size
    assert {path.name for path in (plain.folder / "onnx").iterdir()} == {"model.onnx", "model.onnx_data"}


@pytest.mark.parametrize(("dtype", "graph"), [("int8", "fused"), ("fp16", "fused"), ("fp32", "portable")])
def test_goes_with_fp32_and_fused(dtype: str, graph: str, screened: Export) -> None:
    with pytest.raises(OptionError, match="screen goes with dtype fp32 and graph fused, not with"):
        screened("tales", dtype=dtype, graph=graph)


def test_not_used_where_sums_of_bytes_overflow(
    made: Bundle, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "sums_of_byte_products_overflow", lambda: True)
    session = Session(made, threads=1)
    np.testing.assert_array_equal(last_logits(session, tokens, 1), last_logits(session, tokens, None))


def test_candidates() -> None:
    assert screening.candidates(1, None, 50257) == 0
    assert screening.candidates(1, 1, 50257) == screening.candidates(8, 1, 50257) == 256
    assert screening.candidates(9, 1, 50257) == 0
    assert screening.candidates(1, 50, 50257) == 2000
    assert screening.candidates(2, 50, 50257) == screening.candidates(1, 50, 2000) == 0


@pytest.mark.parametrize(
    ("options", "certain"),
    [
        ({}, 1),
        ({"do_sample": True, "top_k": 7}, 7),
        ({"do_sample": True, "top_k": 0}, None),
        ({"logprobs": 0}, None),
        ({"no_repeat_ngram_size": 2}, None),
        ({"num_beams": 2}, None),
    ],
)
def test_what_a_search_looks_at(options: dict[str, Any], certain: int | None) -> None:
    assert start(np.array([1]), GenerationConfig(**options), 10).certain == certain


def test_takes_no_weights_from_elsewhere(made: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(made.folder, folder)
    graph = onnx.load(folder / SCREENING_GRAPH, load_external_data=False)
    tensor = next(each for each in graph.graph.initializer if each.external_data)
    tensor.external_data[0].value = "../../secret"
    (folder / SCREENING_GRAPH).write_bytes(graph.SerializeToString())
    replace(made.manifest, files=describe_files(folder)).write(folder)
    with pytest.raises(BundleError, match=r"screening\.onnx takes weights from"):
        Bundle.open(folder)


def test_command_line(command_line: CommandLine, tmp_path: Path) -> None:
    assert command_line("export", "tales", tmp_path / "b", "--screen", "--no-parity").code == 0
    bundle = Bundle.open(tmp_path / "b")
    config = bundle.config
    assert SCREENING_GRAPH in bundle.manifest.files
    whole = memory(config, "fp32").weights
    head = 4 * config.vocab_size * config.n_embd
    # All but the position table, with the head in 8 bits and its scales.
    every = whole - 4 * config.n_positions * config.n_embd
    assert weights_read(bundle) == pytest.approx(every - head + 1.1 * head / 4, rel=0.02)
    assert weights_read(bundle, rows=100) == pytest.approx(every)
