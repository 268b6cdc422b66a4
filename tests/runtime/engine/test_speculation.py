"""Drafts by a faster network: the same tokens whoever drafts, in fewer passes, as long as it pays."""

import shutil
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import MakeCheckpoint
from support.paths import REPOSITORY
from support.scheduling import CONTEXT, REQUESTS, HashingNetwork, run

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.runtime.engine import speculation
from gpt2onnx.runtime.engine.draft_length import Acceptance, PassTimes
from gpt2onnx.runtime.engine.graphs import runs_ragged
from gpt2onnx.runtime.engine.kv_cache import KVCache
from gpt2onnx.runtime.engine.scheduler import Scheduler
from gpt2onnx.runtime.engine.speculation import Drafter

PROMPTS = ["Once upon a time", "The king said", "In the forest there lived an old"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "seed": 7},
    {"do_sample": True, "seed": 3, "temperature": 0.7, "top_k": 40, "top_p": 0.9},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    {"stop": [" the"], "logprobs": 2},
    {"do_sample": True, "seed": 5, "min_p": 0.05, "typical_p": 0.9, "bad_words_ids": [[11], [262, 13]]},
]


twins = pytest.mark.skipif(not runs_ragged(), reason="twins run on ONNX Runtime from 1.32 on")


def drafter(network: HashingNetwork, *, shared: bool = True, length: int | None = None, after: int = 0) -> Drafter:
    return Drafter(lambda: network, shared=shared, context=CONTEXT, length=length, after=after)


@settings(max_examples=150)
@given(
    rounds=st.lists(st.lists(REQUESTS, min_size=1, max_size=6), min_size=1, max_size=3), batch_size=st.integers(1, 4),
    noise=st.sampled_from([0.0, 0.5, 2.0]), shared=st.booleans(), length=st.sampled_from([None, 1, 2, 7]), after=st.integers(0, 9),
)  # fmt: skip
def test_drafted_is_plain(
    rounds: list[list[tuple[list[int], dict[str, Any]]]], batch_size: int, noise: float, shared: bool, length: int | None, after: int
) -> None:  # fmt: skip
    network = HashingNetwork()
    decoder = Scheduler(network, drafter(HashingNetwork(noise=noise), shared=shared, length=length, after=after))
    for requests in rounds:
        assert run(network, requests, batch_size, decoder) == run(HashingNetwork(), requests, 1)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 1}], ids=str)
def test_right_drafts_save_passes(sampling: dict[str, Any], shared: bool) -> None:
    network, faster = HashingNetwork(), HashingNetwork()
    requests = [([1, 2, 3], {"max_new_tokens": 21, "eos_token_id": -1} | sampling)]
    run(network, requests, 1, Scheduler(network, drafter(faster, shared=shared, length=4)))
    # After the prompt's token: four passes over four drafts and the token before them.
    assert network.passes == [(1, 3), *[(1, 5)] * 4]
    new = [(1, 1)] * 4 if shared else [(1, 4), (1, 1), (1, 1), (1, 1)]
    assert faster.passes[:4] == new
    assert len(faster.passes) == 16


class TimedNetwork(HashingNetwork):
    """Takes time on a clock of its own, for each pass and each token in it."""

    def __init__(self, clock: "Clock", a_pass: float, a_token: float, noise: float = 0) -> None:
        super().__init__(noise=noise)
        self._clock, self._a_pass, self._a_token = clock, a_pass, a_token

    def forward(self, *arguments: Any, **others: Any) -> np.ndarray:
        found = super().forward(*arguments, **others)
        self._clock.now += self._a_pass + self._a_token * self.passes[-1][0] * self.passes[-1][1]
        return found


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def seconds(
    clock: Clock, network: Callable[[], HashingNetwork], faster: Callable[[], HashingNetwork] | None, rows: int, options: dict[str, Any]
) -> float:  # fmt: skip
    """Time that texts take."""
    full = network()
    decoder = Scheduler(full, None if faster is None else drafter(faster()))
    clock.now = 0
    for first in range(20):
        requests = [([first, row % 13], {"max_new_tokens": 38, "eos_token_id": -1} | options) for row in range(rows)]
        run(full, requests, rows, decoder)
    return clock.now


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 2}], ids=str)
def test_drafts_are_used_where_they_pay(clock: Clock, options: dict[str, Any]) -> None:
    """A pass that takes three times as long as a faster network's, and hardly longer with some tokens more."""
    plain = seconds(clock, lambda: TimedNetwork(clock, 15, 0.7), None, 1, options)
    drafted = seconds(
        clock, lambda: TimedNetwork(clock, 15, 0.7), lambda: TimedNetwork(clock, 4, 0.7, 0.02), 1, options
    )
    assert drafted < plain / 1.7


