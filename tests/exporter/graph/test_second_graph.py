"""The second graph for prompts and batches: what it computes, and when it is opened."""

import gc
import inspect
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.bundles import edit_graphs, remove_output
from support.commands import CommandLine

import gpt2onnx
from gpt2onnx.errors import BackendError, BundleError, OptionError
from gpt2onnx.exporter.graph.blocks import in_axis
from gpt2onnx.exporter.validate.bundle_weights import BundleWeights
from gpt2onnx.models.bundle import CACHE_DTYPES, SECOND_GRAPH, SECOND_GRAPH_WEIGHTS, Bundle
from gpt2onnx.models.shapes import weight_shapes
from gpt2onnx.runtime.engine import second_graph
from gpt2onnx.runtime.engine.runner import Runner
from gpt2onnx.runtime.host import resources
from gpt2onnx.runtime.ort import providers

MIN_TOKENS = second_graph.MIN_TOKENS["int8"]
# Matrices of 8 bits in short blocks, and those of 4 and 8 bits in longer ones.
PRECISIONS: dict[str, dict[str, Any]] = {"int8": {"dtype": "int8", "block_size": 16}, "int4": {"dtype": "int4"}}


@pytest.fixture(scope="module", params=PRECISIONS)
def made(request: pytest.FixtureRequest, export_short_tales: Callable[..., Bundle]) -> Bundle:
    """Blocks of the embedded model as if they were wide enough for a second graph."""
    return export_short_tales(second_graph=True, calibrate=True, quality=False, **PRECISIONS[request.param])


def logits(session: Runner, tokens: np.ndarray, *parts: int) -> np.ndarray:
    """Of all positions of [rows, count] tokens, taken in parts of these lengths."""
    rows = slice(0, len(tokens))
    cache = session.new_cache(len(tokens), tokens.shape[1])
    ends = np.cumsum(parts)
    assert ends[-1] == tokens.shape[1]
    passes = (tokens[:, end - count : end] for end, count in zip(ends, parts, strict=True))
    return np.concatenate(
        [session.forward(cache, rows, each, logits="all").reshape(*each.shape, -1).copy() for each in passes], axis=1
    )


def test_weights_are_the_first_graphs_up_to_rounding(made: Bundle) -> None:
    stored, ours = BundleWeights(made), BundleWeights(made, second_graph=True)
    steps_of, changed = dict(ours.made_scales()), 0
    for name in weight_shapes(made.config, tied=False):
        steps = steps_of.get(name)
        if steps is None:
            np.testing.assert_array_equal(ours.tensor(name), stored.tensor(name), err_msg=name)
            continue
        error = np.abs(ours.tensor(name) - stored.tensor(name)) / steps
        assert error.max() <= 0.501, name
        # All of the range is used: a step is no longer than the largest weight that blocks could hold asks for.
        share = 0.5 if stored.blocks(name).bits == 8 else 0.4
        assert np.abs(stored.tensor(name)).max(in_axis(name)).mean() > steps.mean() * 127 * share, name
        changed += 1
    assert changed > 6  # of 9
    assert "lm_head.weight" in steps_of


