"""The head that computes only the largest logits in full: they are exact, and everything else is less."""

import inspect
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

import gpt2onnx
from gpt2onnx.errors import BundleError, OptionError
from gpt2onnx.experiments.benchmark import weights_read
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.graph import fused
from gpt2onnx.exporter.graph import screening as exporter
from gpt2onnx.exporter.graph.operators import MICROSOFT, Nodes, as_model
from gpt2onnx.models import external_data
from gpt2onnx.models.bundle import BODY_GRAPH, HEAD_GRAPH, SCREENING_GRAPH, WEIGHTS, Bundle, describe_files
from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.precision import memory
from gpt2onnx.runtime.decoding.start import start
from gpt2onnx.runtime.engine import head as runtime
from gpt2onnx.runtime.engine import screening
from gpt2onnx.runtime.engine.runner import Runner
from gpt2onnx.runtime.host import resources
from gpt2onnx.runtime.options import GenerationConfig
from gpt2onnx.runtime.requests import Request

Export = Callable[..., Bundle]
LARGE = exporter._LARGE
PARTS = [BODY_GRAPH, HEAD_GRAPH, SCREENING_GRAPH]
# Passes until sessions screen here.
SOON = 20


@pytest.fixture(scope="module", autouse=True)
def _small(tales_bundle: Path) -> Iterator[None]:
    """Small heads are screened, too, and come in parts; not that of the bundle that tests share, which is made before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "_LARGE", 0)
        patch.setattr(fused, "_LARGEST_PART", 3 << 20)
        yield


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, _small: None) -> Export:
    return lambda source, **options: gpt2onnx.export(source, tmp_path_factory.mktemp("made") / "bundle", **options)


@pytest.fixture(scope="module")
def made(export: Export) -> Bundle:
    return export("tales")


@pytest.fixture(scope="module")
def tokens(made: Bundle) -> np.ndarray:
    """A text, int64 [1, 160]."""
    text = gpt2onnx.load(made.folder).generate("Once upon a time", max_new_tokens=160, do_sample=True, top_k=0, seed=1)
    return np.array(text.sequences[0].token_ids)[None, :160]


@pytest.fixture(scope="module")
def few(tokens: np.ndarray) -> np.ndarray:
    """Its beginning, for tests that go through it again and again."""
    return tokens[:, :24]


def last_logits(session: Runner, tokens: np.ndarray, certain: int | None, keep: int = 1) -> np.ndarray:
    cache = session.new_cache(1, tokens.shape[1])
    row = slice(0, 1)
    if keep == 1:
        return session.forward(cache, row, tokens, exact_top_k=certain).copy()
    session.forward(cache, row, tokens[:, :-keep])
    return session.forward(cache, row, tokens[:, -keep:], logits="all", exact_top_k=certain).copy()


def screens(session: Runner) -> bool:
    return session._head is not None and session._head._screening is not None


def screening_session(bundle: Bundle, tokens: np.ndarray) -> Runner:
    """A session that has seen enough to screen."""
    session = Runner(bundle, screen_after=SOON, screens=True)
    for length in range(1, SOON + 2):
        last_logits(session, tokens[:, : 3 * length], 1)
    assert screens(session)
    return session


def without_parts(bundle: Bundle) -> Bundle:
    """The same with nothing but its first graph."""
    return replace(bundle, manifest=replace(bundle.manifest, files={WEIGHTS: bundle.manifest.files[WEIGHTS]}))


@pytest.mark.parametrize("certain", [1, 3, 20, 51])
def test_largest_logits_are_exact_and_the_others_less(made: Bundle, tokens: np.ndarray, certain: int) -> None:
    session = screening_session(made, tokens)
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
    first, parts = (Runner(each, threads=1, screens=True) for each in (without_parts(made), made))
    for keep in (1, 40):
        expected = last_logits(first, tokens, None, keep)
        np.testing.assert_array_equal(last_logits(parts, tokens, None, keep), expected)


def test_screens_when_it_is_worth_it(made: Bundle, few: np.ndarray) -> None:
    session = Runner(made, screen_after=SOON, screens=True)
    exact = last_logits(session, few, None)
    for _ in range(SOON):
        np.testing.assert_array_equal(last_logits(session, few, 1), exact)
        assert not screens(session)
    assert not np.array_equal(last_logits(session, few, 1), exact)
    assert screens(session)


def test_several_positions_and_rows(made: Bundle, tokens: np.ndarray) -> None:
    session = screening_session(made, tokens)
    exact = last_logits(session, tokens[:, :60], None, keep=8)
    found = last_logits(session, tokens[:, :60], 1, keep=8)
    assert not np.array_equal(found, exact)
    np.testing.assert_array_equal(found.argmax(-1), exact.argmax(-1))
    np.testing.assert_allclose(found.max(-1), exact.max(-1), rtol=1e-5)
    cache = session.new_cache(8, 1)
    rows = tokens[0, :8, None]
    together = session.forward(cache, slice(0, 8), rows, exact_top_k=1).copy()
    alone = np.stack([last_logits(session, row[None], None)[0] for row in rows])
    assert not np.array_equal(together, alone)
    np.testing.assert_array_equal(together.argmax(-1), alone.argmax(-1))


STRATEGIES: list[dict[str, Any]] = [
    {},
    {"prompt_lookup": 6},
    {"do_sample": True, "top_k": 40, "temperature": 0.7, "top_p": 0.9, "seed": 3},
    {"do_sample": True, "top_k": 5, "seed": 4, "num_return_sequences": 3},
    {"do_sample": True, "top_k": 0, "seed": 5},
    {"do_sample": True, "top_h": 0.6, "seed": 6},
    {"do_sample": True, "eta_cutoff": 0.01, "epsilon_cutoff": 0.005, "renormalize_logits": True, "seed": 7},
    {"forced_eos_token_id": 5},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "num_beams": 3},
    {"logprobs": 2},
]


def test_tokens_are_those_without_screening(made: Bundle, tales_bundle: Path) -> None:
    prompts = ["Once upon a time", "The old king"]
    wanted = [(prompt, GenerationConfig(max_new_tokens=30, **more)) for prompt in prompts for more in STRATEGIES]
    requests = [Request(*each, id=number) for number, each in enumerate(wanted)]

    def completed(model: gpt2onnx.Model, batch_size: int) -> dict[int, list[list[int]]]:
        results = model.complete(requests, batch_size=batch_size)
        return {request.id: [one.token_ids for one in result.sequences] for request, result in results}

    plain = completed(gpt2onnx.load(tales_bundle), 5)
    model = gpt2onnx.Model(made.folder, screen_after=SOON, screens=True)
    model.generate("It was", max_new_tokens=SOON + 1)
    for batch_size in (1, 5):
        assert completed(model, batch_size) == plain
        assert screens(model.runner)


@pytest.mark.parametrize("twins", [40, 600], ids=["enough candidates", "too few candidates"])
def test_tokens_that_rounding_confuses(twins: int, export: Export, made: Bundle, tmp_path: Path) -> None:
    """Rows of the head that differ by less than 8 bits can say: the largest of their logits is found all the same."""
    tales = Checkpoint.open("tales").folder
    weights = {
        name.removeprefix("transformer."): array for name, array in load_file(tales / "model.safetensors").items()
    }
    random, head = np.random.default_rng(0), weights["wte.weight"].copy()
    prompts = [np.array([[first, 7, 8]]) for first in random.integers(len(head), size=60)]
    plain = Runner(made, screens=True)
    tokens = [int(last_logits(plain, prompt, None)[0].argmax()) for prompt in prompts]
    likeliest = head[max(tokens, key=tokens.count)]
    head[100 : 100 + twins] = likeliest * (1 + 1e-5 * random.standard_normal((twins, 1), np.float32))
    config = json.loads((tales / "config.json").read_text()) | {"tie_word_embeddings": False}
    for file in ("tokenizer.json", "generation_config.json"):
        (tmp_path / file).write_bytes((tales / file).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    session = screening_session(export(tmp_path), np.concatenate(prompts, axis=1))
    best = 0
    for prompt in prompts:
        exact, found = last_logits(session, prompt, None)[0], last_logits(session, prompt, 1)[0]
        assert found[exact.argmax()] == pytest.approx(exact.max(), rel=1e-5)
        assert exact[found.argmax()] == pytest.approx(exact.max(), rel=1e-6)
        best += 100 <= exact.argmax() < 100 + twins
    assert best > 5, "no prompt has twins for its likeliest tokens"
    assert screens(session)


def test_margin_is_never_passed() -> None:
    """Estimates differ from exact logits by at most the margin, also for inputs that are made to differ most."""
    random = np.random.default_rng(0)
    width, vocabulary, size = 64, 400, 32
    head = random.standard_normal((vocabulary, width), np.float32) + random.standard_normal(width, np.float32)
    head[:5] *= 20
    states = random.standard_normal((300, width), np.float32) * random.uniform(0.1, 3, width).astype(np.float32) + 1
    (rows, scales, bias), ours = screening.round_head(lambda first, last: head[first:last], vocabulary, states, size)
    rounded = (rows.astype(np.float32) - 128) * scales[..., None]
    wrong = (head - ours.common) / ours.balance - rounded.reshape(head.shape)
    # Along the rounding error of a row; and what falls between two steps in every block.
    along = wrong[::7] / ours.balance
    between = np.where(np.arange(width) % size == 0, 127, random.integers(-126, 126, (60, width)) + 0.499)
    inputs = np.concatenate([states, 50 * along, between / ours.balance]).astype(np.float32) + ours.mean
    inputs[: len(states)] -= ours.mean

    nodes = Nodes()
    weights = [nodes.constant("rows", rows), nodes.constant("scales", scales)]
    nodes.op(
        "MatMulNBits", ["x", *weights], "y", domain=MICROSOFT, K=width, N=vocabulary, bits=8, block_size=size,
        accuracy_level=4,
    )  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    fused = helper.make_graph(nodes.nodes, "product", values[:1], values[1:], nodes.initializers)
    network = ort.InferenceSession(as_model(fused).SerializeToString(), providers=["CPUExecutionProvider"])
    balanced = (inputs - ours.mean) * ours.balance
    (products,) = network.run(None, {"x": balanced})
    estimates = products.astype(np.float64) + ((inputs - ours.mean) @ ours.common)[:, None] + bias
    errors = np.abs(estimates - inputs.astype(np.float64) @ head.T.astype(np.float64)).max(-1)
    margin = ours.margin(inputs, balanced)
    assert (errors <= margin).all()
    assert (errors / margin).max() > 0.2, "a bound that says nothing"


@pytest.mark.parametrize("threads", [1, 3])
def test_estimates_of_a_head_in_pieces(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is cut up for the processor, with rows of zeros and inputs that never vary in it."""
    random = np.random.default_rng(0)
    head = random.standard_normal((1000, 32), np.float32)
    head[[0, 500, 999]] = 0
    states = np.repeat(random.standard_normal((1, 32), np.float32), 3, axis=0)

    def rounded() -> tuple[screening.RoundedHead, screening.Estimates]:
        return screening.round_head(lambda first, last: head[first:last], 1000, states, 16, threads)

    whole, estimates = rounded()
    monkeypatch.setattr(screening, "_AT_ONCE", 77)
    pieces, again = rounded()
    for one, other in zip([*pieces, *vars(again).values()], [*whole, *vars(estimates).values()], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert np.isfinite(estimates.margin(states, (states - estimates.mean) * estimates.balance)).all()


def test_goes_back_where_estimates_are_too_rough(
    made: Bundle, few: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(runtime, "_TRIED", 8)
    session = screening_session(made, few)
    exact = last_logits(Runner(made, screens=True), few, None)
    for _ in range(8):
        last_logits(session, few, 1)
    assert screens(session)
    monkeypatch.setattr(
        screening.Estimates, "margin", lambda self, states, balanced: np.full(len(states), np.inf, np.float32)
    )
    for _ in range(9):
        np.testing.assert_allclose(last_logits(session, few, 1), exact, rtol=1e-5, atol=1e-5)
    assert not screens(session)
    assert "estimates of them are too rough" in caplog.text
    np.testing.assert_array_equal(last_logits(session, few, 1), exact)


def test_does_without_where_there_is_no_memory(
    made: Bundle, few: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(screening, "round_head", fail)
    session = Runner(made, screen_after=SOON, screens=True)
    exact = last_logits(session, few, None)
    for _ in range(SOON + 2):
        np.testing.assert_array_equal(last_logits(session, few, 1), exact)
    assert "logits aren't screened: MemoryError" in caplog.text


def test_goes_on_as_it_was_where_another_bundle_took_its_place(
    made: Bundle, few: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "bundle"
    shutil.copytree(made.folder, folder)
    session = Runner(Bundle.open(folder), screen_after=SOON, screens=True)
    exact = last_logits(session, few, None)
    gpt2onnx.export("tales", folder, dtype="int8", calibrate=False, quality=False, force=True)
    for _ in range(SOON + 2):
        np.testing.assert_array_equal(last_logits(session, few, 1), exact)
    assert f"logits aren't screened: {folder} is another bundle by now" in caplog.text


def test_packs_the_head_again_where_all_logits_are_called_for(made: Bundle, few: np.ndarray, tmp_path: Path) -> None:
    """And does without where its file isn't there any more."""
    for gone in (False, True):
        folder = tmp_path / f"{gone}"
        shutil.copytree(made.folder, folder)
        session = screening_session(Bundle.open(folder), few)
        if gone:
            shutil.rmtree(folder)
        exact = last_logits(Runner(made, screens=True), few, None)
        np.testing.assert_allclose(last_logits(session, few, None), exact, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(last_logits(session, few, None), last_logits(session, few, None))
        assert screens(session)


def test_does_not_pack_the_head_again_where_memory_is_short(
    made: Bundle, few: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    session, exact = screening_session(made, few), last_logits(Runner(made, screens=True), few, None)
    monkeypatch.setattr(resources, "shortage", lambda size: "more than there is")
    np.testing.assert_allclose(last_logits(session, few, None), exact, rtol=1e-5, atol=1e-5)
    assert "logits take longer: packing the output head needs about more than there is" in caplog.text


@pytest.mark.parametrize("forced", [True, False, None])
def test_forced_or_left_to_the_processor(forced: bool | None, made: Bundle, few: np.ndarray) -> None:
    """Where sums of products of bytes overflow, the whole first graph serves."""
    expected = forced
    if expected is None:
        expected = not resources.sums_of_byte_products_overflow()
    session = Runner(made, threads=1, screen_after=SOON, screens=forced)
    whole = last_logits(Runner(without_parts(made), threads=1), few, None)
    for _ in range(SOON):
        np.testing.assert_array_equal(last_logits(session, few, 1), whole)
        assert not screens(session)
    assert np.array_equal(last_logits(session, few, 1), whole) is not expected
    assert screens(session) == (session._head is not None) == runtime.usable(made, forced) == expected


def test_candidates() -> None:
    assert screening.candidates(1, None, 50257) == 0
    assert screening.candidates(1, 1, 50257) == screening.candidates(8, 1, 50257) == 256
    assert screening.candidates(9, 1, 50257) == 0
    assert screening.candidates(1, 50, 50257) == 2000
    assert screening.candidates(2, 50, 50257) == screening.candidates(1, 50, 2000) == 0


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({}, 1),
        ({"do_sample": True, "top_k": 7}, 7),
        ({"do_sample": True, "top_k": 0}, None),
        ({"logprobs": 0}, None),
        ({"no_repeat_ngram_size": 2}, None),
        ({"num_beams": 2}, None),
    ],
)
def test_what_a_search_looks_at(options: dict[str, Any], exact: int | None) -> None:
    assert start(np.array([1]), GenerationConfig(**options), 10).exact_top_k == exact


@pytest.mark.parametrize(
    ("width", "vocabulary", "expected"),
    [(768, 50257, True), (768, 1000, False), (64, 50257, False), (1000, 50257, False)],
)
def test_where_it_pays(width: int, vocabulary: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_LARGE", LARGE)
    config = GPT2Config.from_dict({"model_type": "gpt2", "n_embd": width, "n_head": 8, "vocab_size": vocabulary})
    assert exporter.pays(config) == expected


def changed(bundle: Bundle, target: Path, name: str, change: Callable[[onnx.GraphProto], object]) -> Path:
    """A copy of a bundle with one graph changed."""
    shutil.copytree(bundle.folder, target)
    model = onnx.load(target / name, load_external_data=False)
    change(model.graph)
    (target / name).write_bytes(model.SerializeToString())
    replace(bundle.manifest, files=describe_files(target)).write(target)
    return target


@pytest.mark.parametrize("name", PARTS)
def test_takes_no_weights_from_elsewhere(name: str, made: Bundle, tmp_path: Path) -> None:
    def elsewhere(graph: onnx.GraphProto) -> None:
        tensor = next(each for each in graph.initializer if each.external_data)
        tensor.external_data[0].value = "../../secret"

    folder = changed(made, tmp_path / "bundle", name, elsewhere)
    with pytest.raises(BundleError, match=rf"{Path(name).stem}\.onnx takes weights from"):
        Bundle.open(folder)


def rename_output(graph: onnx.GraphProto) -> None:
    graph.node[-1].output[0] = graph.output[0].name = "other"


def double_products(graph: onnx.GraphProto) -> None:
    total = next(node for node in graph.node if node.op_type == "Add")
    total.input[1] = total.input[0]


def store_more(graph: onnx.GraphProto) -> None:
    part = next(each for each in graph.initializer if each.external_data)
    graph.initializer.add().CopyFrom(part)
    graph.initializer[-1].name = "more"


def test_head_of_another_network(made: Bundle, tmp_path: Path) -> None:
    folder = changed(made, tmp_path / "bundle", HEAD_GRAPH, rename_output)
    with pytest.raises(BundleError, match=r"head\.onnx isn't what config.json describes: it lacks the output 'logits'"):
        Runner(Bundle.open(folder), screens=True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            SCREENING_GRAPH,
            rename_output,
            "screening.onnx isn't what config.json describes: it lacks the output 'logits'",
        ),
        (SCREENING_GRAPH, double_products, "estimates are off by more than rounding explains"),
        (HEAD_GRAPH, store_more, "head.onnx isn't the output head that config.json describes"),
    ],
)
def test_screening_for_another_network(
    name: str,
    change: Callable[[onnx.GraphProto], None],
    message: str,
    made: Bundle,
    few: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is only to be faster: without it the whole head goes on."""
    caplog.set_level(logging.INFO)
    session = Runner(Bundle.open(changed(made, tmp_path / "bundle", name, change)), screen_after=0, screens=True)
    exact = last_logits(session, few, None)
    for _ in range(3):
        np.testing.assert_array_equal(last_logits(session, few, 1), exact)
    assert not screens(session)
    assert f"{message}" in caplog.text


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (slice(None), "(doesn't hold the output head|estimates are off by more than rounding explains)"),
        (slice(-1000, None), "is another bundle by now"),
    ],
    ids=["all weights", "not those of the head"],
)
@pytest.mark.parametrize("step", ["map", "read"])
def test_a_bundle_that_takes_its_place_meanwhile_is_noticed(
    step: str,
    part: slice,
    message: str,
    made: Bundle,
    few: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the very moment between the look at the manifest and the reading of the weights."""
    caplog.set_level(logging.INFO)
    folder, other = tmp_path / "bundle", tmp_path / "other"
    shutil.copytree(made.folder, folder)
    shutil.copytree(made.folder, other)
    weights = np.fromfile(other / WEIGHTS, np.float32)
    weights[part] *= -1
    weights.tofile(other / WEIGHTS)
    replace(made.manifest, files=describe_files(other)).write(other)
    session = Runner(Bundle.open(folder), screen_after=0, screens=True)
    exact = last_logits(session, few, None)
    place, name = (runtime.np, "memmap") if step == "map" else (runtime.screening, "round_head")
    real = getattr(place, name)

    def exchange(*given: Any, **options: Any) -> Any:
        if other.exists():
            folder.rename(tmp_path / "old")
            other.rename(folder)
        return real(*given, **options)

    monkeypatch.setattr(place, name, exchange)
    for _ in range(3):
        np.testing.assert_allclose(last_logits(session, few, 1), exact, rtol=1e-5, atol=1e-5)
    assert not screens(session)
    assert re.search(f"logits aren't screened: .*{message}", caplog.text)


def test_few_and_equal_inputs_are_enough(made: Bundle, tokens: np.ndarray) -> None:
    """Such as those of a server that is asked for one token after the same prompt again and again."""
    for seen in (0, 30):
        session = Runner(made, screen_after=seen, screens=True)
        for _ in range(seen + 1):
            last_logits(session, tokens[:, :50], 1)
        assert screens(session)
        for length in range(1, 100, 5):
            last_logits(session, tokens[:, :length], 1)
        head = session._head
        assert head is not None
        assert head._failed <= 0.2 * head._tried


def test_never(made: Bundle, tokens: np.ndarray) -> None:
    session = Runner(made, screen_after=None, screens=True)
    for _ in range(runtime.WORTH + 2):
        last_logits(session, tokens[:, :3], 1)
    assert not screens(session)
    assert session._head is not None
    with pytest.raises(OptionError, match="screen_after must be at least 0, not -1"):
        gpt2onnx.load(made.folder, screen_after=-1)


def test_numbers_are_those_of_the_documents() -> None:
    default = inspect.signature(gpt2onnx.load).parameters["screen_after"].default
    assert (runtime.WORTH, default, LARGE, screening.candidates(8, 1, 50257)) == (96, 96, 24 << 20, 256)


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_other_bundles_are_whole(dtype: str, export: Export) -> None:
    made = export("tales", dtype=dtype, calibrate=False, quality=False)
    assert not set(PARTS) & made.manifest.files.keys()
    assert Runner(made, screens=True)._head is None


def test_places_of_weights(made: Bundle) -> None:
    graph = onnx.load(made.folder / HEAD_GRAPH, load_external_data=False).graph
    entries = [{each.key: each.value for each in tensor.external_data} for tensor in graph.initializer]
    expected = [(each["location"], int(each["offset"]), int(each["length"])) for each in entries if each]
    assert len(expected) == 3
    assert sorted(external_data.places((made.folder / HEAD_GRAPH).read_bytes())) == sorted(expected)


def test_weights_that_a_step_reads(made: Bundle) -> None:
    config = made.config
    # All but the position table.
    every = memory(config, "fp32").weights - 4 * config.n_positions * config.n_embd
    assert weights_read(made) == pytest.approx(every, rel=0.02)
