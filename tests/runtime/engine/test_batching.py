"""Batches, prefix reuse, speculation and the cache, on a network whose logits follow from what the cache holds."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduling import CONTEXT, PROMPTS, REQUESTS, VOCABULARY, HashingNetwork, begin, results, run

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.runtime.arrays import CacheCopy
from gpt2onnx.runtime.decoding.start import start
from gpt2onnx.runtime.decoding.strategy import Strategy
from gpt2onnx.runtime.engine.kv_cache import KVCache
from gpt2onnx.runtime.engine.scheduler import Scheduler
from gpt2onnx.runtime.options import GenerationConfig
from gpt2onnx.runtime.requests import Request


@settings(max_examples=120)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=8), batch_size=st.integers(1, 5))
def test_batched_is_alone(requests: list[tuple[list[int], dict[str, Any]]], batch_size: int) -> None:
    together = run(HashingNetwork(), requests, batch_size)
    alone = [run(HashingNetwork(), [request], 1)[0] for request in requests]
    for index, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert one == other, f"request {index}: {requests[index]}"


@settings(max_examples=60)
@given(
    rounds=st.lists(st.lists(REQUESTS, min_size=1, max_size=3), min_size=1, max_size=5), batch_size=st.integers(1, 3)
)
def test_used_cache_is_as_good_as_fresh(rounds: list[Any], batch_size: int) -> None:
    network = HashingNetwork()
    decoder = Scheduler(network)
    for requests in rounds:
        assert run(network, requests, batch_size, decoder) == run(HashingNetwork(), requests, 1)


@settings(max_examples=100)
@given(
    prompt=PROMPTS, draft=st.integers(1, 8), length=st.integers(1, 25), end=st.sampled_from([-1, 3]),
    sampling=st.sampled_from([{}, {"do_sample": True, "seed": 5, "top_k": 2}, {"do_sample": True, "seed": 6}]),
)  # fmt: skip
def test_speculated_is_plain(prompt: list[int], draft: int, length: int, end: int, sampling: dict[str, Any]) -> None:
    options = {"max_new_tokens": length, "eos_token_id": end} | sampling
    plain, speculating = HashingNetwork(repetitive=True), HashingNetwork(repetitive=True)
    expected = run(plain, [(prompt, options)], 1)
    assert run(speculating, [(prompt, options | {"prompt_lookup": draft})], 1) == expected
    assert len(speculating.passes) <= len(plain.passes)


class LoopingNetwork(HashingNetwork):
    """Goes round: six tokens, one after another, over and over."""

    def logits(self, history: Sequence[int]) -> np.ndarray:
        logits = np.zeros(VOCABULARY, np.float32)
        logits[history[-1] % 6 + 1] = 20
        return logits


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.2, "seed": 1}], ids=str)
def test_speculation_saves_passes(sampling: dict[str, Any]) -> None:
    prompt = [1, 2, 3, 4, 5, 6] * 3
    plain, speculating = LoopingNetwork(), LoopingNetwork()
    run(plain, [(prompt, {"max_new_tokens": 22} | sampling)], 1)
    run(speculating, [(prompt, {"max_new_tokens": 22, "prompt_lookup": 4} | sampling)], 1)
    assert len(plain.passes) == 22
    # The prompt, four tokens, then five a pass: each draft is right, and one more token comes with it.
    assert speculating.passes == [(1, 18), (1, 4), (1, 5), (1, 5), (1, 5), (1, 2)]


@pytest.mark.parametrize("length", [1, 2, 10])
def test_passes(length: int) -> None:
    prompt = [1, 2, 3, 4, 5]
    for options, rows in (({}, 1), ({"do_sample": True, "seed": 1}, 1), ({"num_beams": 6}, 6), ({"num_beams": 3}, 3)):
        network = HashingNetwork()
        run(network, [(prompt, options | {"max_new_tokens": length})], 1)
        assert network.passes == [(1, 5)] + [(rows, 1)] * (length - 1)


@pytest.mark.parametrize(("prompt", "passes"), [(CONTEXT, 1), (CONTEXT - 2, 3)])
def test_no_pass_after_the_context_is_full(prompt: int, passes: int) -> None:
    network = HashingNetwork()
    (((tokens, reason),),) = run(network, [([1] * prompt, {"max_new_tokens": 5})], 1)
    assert (len(tokens), reason) == (CONTEXT + 1, "context")
    assert network.passes == [(1, prompt)] + [(1, 1)] * (passes - 1)


def test_no_pass_after_the_end_token() -> None:
    network = LoopingNetwork()
    (((tokens, reason),),) = run(network, [([1], {"max_new_tokens": 50, "eos_token_id": 5})], 1)
    assert (tokens, reason) == ([1, 2, 3, 4, 5], "stop")
    assert network.passes == [(1, 1)] * 4


def test_batch_stays_full() -> None:
    """Rows that finish give their place to the next prompt at once."""
    lengths = [3, 9, 4, 5, 2, 7, 6]
    network = HashingNetwork()
    run(network, [([index], {"max_new_tokens": length}) for index, length in enumerate(lengths)], 3)
    steps = [rows for rows, count in network.passes if count == 1][3:]  # after the first three prefills
    assert sum(rows * count for rows, count in network.passes) == sum(lengths)
    assert max(steps) == 3


def test_shared_beginning_is_prefilled_once() -> None:
    beginning = [1, 2, 3, 4, 5, 6] * 3
    network = HashingNetwork()
    run(network, [([*beginning, last], {"max_new_tokens": 4}) for last in range(4)], 4)
    assert network.passes[:2] == [(1, 19), (3, 1)]


def prompts(*lengths: int) -> list[list[int]]:
    """That begin with different tokens each."""
    return [[first, *range(length - 1)] for first, length in enumerate(lengths)]


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [
        # Each takes those along that are about as long, as far as 128 tokens go.
        ([9, 30, 8, 7, 29], [(3, 9), (2, 30)]),
        ([30, 30, 30, 30, 30], [(4, 30), (1, 30)]),
        ([2, 30, 2], [(2, 2), (1, 30)]),
        ([12, 16, 20, 24], [(4, 24)]),
        ([12, 17, 22, 28], [(3, 22), (1, 28)]),
        ([70, 70], [(1, 70), (1, 70)]),
    ],
)
def test_short_prompts_of_about_one_length_are_read_together(lengths: list[int], passes: list[tuple[int, int]]) -> None:
    network = HashingNetwork(vocabulary=80)
    requests = [(prompt, {"max_new_tokens": 2}) for prompt in prompts(*lengths)]
    searches = [start(np.array(prompt), GenerationConfig(**options), 100) for prompt, options in requests]
    done = [search for search in Scheduler(network).run(searches, 8) if search is not None and search.done]
    assert network.passes == [*passes, (len(lengths), 1)]
    assert len(done) == len(searches)
    for (prompt, options), search in zip(requests, searches, strict=True):
        alone = start(np.array(prompt), GenerationConfig(**options), 100)
        list(Scheduler(HashingNetwork(vocabulary=80)).run([alone]))
        assert results([search]) == results([alone])


def test_prompts_are_read_together_only_as_far_as_running_texts_can_wait() -> None:
    """In parts of 20 tokens, while one runs; several sequences of a prompt are read by themselves."""
    network = HashingNetwork()
    running = start(np.array([12]), GenerationConfig(max_new_tokens=9), CONTEXT)
    short = [start(np.array(each), GenerationConfig(max_new_tokens=1), CONTEXT) for each in prompts(9, 9, 9)]
    three = GenerationConfig(max_new_tokens=1, do_sample=True, seed=1, num_return_sequences=3)
    several = [start(np.array(each), three, CONTEXT) for each in ([5, 9, 9, 9], [6, 9, 9, 9])]

    def arriving() -> Iterator[Strategy | None]:
        yield running
        yield None
        yield None
        yield from short
        yield None
        yield from several

    for _ in Scheduler(network).run(arriving(), 8, chunk=20):
        pass
    between = [list(group) for one, group in groupby(network.passes, lambda shape: shape == (1, 1)) if not one]
    assert between == [[(2, 9)], [(1, 9)], [(1, 4)], [(1, 4)]]
    assert all(search.done for search in (running, *short, *several))


def test_memory_is_taken_once_for_all_that_wait() -> None:
    """A longer text that waits has its room from the start; where that doesn't fit, the first one doesn't wait for it."""
    made: list[tuple[int, int]] = []

    class Recording(HashingNetwork):
        def new_cache(self, rows: int, positions: int) -> KVCache:
            made.append((rows, positions))
            if positions > most:
                raise OptionError("no memory")
            return super().new_cache(rows, positions)

    requests = [([1], {"max_new_tokens": 3}), ([2], {"max_new_tokens": 100}), ([3], {"max_new_tokens": 3})]
    most = 1000
    expected = [start(np.array(prompt), GenerationConfig(**options), 200) for prompt, options in requests]
    for _ in Scheduler(Recording()).run(expected, 3):
        pass
    assert made[1:] == [(3, 128)]
    made.clear()
    most = 64
    first = start(np.array([1, 2] * 40), GenerationConfig(max_new_tokens=40), 200)
    second = start(np.array([1]), GenerationConfig(max_new_tokens=40), 200)
    for _ in Scheduler(Recording()).run([second, first], 2):
        pass
    assert second.done
    assert second.error is None
    assert "no memory" in str(first.error)
    assert made[1:3] == [(2, 128), (2, 64)]


def test_the_old_cache_makes_room_for_a_larger_one() -> None:
    """Both at once are more than there is. A prompt that doesn't fit even alone is refused, and the others go on."""

    class Small(HashingNetwork):
        def new_cache(self, rows: int, positions: int) -> KVCache:
            if scheduler and rows + scheduler[0]._rows.cache.rows > 5:
                raise OptionError("no memory")
            return super().new_cache(rows, positions)

    scheduler: list[Scheduler] = []
    network = Small()
    scheduler.append(Scheduler(network))
    requests: list[tuple[list[int], dict[str, Any]]] = [
        ([1, 2], {"max_new_tokens": 3, "num_beams": 2}),
        ([1, 2], {"max_new_tokens": 3, "num_beams": 4}),
        ([3], {"max_new_tokens": 3, "num_beams": 6}),
        ([4], {"max_new_tokens": 3}),
    ]
    searches = [begin(*request) for request in requests]
    for _ in scheduler[0].run(searches, 1):
        pass
    assert [search.error is None for search in searches] == [True, True, False, True]
    del requests[2], searches[2]
    assert results(searches) == run(HashingNetwork(), requests, 1)
    # Prompts that fit one by one, but not together.
    together = [begin([token], {"max_new_tokens": 3}) for token in range(8)]
    for _ in scheduler[0].run(together, 8):
        pass
    assert results(together) == run(HashingNetwork(), [([token], {"max_new_tokens": 3}) for token in range(8)], 1)


