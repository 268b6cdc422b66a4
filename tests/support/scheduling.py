"""A network that costs nothing, and requests to it, for tests of what the decoding loop does with them.

The keys in its cache are the very tokens, and each logit is a hash of all of them: a row that reads a wrong, stale or
moved position gets other tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from gpt2onnx.runtime.decoding.strategy import Search, start
from gpt2onnx.runtime.engine.kv_cache import Cache
from gpt2onnx.runtime.engine.scheduler import Decoder
from gpt2onnx.runtime.options import GenerationConfig

VOCABULARY = 13
CONTEXT = 40


class HashingNetwork:
    """Logits from the row's tokens as they stand in the cache; counts forwarded tokens as (rows, tokens in each).

    Where not all logits have to be certain, others may be wrong, though less than those.
    """

    def __init__(self, repetitive: bool = False, estimates: bool = False) -> None:
        self.passes: list[tuple[int, int]] = []
        self.repetitive, self.estimates = repetitive, estimates

    def new_cache(self, rows: int, positions: int) -> Cache:
        cache = Cache((1, 2, rows, 1, positions, 1), np.float64)
        cache.data[:] = -7.0  # what nobody should read
        return cache

    def forward(
        self,
        cache: Cache,
        rows: slice,
        tokens: np.ndarray,
        keep: int = 1,
        lengths: np.ndarray | None = None,
        certain: int | None = None,
    ) -> np.ndarray:
        assert tokens.shape[0] == rows.stop - rows.start
        assert tokens.shape[1] == 1 or tokens.shape[0] == 1 or (lengths is not None and not cache.lengths[rows].any())
        self.passes.append(tokens.shape)
        positions = cache.advance(rows, tokens.shape[1], lengths)
        logits = np.empty((*tokens.shape, VOCABULARY), np.float32)
        for index, row in enumerate(range(rows.start, rows.stop)):
            cache.data[0, 0, row, 0, positions[index], 0] = tokens[index]
            used = positions[index, -1] + 1 if lengths is None else lengths[index]
            assert cache.mask[row].sum() == cache.lengths[row] == used
            assert cache.mask[row, : cache.lengths[row]].all()
            for column, position in enumerate(positions[index]):
                logits[index, column] = self.logits(cache.data[0, 0, row, 0, : position + 1, 0].astype(int).tolist())
        if self.estimates and certain is not None and certain < VOCABULARY:
            least = np.sort(logits, axis=-1)[..., -certain, None]
            logits = np.where(logits < least, least - 0.01 - np.abs(logits) % 1, logits)
        if lengths is not None:
            assert keep == 1
            return logits[np.arange(len(tokens)), lengths - 1][:, None]
        return logits[:, -keep:]

    def logits(self, history: Sequence[int]) -> np.ndarray:
        seen = tuple(history[-2:]) if self.repetitive else tuple(history)
        return np.random.default_rng([token + 100 for token in seen]).normal(0, 2, VOCABULARY).astype(np.float32)


def results(searches: Sequence[Search]) -> list[list[tuple[list[int], str | None]]]:
    return [[(one.tokens.tolist(), one.finish_reason) for one in search.continuations()] for search in searches]


def run(
    network: HashingNetwork, requests: Sequence[tuple[list[int], dict[str, Any]]], batch_size: int, decoder: Decoder | None = None
) -> list[list[tuple[list[int], str | None]]]:  # fmt: skip
    searches = [start(np.array(prompt), GenerationConfig(**options), CONTEXT) for prompt, options in requests]
    decoder = decoder or Decoder(network)
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