@pytest.mark.parametrize(
    ("rows", "a_pass", "a_token", "draft_pass", "noise"),
    [
        pytest.param(1, 15, 0.7, 4, 9, id="wrong drafts"),
        pytest.param(1, 15, 0.7, 15, 0.02, id="a faster network that isn't faster"),
        pytest.param(8, 1, 3, 25, 0.02, id="a batch that keeps the processor busy"),
    ],
)
def test_drafts_cost_little_where_they_dont_pay(
    clock: Clock, rows: int, a_pass: float, a_token: float, draft_pass: float, noise: float
) -> None:
    plain = seconds(clock, lambda: TimedNetwork(clock, a_pass, a_token), None, rows, {})
    drafted = seconds(
        clock, lambda: TimedNetwork(clock, a_pass, a_token), lambda: TimedNetwork(clock, draft_pass, 0, noise), rows, {}
    )
    assert plain * 0.99 < drafted < plain * 1.05


def test_drafts_are_tried_again_in_short_requests(clock: Clock) -> None:
    """Passes over several tokens become faster, as when a second graph is opened."""
    full = TimedNetwork(clock, 1, 20)
    decoder = Scheduler(full, drafter(TimedNetwork(clock, 4, 0.7, 0.02)))

    def times(count: int) -> list[float]:
        found = []
        for first in range(count):
            begin = clock.now
            run(full, [([first % 13, 5], {"max_new_tokens": 30, "eos_token_id": -1})], 1, decoder)
            found.append(clock.now - begin)
        return found

    busy = times(20)
    full._a_pass, full._a_token = 15, 0.7
    *_, drafted = times(20)
    assert busy[-1] == pytest.approx(30 * 21, rel=0.1), "without drafts"
    assert drafted < 30 * 15.7 / 1.7


def test_times_of_passes() -> None:
    times = PassTimes()
    assert times.expected(1) is None
    for size, each in ((1, [9, 1, 1, 5, 1]), (5, [9, 3]), (10, [9])):
        for one in each:
            times.note(size, one)
    assert [times.expected(size) for size in (1, 3, 5)] == [1, 2, 3]
    assert times.expected(7) == pytest.approx(3 + 2 * (3 - 1) / 4)
    assert times.expected(8) is None
    for one in (9, 2, 7):
        times.note(20, one)
    assert times.expected(20) == 2, "of two, the shorter one"


def test_acceptance_follows_what_happens() -> None:
    acceptance = Acceptance(0.8)
    for _ in range(100):
        acceptance.note(4, 0)
    assert acceptance.share < 0.1
    for _ in range(100):
        acceptance.note(4, 4)
    assert acceptance.share > 0.95


@pytest.fixture(scope="module")
def expected(tales_twin_bundle: Path) -> list[list[list[int]]]:
    plain = gpt2onnx.load(tales_twin_bundle, draft="none", threads=1)
    return [tokens(plain, options, 1) for options in OPTIONS]


def tokens(model: gpt2onnx.Model, options: dict[str, Any], batch_size: int) -> list[list[int]]:
    results = model.generate(PROMPTS, max_new_tokens=48, batch_size=batch_size, **options)
    return [result.sequences[0].token_ids for result in results]


@twins
@pytest.mark.parametrize(
    ("settings", "batch_sizes"),
    [({"draft": "twin", "draft_length": 4}, (1, 3)), ({"draft_length": 3}, (3, 1)), ({"draft": "lookup"}, (1, 3))],
    ids=str,
)
def test_twin_drafts_the_same_tokens(
    tales_twin_bundle: Path, expected: list[list[list[int]]], settings: dict[str, Any], batch_sizes: tuple[int, int]
) -> None:
    """Batches of both sizes in turn, so that all settings and all options meet both."""
    model = gpt2onnx.load(tales_twin_bundle, threads=1, **settings)
    for options, wanted, batch_size in zip(OPTIONS, expected, cycle(batch_sizes), strict=False):
        assert tokens(model, options, batch_size) == wanted, options


