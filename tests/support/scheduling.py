"""A network that costs nothing, and requests to it, for tests of what the decoding loop does with them.

The keys in its cache are the very tokens, and its logits are drawn by a hash of all of them: a row that reads a wrong,
stale or moved position gets other tokens.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from gpt2onnx.runtime.decoding.start import start
from gpt2onnx.runtime.decoding.strategy import Strategy
from gpt2onnx.runtime.engine.kv_cache import KVCache
from gpt2onnx.runtime.engine.scheduler import Scheduler
from gpt2onnx.runtime.options import GenerationConfig

VOCABULARY = 13
CONTEXT = 40
# Logits, noise and hidden states, as many as there are hashes: drawing them anew each time would take most of the tests' time.
_HASHES = 4096
_LOGITS, _NOISE = np.random.default_rng(0).normal(size=(2, _HASHES, 128))
_HIDDEN = np.random.default_rng(1).normal(size=(_HASHES, 4))


class HashingNetwork:
    """Logits from the row's tokens as they stand in the cache; counts forwarded tokens as (rows, tokens in each).

    Args:
        repetitive: only the last two tokens count, so that the text repeats itself.
        noise: is added to the logits, as by a network of lower precision; 0 for none.
        vocabulary: number of tokens.
        cache: kind of its caches.
    """

    def __init__(
        self, repetitive: bool = False, noise: float = 0, vocabulary: int = VOCABULARY, cache: type[KVCache] = KVCache
    ) -> None:
        self.passes: list[tuple[int, int]] = []
        self.repetitive, self.noise, self.vocabulary, self.cache = repetitive, noise, vocabulary, cache
        self.hidden = np.zeros((0, 4))

    def new_cache(self, rows: int, positions: int) -> KVCache:
        cache = self.cache((1, 2, rows, 1, positions, 1), np.float64)
        cache.data[:] = -7.0  # nobody should read it
        return cache

    def forward(
        self,
        cache: KVCache,
        rows: slice,
        tokens: np.ndarray,
        counts: np.ndarray,
        logits: str = "last",
    ) -> np.ndarray:
        assert tokens.shape == (rows.stop - rows.start, counts.max())
        self.passes.append(tokens.shape)
        past, found, hidden = cache.advance(rows, counts), [], []
        for row, new, begin, count in zip(range(rows.start, rows.stop), tokens, past, counts, strict=True):
            cache.data[0, 0, row, 0, begin : begin + count, 0] = new[:count]
            held = cache.data[0, 0, row, 0, : begin + count, 0].astype(int).tolist()
            wanted = range(begin, begin + count)[-1 if logits == "last" else 0 :]
            found += [self.logits(held[: position + 1]) for position in wanted]
            hidden += [_HIDDEN[_hash(held[: position + 1])] for position in wanted]
        self.hidden = np.array(hidden)
        return np.array(found)

    def logits(self, history: Sequence[int]) -> np.ndarray:
        place = _hash(history[-2:] if self.repetitive else history)
        logits = 2 * _LOGITS[place, : self.vocabulary] + self.noise * _NOISE[place, : self.vocabulary]
        return logits.astype(np.float32)


def _hash(tokens: Sequence[int]) -> int:
    return zlib.crc32(bytes(tokens)) % _HASHES


def begin(prompt: list[int], given: dict[str, Any]) -> Strategy:
    options = GenerationConfig(**given)
    negative = None if options.negative_prompt is None else np.array(options.negative_prompt)
    return start(np.array(prompt), options, CONTEXT, negative=negative)


def results(searches: Sequence[Strategy]) -> list[list[tuple[list[int], str | None]]]:
    return [[(one.tokens.tolist(), one.finish_reason) for one in search.continuations()] for search in searches]


def run(
    network: HashingNetwork, requests: Sequence[tuple[list[int], dict[str, Any]]], batch_size: int, decoder: Scheduler | None = None
) -> list[list[tuple[list[int], str | None]]]:  # fmt: skip
    searches = [begin(*request) for request in requests]
    decoder = decoder or Scheduler(network)
    finished = [search for search in decoder.run(searches, batch_size) if search is not None and search.done]
    assert {id(search) for search in finished} == {id(search) for search in searches}
    return results(searches)


PROMPTS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8)
STRATEGIES = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"do_sample": st.just(True), "seed": st.integers(0, 99), "num_return_sequences": st.integers(1, 3)}),
    st.fixed_dictionaries({"do_sample": st.just(True), "seed": st.integers(0, 99), "top_k": st.sampled_from([0, 1, 2, 5])}),
    st.fixed_dictionaries({"do_sample": st.booleans(), "seed": st.just(1), "top_k": st.just(2), "repetition_penalty": st.just(9.0)}),
    st.fixed_dictionaries({"num_beams": st.integers(2, 5), "early_stopping": st.sampled_from([True, False, "never"])}),
    st.fixed_dictionaries({"penalty_alpha": st.sampled_from([0.1, 0.6]), "top_k": st.integers(2, 5)}),
    st.fixed_dictionaries({"num_beams": st.just(6), "num_beam_groups": st.sampled_from([2, 3, 6]), "diversity_penalty": st.just(1.0)}),
    st.fixed_dictionaries({"guidance_scale": st.just(1.5), "negative_prompt": st.none() | PROMPTS}),
    st.fixed_dictionaries({"guidance_scale": st.just(1.5), "negative_prompt": PROMPTS, "num_beams": st.integers(2, 3)}),
    st.fixed_dictionaries({"num_beams": st.integers(2, 3), "do_sample": st.just(True), "seed": st.integers(0, 99)}),
)  # fmt: skip
REQUESTS = st.tuples(
    PROMPTS,
    st.builds(
        lambda strategy, length, ends: strategy | {"max_new_tokens": length, "eos_token_id": ends},
        STRATEGIES,
        st.integers(1, 12),
        st.sampled_from([-1, 3, [1, 5], [0, 2, 4, 6]]),
    ),
)