@pytest.mark.parametrize("beams", [1, 3])
def test_an_interrupt_while_rows_are_copied_leaves_no_wrong_one(beams: int) -> None:
    class Interrupted(KVCache):
        def copy(self, copies: Sequence[CacheCopy]) -> None:
            super().copy(copies)
            if copies and interrupting:
                raise KeyboardInterrupt

    network = HashingNetwork(cache=Interrupted)
    decoder = Scheduler(network)
    requests = [([1, 2, 3, first, 4, 5], {"max_new_tokens": 6, "num_beams": beams}) for first in (6, 7, 8)]
    interrupting = False
    run(network, requests, 3, decoder)
    interrupting, interrupted = True, 0
    for request in [*requests, *requests[::-1]] * 2:
        try:
            run(network, [request], 1, decoder)
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted
    interrupting = False
    for request in requests:
        assert run(network, [request], 1, decoder) == run(HashingNetwork(), [request], 1)


def test_reset_leaves_rows_in_use() -> None:
    network = HashingNetwork()
    decoder = Scheduler(network)
    run(network, [([1, 2, 3, 4], {"max_new_tokens": 3}), ([5, 6, 7], {"max_new_tokens": 3})], 2, decoder)
    (search,) = searches = [begin([1, 2, 3, 4], {"max_new_tokens": 8})]
    steps = decoder.run(searches)
    next(steps)
    decoder.reset()
    assert [len(held) > 0 for held in decoder._rows.held] == [True, False]
    list(steps)
    assert results(searches) == run(HashingNetwork(), [([1, 2, 3, 4], {"max_new_tokens": 8})], 1)
    assert search.done


