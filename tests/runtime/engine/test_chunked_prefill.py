"""Chunked prefill, arrivals at any time, and cancelled searches, as the server needs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduling import REQUESTS, VOCABULARY, HashingNetwork, begin, results, run

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.runtime.decoding.strategy import Strategy
from gpt2onnx.runtime.engine.scheduler import Scheduler
from gpt2onnx.runtime.generation import Generation
from gpt2onnx.runtime.requests import Request


@settings(max_examples=60)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 6), REQUESTS), min_size=1, max_size=8),
    batch_size=st.integers(1, 4), chunk=st.one_of(st.none(), st.integers(1, 40)), data=st.data(),
)  # fmt: skip
def test_any_arrival_any_chunk_any_cancellation(
    arrivals: list[Any], batch_size: int, chunk: int | None, data: st.DataObject
) -> None:
    """Searches that aren't cancelled give what they give alone, and all rows are free in the end."""
    network = HashingNetwork()
    decoder = Scheduler(network)
    searches = [begin(*request) for _, request in arrivals]

    def source() -> Iterator[Strategy | None]:
        for (pause, _), search in zip(arrivals, searches, strict=True):
            yield from [None] * pause
            yield search

    cancelled: set[int] = set()
    finished: set[int] = set()
    for search in decoder.run(source(), batch_size, chunk):
        if search is None:
            continue
        assert id(search) not in finished
        if search.done and id(search) not in cancelled:
            finished.add(id(search))
        if data.draw(st.integers(0, 9)) == 0:
            victim = data.draw(st.sampled_from(searches))
            if id(victim) not in finished:
                victim.cancel()
                assert victim.done
                cancelled.add(id(victim))
    assert decoder._rows.used == 0
    for search, (_, request) in zip(searches, arrivals, strict=True):
        if id(search) not in cancelled:
            assert id(search) in finished
            assert results([search]) == run(HashingNetwork(), [request], 1), request
    # What the cache holds now is right, too.
    again = [request for _, request in arrivals]
    assert run(network, again, 2, decoder) == [run(HashingNetwork(), [request], 1)[0] for request in again]


BEGINNING = [*range(10), *range(10)]


@pytest.mark.parametrize(
    ("arriving", "chunk", "passes"),
    [
        # As many steps of the first as there are parts of the second, which then joins it.
        ([[1], [2] * 20], 6, [(1, 1), (1, 1), (1, 6), (1, 1), (1, 6), (1, 1), (1, 6), (1, 1), (1, 2), (2, 1)]),
        # Alone, it is read at once.
        ([[2] * 20], 6, [(1, 20), (1, 1)]),
        # Many short prompts don't stall the first one either.
        ([[0] * 10, None, None, *([index] * 10 for index in range(1, 8))], 32,
         [(1, 10), (1, 1), (3, 10), (4, 1), (3, 10), (7, 1), (1, 10)]),
        # Each begins like the first, and is read from there; a pass counts as 16 tokens at least.
        ([[*BEGINNING, 0], None, *([*BEGINNING, index] for index in range(1, 8))], 32,
         [(1, 21), (1, 1), (2, 1), (1, 1), (4, 1), (2, 1), (1, 1), (7, 1)]),
    ],
)  # fmt: skip
def test_prompts_are_read_between_steps(
    arriving: list[list[int] | None], chunk: int, passes: list[tuple[int, int]]
) -> None:
    network = HashingNetwork()
    searches = [None if prompt is None else begin(prompt, {"max_new_tokens": 12}) for prompt in arriving]
    list(Scheduler(network).run(searches, 8, chunk))
    assert network.passes[: len(passes)] == passes


def test_no_more_are_taken_than_may_be_read_now() -> None:
    network = HashingNetwork()
    asked: list[int] = []

    def source() -> Iterator[Strategy | None]:
        for index in range(7):
            asked.append(len(network.passes))
            yield begin([index] * 10, {"max_new_tokens": 12})

    list(Scheduler(network).run(source(), 8, chunk=32))
    assert network.passes[:4] == [(4, 10), (4, 1), (3, 10), (7, 1)]
    assert asked == [0, 0, 0, 0, 2, 2, 2]


def test_nothing_waits_is_not_the_end() -> None:
    """A None lets what runs take a step; where nothing runs, the source is asked again."""
    network = HashingNetwork()
    asked = []

    def source() -> Iterator[Strategy | None]:
        yield begin([1], {"max_new_tokens": 3})
        for _ in range(6):
            asked.append(len(network.passes))
            yield None
        yield begin([2], {"max_new_tokens": 2})

    seen = list(Scheduler(network).run(source(), 2))
    assert [search is None for search in seen].count(True) == 6
    assert network.passes == [(1, 1)] * 5
    assert asked == [0, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("chunk", [None, 3])
def test_prompt_logprobs(tales_model: gpt2onnx.Model, chunk: int | None) -> None:
    """The log probabilities of a prompt's tokens are those of the same text scored, also where its beginning is in the cache."""
    text = "Once upon a time there was a little girl, and she had a dog."
    options = tales_model.generation_config.merged({"max_new_tokens": 30, "eos_token_id": -1})
    requests = [Request("Once upon a time there was a dog", options), Request(text, options, prompt_logprobs=2)]
    found = {}
    for request, generation in tales_model.follow(requests, 2, chunk):
        assert isinstance(generation, Generation)
        if generation.done:
            found[request.prompt] = generation.result()
    scored = tales_model.score(text)
    logprobs = found[text].prompt_logprobs
    assert [one.token_id for one in logprobs] == scored.token_ids[1:]
    assert [one.logprob for one in logprobs] == pytest.approx(scored.logprobs, abs=2e-5)
    assert all(len(one.top) == 2 and one.top[0][1] >= one.logprob - 1e-6 for one in logprobs)
    assert found[requests[0].prompt].prompt_logprobs is None
    assert found[text].text == tales_model.generate(text, max_new_tokens=30, eos_token_id=-1).text


def test_cancelled_request_leaves_the_others_alone(tales_model: gpt2onnx.Model) -> None:
    long = tales_model.generation_config.merged({"max_new_tokens": 60, "eos_token_id": -1})
    requests = [Request(text, long, id=index) for index, text in enumerate(("Once", "The old king", "A", "One day"))]
    bad = Request([VOCABULARY**9], long, id="bad")
    results: dict[Any, Any] = {}
    steps = 0
    for request, state in tales_model.follow([requests[0], bad, None, *requests[1:]], 3):
        if isinstance(state, Exception):
            results[request.id] = state
            continue
        if request.id == 1 and (steps := steps + 1) == 5:
            state.cancel()
        assert not (steps > 5 and request.id == 1)
        if state.done and request.id != 1:
            results[request.id] = state.result().text
    assert set(results) == {0, 2, 3, "bad"}
    for index in (0, 2, 3):
        assert results[index] == tales_model.generate(requests[index].prompt, max_new_tokens=60, eos_token_id=-1).text
    with pytest.raises(OptionError, match="batch_size"):
        next(tales_model.follow([], 0))
