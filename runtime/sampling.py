"""Random draws as PyTorch's CPU generator makes them, so that a seed gives transformers' tokens.

PyTorch's generator is MT19937, seeded as NumPy's legacy RandomState with the seed modulo 2**32.
`torch.multinomial` draws q ~ Exponential(1) for every entry and takes the largest p / q (the n largest,
without replacement). Each q takes two 32-bit words, the higher one first; the low 53 bits make u in
[0, 1), and q = -log1p(-u) in double precision, rounded to float32.
Source: ATen/native/Distributions.cpp, ATen/core/DistributionsHelper.h and CPUGeneratorImpl.cpp.
"""

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from .topk import largest

Logits = npt.NDArray[np.float32]

_LOW_53_BITS = np.uint64(2**53 - 1)
_ROUNDING = 0.9999  # wider than float32 rounds


class Generator:
    """The stream of random numbers of one prompt."""

    def __init__(self, seed: int | None) -> None:
        words = np.random.MT19937()
        if seed is not None:
            words.state = cast("Any", np.random.RandomState(seed % 2**32).get_state(legacy=False))
        self._draws = np.random.Generator(words)

    def multinomial(self, scores: Logits, count: int = 1) -> npt.NDArray[np.int64]:
        """Draws entries without replacement.

        Args:
            scores: unnormalised log probabilities, float32 [entries].
            count: how many to draw.

        Returns:
            Indices, int64 [count], in the order in which they were drawn.
        """
        words = self._words(len(scores))
        candidates = np.flatnonzero(scores > -np.inf)
        if not len(candidates):  # transformers fails here; as greedy decoding does, go on with the first
            return largest(scores, count)
        probabilities = softmax(scores[candidates])
        uniform = (words[candidates] & _LOW_53_BITS).astype(np.float64) * 2.0**-53
        with np.errstate(divide="ignore"):
            if count == 1:
                return candidates[[_winner(probabilities, uniform)]]
            race = _race(probabilities, uniform)
        if np.count_nonzero(race) >= count:
            return candidates[largest(race, count)]
        # Too few entries are possible, so impossible ones are drawn as well.
        whole_race = np.zeros(len(scores), np.float32)
        whole_race[candidates] = race
        return largest(whole_race, count)

    def skip(self, entries: int) -> None:
        """Moves on as if one entry of so many had been drawn."""
        self._words(entries)

    def _words(self, entries: int) -> npt.NDArray[np.uint64]:
        """Two 32-bit draws for each entry, the first one in the upper half."""
        return self._draws.integers(0, 2**64, size=entries, dtype=np.uint64)


def _race(probabilities: Logits, uniform: npt.NDArray[np.float64]) -> Logits:
    """p / q of each entry."""
    exponential: Logits = (-np.log1p(-uniform)).astype(np.float32)
    return probabilities / exponential


def _winner(probabilities: Logits, uniform: npt.NDArray[np.float64]) -> int:
    """The entry of the largest p / q, with few logarithms taken: as q is at least u, p / u bounds p / q from above."""
    bound = probabilities / uniform
    leader = int(bound.argmax())
    won = _race(probabilities[leader : leader + 1], uniform[leader : leader + 1])[0]
    rivals = np.flatnonzero(bound >= won * _ROUNDING)
    return int(rivals[_race(probabilities[rivals], uniform[rivals]).argmax()])


def log_softmax(scores: Logits) -> Logits:
    """Log probabilities along the last axis, float32."""
    result: Logits = scores - scores.max(-1, keepdims=True)
    result -= np.log(np.exp(result).sum(-1, keepdims=True))
    return result


def softmax(scores: Logits) -> Logits:
    """Probabilities, float32 [entries]."""
    probabilities: Logits = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    return probabilities