def test_finished_rows_are_not_moved() -> None:
    """Texts that end together leave nothing to rearrange."""
    copied: list[CacheCopy] = []

    class Recording(KVCache):
        def copy(self, copies: Sequence[CacheCopy]) -> None:
            copied.extend(copies)
            super().copy(copies)

    run(HashingNetwork(cache=Recording), [([first, 1, 2], {"max_new_tokens": 5}) for first in range(5)], 5)
    assert copied == []


def test_session_prefills_only_what_is_new() -> None:
    network = HashingNetwork()
    decoder = Scheduler(network)
    text = [1, 2, 3]
    for added in ([7, 8], [9], [4, 5, 6]):
        for strategy in ({}, {"do_sample": True, "seed": 2}):
            network.passes.clear()
            (((tokens, _),),) = run(network, [(text, {"max_new_tokens": 5} | strategy)], 1, decoder)
        network.passes.clear()
        run(network, [(tokens + added, {"max_new_tokens": 1})], 1, decoder)
        # The last generated token wasn't forwarded, as nothing followed it.
        assert network.passes == [(1, len(added) + 1)]
        text = tokens + added


def test_abandoned_run_leaves_nothing_behind() -> None:
    network = HashingNetwork()
    decoder = Scheduler(network)
    requests = [([1, 2], {"max_new_tokens": 9, "num_beams": 3}), ([3], {"max_new_tokens": 9})]
    for steps in range(1, 8):
        searches = [start(np.array(prompt), GenerationConfig(**options), CONTEXT) for prompt, options in requests]
        running = decoder.run(searches, 2)
        for _ in range(steps):
            next(running)
        inside = run(network, requests, 2, decoder)  # while the other is still open
        running.close()
        assert inside == run(network, requests, 2, decoder) == run(HashingNetwork(), requests, 1)