def test_graphs_share_a_cache(made: Bundle) -> None:
    """A prompt through the one and single tokens through the other give about what either gives alone."""
    one, both = Runner(made, threads=1, wide_after=None), Runner(made, threads=1, wide_after=0)
    count = 20
    tokens = np.random.default_rng(0).integers(made.config.vocab_size, size=(1, count))
    steps = [1] * (count - MIN_TOKENS)
    alone = logits(one, tokens, MIN_TOKENS, *steps)
    np.testing.assert_array_equal(logits(both, tokens, *[1] * count), logits(one, tokens, *[1] * count))
    mixed = logits(both, tokens, MIN_TOKENS, *steps)
    assert not np.array_equal(mixed[:, MIN_TOKENS - 1], alone[:, MIN_TOKENS - 1]), "which graph was it?"
    assert np.abs(mixed - alone).max() < 0.1 * np.abs(alone).max()


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("made", ["int8"], indirect=True)
def test_weights_are_kept_only_where_they_are_read(made: Bundle, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[np.ndarray] = []

    def make_weights(*arguments: Any) -> dict[str, np.ndarray]:
        weights = original(*arguments)
        given.extend(weights.values())
        return weights

    original = second_graph.make_weights
    monkeypatch.setattr(second_graph, "make_weights", make_weights)
    if not copied:
        monkeypatch.setattr(providers, "_copies_weights", lambda: False)
    session = Runner(made, threads=1, wide_after=0)
    tokens = np.random.default_rng(0).integers(made.config.vocab_size, size=(1, 20))
    expected = logits(session, tokens, 20)
    assert given
    assert session._second_graph is not None
    assert session._second_graph._graph is not None
    if copied and providers._copies_weights():
        # Nothing reads these any more.
        for each in given:
            each.fill(0)
        del each
        np.testing.assert_array_equal(logits(session, tokens, 20), expected)
    seen = [weakref.ref(each) for each in given]
    given.clear()
    gc.collect()
    held = [each() is not None for each in seen]
    assert held == [not (copied and providers._copies_weights())] * len(seen)
    del session
    gc.collect()
    assert not any(each() is not None for each in seen)


def opened(session: Runner, rows: int, passes: int, count: int = 1) -> int | None:
    """The pass, of some of that many tokens, in which the second graph is opened."""
    for number in range(passes):
        session.forward(session.new_cache(rows, count), slice(0, rows), np.ones((rows, count), np.int64))
        if session._second_graph is not None and session._second_graph._graph is not None:
            return number
    return None


@pytest.mark.parametrize("made", ["int8"], indirect=True)
def test_opened_when_worth_it(made: Bundle) -> None:
    assert opened(Runner(made), MIN_TOKENS - 1, 300) is None
    assert opened(Runner(made), 16, 100) == second_graph.OPEN_AFTER // 16
    assert opened(Runner(made), 1, 100, 64) == second_graph.OPEN_AFTER // 64
    assert opened(Runner(made, wide_after=0), MIN_TOKENS, 1) == 0
    assert opened(Runner(made, wide_after=None), 16, 100) is None
    assert opened(gpt2onnx.load(made.folder, wide_after=100).runner, 25, 5) == 4
    with pytest.raises(OptionError, match="wide_after must be a whole number, at least 0, not -1"):
        gpt2onnx.load(made.folder, wide_after=-1)


def test_numbers_are_those_of_the_documents() -> None:
    default = inspect.signature(gpt2onnx.load).parameters["wide_after"].default
    assert (second_graph.MIN_TOKENS, second_graph.OPEN_AFTER, default) == ({"fp32": 8, "int8": 6, "int4": 6}, 512, 512)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("eval", ["{}"]), ("sweep", ["--no-energy", "--prompt", "Once", "--out", "out"]), ("generate", ["--input", "{}"])],
)
def test_opened_right_away_where_results_must_not_depend_on_earlier_ones(
    command: str, arguments: list[str], command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text('{"prompt": "Once"}\n')
    monkeypatch.chdir(tmp_path)
    taken: dict[str, Any] = {}

    def load(*_: object, **others: object) -> None:
        taken.update(others)
        raise BackendError("enough")

    monkeypatch.setattr(f"gpt2onnx.cli.{command}.load", load)
    finished = command_line(command, *(each.format(tmp_path / "file") for each in arguments))
    assert "enough" in finished.err
    assert taken["wide_after"] == 0


@pytest.mark.parametrize("made", ["int8"], indirect=True)
def test_not_opened_where_memory_is_short(
    made: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = Runner(made)
    monkeypatch.setattr(resources, "shortage", lambda size: "more than there is" if size > 1000 else None)
    with caplog.at_level(logging.INFO):
        assert opened(session, 1, 100, 64) is None
    assert [record.message for record in caplog.records if "wide.onnx" in record.message] == [
        f"prompts and batches stay slower: {made.folder / SECOND_GRAPH} needs about more than there is"
    ]
    with pytest.raises(BackendError, match="needs about"):
        session.open_second_graph()


@pytest.mark.parametrize("made", ["int8"], indirect=True)
def test_not_opened_where_another_bundle_took_its_place(
    made: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(made.folder, folder)
    session = Runner(Bundle.open(folder))
    gpt2onnx.export("tales", folder, force=True)
    with caplog.at_level(logging.INFO):
        assert opened(session, 1, 100, 64) is None
    assert f"prompts and batches stay slower: {folder} is another bundle by now: load it again" in caplog.text


@pytest.mark.parametrize("made", ["int8"], indirect=True)
@pytest.mark.parametrize("name", [SECOND_GRAPH, SECOND_GRAPH_WEIGHTS])
def test_second_graph_takes_no_weights_from_elsewhere(made: Bundle, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(made.folder, folder)

    def change(model: onnx.ModelProto) -> None:
        tensor = next(each for each in model.graph.initializer if each.external_data)
        tensor.external_data[0].value = "../../secret"

    edit_graphs(folder, change, name)
    for opened in (lambda: gpt2onnx.load(folder, wide_after=0), Bundle.open(folder).verify):
        with pytest.raises(BundleError, match=f"{Path(name).name} takes weights from"):
            opened()


@pytest.mark.parametrize("made", ["int8"], indirect=True)
def test_another_networks_second_graph_is_refused(made: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(made.folder, folder)
    edit_graphs(folder, lambda model: remove_output(model, "logits"), SECOND_GRAPH)
    with pytest.raises(
        BundleError, match=r"wide\.onnx isn't what config\.json describes: it lacks the output 'logits'"
    ):
        opened(Runner(Bundle.open(folder), wide_after=0), 16, 1)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_padding_holds_no_memory_of_earlier_passes(cache_dtype: str, made: Bundle) -> None:
    """GroupQueryAttention leaves outputs of padding unwritten, and the layer behind it rounds all rows with one scale."""
    session, random = Runner(made.with_cache(cache_dtype), threads=1, wide_after=0), np.random.default_rng(0)
    tokens = random.integers(made.config.vocab_size, size=(4, 40))

    def ragged(counts: list[int], past: int) -> np.ndarray:
        cache, rows = session.new_cache(4, 64), slice(0, 4)
        if past:
            session.forward(cache, rows, tokens[:, :past])
        return session.forward(cache, rows, tokens[:, : max(counts)], np.array(counts), "all").copy()

    for counts, past in (([40, 24, 5, 2], 0), ([8, 1, 0, 3], 9), ([3, 0, 3, 0], 20)):
        first = ragged(counts, past)
        for rows, length in ((16, 64), (1, 200), (3, 30)):
            others = random.integers(made.config.vocab_size, size=(rows, length))
            session.forward(session.new_cache(rows, length), slice(0, rows), others)
            np.testing.assert_array_equal(ragged(counts, past), first)