def test_draft_model_drafts_the_same_tokens(
    tales_twin_bundle: Path, expected: list[list[list[int]]], tales_int8_bundle: Path
) -> None:
    model = gpt2onnx.load(tales_twin_bundle, draft_model=tales_int8_bundle, draft_length=4, threads=1)
    for options, wanted in zip(OPTIONS, expected, strict=True):
        assert tokens(model, options, 3) == wanted, options


@twins
def test_a_bundle_that_is_gone_is_not_drafted_for(tales_twin_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tales_twin_bundle, folder)
    model = gpt2onnx.load(folder, threads=1)
    expected = model.generate(PROMPTS[0], max_new_tokens=10).sequences[0].token_ids
    shutil.rmtree(folder)
    tokens = model.generate(PROMPTS[0], max_new_tokens=speculation.OPEN_AFTER + 20).sequences[0].token_ids
    assert (tokens[:10], len(tokens)) == (expected, speculation.OPEN_AFTER + 20)


def test_drafts_from_the_text_say_nothing_about_the_drafter() -> None:
    drafting, network = drafter(HashingNetwork(), after=1000), HashingNetwork(repetitive=True)  # which stays closed
    run(network, [([1, 2, 3], {"max_new_tokens": 30, "prompt_lookup": 5})], 1, Scheduler(network, drafting))
    assert len(network.passes) < 30
    assert drafting._acceptance.share == Acceptance().share


def test_without_memory_for_a_cache_of_its_own_nothing_is_drafted() -> None:
    class Small(HashingNetwork):
        def new_cache(self, rows: int, positions: int) -> KVCache:
            attempts.append(rows)
            if rows:
                raise OptionError("no memory")
            return super().new_cache(rows, positions)

    request: tuple[list[int], dict[str, Any]] = ([1, 2, 3], {"max_new_tokens": 9})
    attempts, network = list[int](), HashingNetwork()
    decoder = Scheduler(network, drafter(Small(), shared=False, length=3))
    assert run(network, [request], 1, decoder) == run(HashingNetwork(), [request], 1)
    assert sum(rows > 0 for rows in attempts) == 1, "it tries again and again"


@twins
def test_streams_are_drafted_too(tales_twin_bundle: Path) -> None:
    plain = gpt2onnx.load(tales_twin_bundle, draft="none", threads=1)
    model = gpt2onnx.load(tales_twin_bundle, draft="twin", draft_length=5, threads=1)
    for options in ({"stop": [" the"]}, {"do_sample": True, "seed": 4, "max_new_tokens": 30}):
        stream, other = model.stream("Once upon a time", **options), plain.stream("Once upon a time", **options)
        assert "".join(stream) == "".join(other)
        assert stream.result.sequences[0].token_ids == other.result.sequences[0].token_ids


def test_what_cannot_draft_is_refused(tales_twin_bundle: Path, tales_int8_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has no twin for cpu: export it with --twin"):
        gpt2onnx.load(tales_int8_bundle, draft="twin")
    with pytest.raises(OptionError, match="draft must be one of auto, none, lookup, twin, not 'self'"):
        gpt2onnx.load(tales_twin_bundle, draft="self")
    with pytest.raises(OptionError, match="draft_length must be a whole number, at least 1"):
        gpt2onnx.load(tales_twin_bundle, draft_length=0)
    with pytest.raises(OptionError, match="twin goes with dtype fp32 or fp16"):
        gpt2onnx.export("tales", tmp_path / "none", dtype="int8", twin=True)


def test_numbers_are_those_of_the_documents() -> None:
    text = " ".join((REPOSITORY / "docs" / "export.md").read_text().split())
    assert f"It is opened after {speculation.OPEN_AFTER} tokens" in text
    assert f"A draft has 0 to {speculation.LONGEST} tokens" in text


@pytest.mark.parametrize(
    ("vocab_size", "twin", "has_twin"), [(80_000, None, True), (80_000, False, False), (70_000, None, False)]
)
def test_bundles_of_20_million_weights_have_a_twin(
    vocab_size: int, twin: bool | None, has_twin: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(vocab_size=vocab_size, n_embd=256, n_head=4, n_layer=1)
    gpt2onnx.export(checkpoint, tmp_path / "bundle", twin=twin)
    assert Bundle.open(tmp_path / "bundle").has_twin == has_twin