@settings(max_examples=100)
@given(data=st.data())
def test_cache_against_lists(data: st.DataObject) -> None:
    """Every operation of the cache, against a model that keeps each row's list of tokens."""
    rows, positions = 4, 12
    cache = KVCache((2, 2, rows, 1, positions, 1))
    lists: list[list[int]] = [[] for _ in range(rows)]
    for _ in range(data.draw(st.integers(1, 15))):
        match data.draw(st.sampled_from(["advance", "trim", "copy", "grow"])):
            case "advance":
                first = data.draw(st.integers(0, rows - 1))
                last = data.draw(st.integers(first + 1, rows))
                counts = np.array(data.draw(st.lists(st.integers(0, 3), min_size=last - first, max_size=last - first)))
                if max(len(one) + count for one, count in zip(lists[first:last], counts, strict=True)) > positions:
                    continue
                past = cache.advance(slice(first, last), counts)
                assert past.tolist() == [len(one) for one in lists[first:last]]
                for row, begin, count in zip(range(first, last), past, counts.tolist(), strict=True):
                    new = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
                    cache.data[:, :, row, 0, begin : begin + count, 0] = np.array(new)
                    lists[row] += new
            case "trim":
                row = data.draw(st.integers(0, rows - 1))
                length = data.draw(st.integers(0, len(lists[row])))
                cache.trim(row, length)
                del lists[row][length:]
            case "copy":
                sources = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
                copies = []
                for target, source in enumerate(sources):
                    shared = 0
                    while shared < min(len(lists[source]), len(lists[target])) and lists[source][shared] == lists[target][shared]:  # fmt: skip
                        shared += 1
                    copies.append(CacheCopy(source, target, data.draw(st.integers(0, shared)), len(lists[source])))
                cache.copy([one for one in copies if one.source != one.target])
                lists = [lists[source].copy() for source in sources]
            case "grow":
                positions += 2
                larger = KVCache((2, 2, rows, 1, positions, 1))
                larger.take_over(cache)
                cache = larger
        for row, expected in enumerate(lists):
            assert cache.lengths[row] == len(expected)
            for layer in range(2):
                for part in range(2):
                    assert cache.data[layer, part, row, 0, : len(expected), 0].tolist() == expected


MIXED: list[dict[str, Any]] = [
    {}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "seed": 3, "temperature": 0.9},
    {"do_sample": True, "seed": 4, "num_return_sequences": 3}, {"num_beams": 3, "do_sample": True, "seed": 5},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3}, {"prompt_lookup": 4}, {"stop": ["."]},
]  # fmt: skip


Mixed = tuple[list[Request], dict[Any, Any]]


@pytest.fixture(scope="module")
def mixed(tales_model: gpt2onnx.Model) -> Mixed:
    """Requests of all kinds, and what each gives alone in a model that did nothing before."""
    texts = ["Once upon a time", "The", "One day, a little girl went to the park with her", "Once upon a time there"]
    requests = [
        Request(
            texts[index % 4],
            tales_model.generation_config.merged({"max_new_tokens": 4 + 3 * (index % 5)} | MIXED[index % 8]),
            index,
        )
        for index in range(12)
    ]
    alone = {}
    for request in requests:
        ((_, alone[request.id]),) = gpt2onnx.load(tales_model.bundle.folder, threads=1).complete([request])
    return requests, alone


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_mixed_strategies_on_tales(tales_model: gpt2onnx.Model, mixed: Mixed, batch_size: int) -> None:
    requests, alone = mixed
    together = {request.id: outcome for request, outcome in tales_model.complete(requests, batch_size)}
    for request in requests:
        for one, other in zip(together[request.id].sequences, alone[request.id].sequences, strict=True):
            assert (one.score or 0) == pytest.approx(other.score or 0, rel=1e-4)
            assert replace(one, score=None) == replace(other, score=None), request
