"""Random draws as PyTorch's CPU generator makes them, so that a seed gives transformers' tokens.

PyTorch's generator is MT19937, seeded as NumPy's legacy RandomState with the seed modulo 2**32.
`torch.multinomial` draws q ~ Exponential(1) for every entry and takes the largest p / q (the n largest,
without replacement). Each q takes two 32-bit words, the higher one first; the low 53 bits make u in
[0, 1), and q = -log1p(-u) in double precision, rounded to float32.
Source: ATen/native/Distributions.cpp, ATen/core/DistributionsHelper.h and CPUGeneratorImpl.cpp.
"""

import numpy as np
import numpy.typing as npt

from .mersenne import MersenneTwister
from .topk import largest

Logits = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]

_LOW_53_BITS = np.uint64(2**53 - 1)
_ROUNDING = np.float32(0.9999)  # wider than float32 rounds


class Generator:
    """The stream of random numbers of one prompt."""

    def __init__(self, seed: int | None) -> None:
        self._words = MersenneTwister(seed)

    def multinomial(self, scores: Logits, count: int = 1) -> npt.NDArray[np.int64]:
        """Draws entries without replacement.

        Args:
            scores: unnormalised log probabilities, float32 [entries].
            count: how many to draw.

        Returns:
            Indices, int64 [count], in the order in which they were drawn.
        """
        candidates = np.flatnonzero(scores > -np.inf)
        if not len(candidates):  # transformers fails here; as greedy decoding does, go on with the first
            self.skip(len(scores))
            return largest(scores, count)
        words = self._words.pairs(len(scores), candidates)
        probabilities = softmax(scores[candidates])
        if len(candidates) >= count:
            finalists = _finalists(probabilities, words, count)
            race = _race(probabilities[finalists], words[finalists])
            if np.count_nonzero(race) >= count:
                return candidates[finalists[[race.argmax()] if count == 1 else largest(race, count)]]
        # Too few entries are possible, so impossible ones are drawn as well.
        whole_race = np.zeros(len(scores), np.float32)
        whole_race[candidates] = _race(probabilities, words)
        return largest(whole_race, count)

    def skip(self, entries: int) -> None:
        """Moves on as if one entry of so many had been drawn."""
        self._words.skip(entries)


def _race(probabilities: Logits, words: Words) -> Logits:
    """p / q of each entry, q from its words."""
    uniform = (words & _LOW_53_BITS).astype(np.float64) * 2.0**-53
    with np.errstate(divide="ignore"):
        exponential: Logits = (-np.log1p(-uniform)).astype(np.float32)
        return probabilities / exponential


def _finalists(probabilities: Logits, words: Words, count: int) -> npt.NDArray[np.int64]:
    """Entries among which are those of the `count` largest p / q.

    Few logarithms are taken: as q is at least u, p / u bounds p / q from above.
    """
    uniform = (words & _LOW_53_BITS).astype(np.float32)
    uniform *= np.float32(2.0**-53)
    with np.errstate(divide="ignore"):
        bound = probabilities / uniform
    leaders = np.array([bound.argmax()]) if count == 1 else np.argpartition(bound, -count)[-count:]
    slowest = _race(probabilities[leaders], words[leaders]).min()
    return np.flatnonzero(bound >= slowest * _ROUNDING)


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
