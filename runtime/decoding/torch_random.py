"""Random draws as PyTorch's CPU generator makes them, so that a seed gives transformers' tokens.

PyTorch's generator is MT19937, seeded as NumPy's legacy RandomState with the seed modulo 2**32.
`torch.multinomial` draws q ~ Exponential(1) for every entry and takes the largest p / q (the n largest,
without replacement). Each q takes two 32-bit words, the higher one first; the low 53 bits make u in
[0, 1), and q = -log1p(-u) in double precision, rounded to float32.
Source: ATen/native/Distributions.cpp, ATen/core/DistributionsHelper.h and CPUGeneratorImpl.cpp.
"""

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..arrays import Logits
from .torch_topk import largest

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_LOW_53_BITS = np.uint64(2**53 - 1)
_ROUNDING = np.float32(0.9999)  # wider than float32 rounds
_FEW = 256  # entries whose logarithms are all taken; of more, a bound finds the few that matter


@dataclass(frozen=True)
class Candidates:
    """The entries that may be drawn.

    Attributes:
        scores: unnormalised log probabilities of those that are left, float32 [left].
        indices: which they are, rising, int64 [left].
        entries: how many there were at first.
    """

    scores: Logits
    indices: Indices
    entries: int

    @classmethod
    def all(cls, scores: Logits) -> "Candidates":
        """Every entry, given their scores, float32 [entries]."""
        return cls(scores, _numbers(len(scores)), len(scores))

    @classmethod
    def joined(cls, parts: Sequence["Candidates"]) -> "Candidates":
        """Those of several parts with as many entries each, which are numbered on from part to part."""
        indices = [part.indices + number * part.entries for number, part in enumerate(parts)]
        scores = np.concatenate([part.scores for part in parts])
        return cls(scores, np.concatenate(indices), len(parts) * parts[0].entries)

    def keep(self, places: Indices) -> "Candidates":
        """Those at some places, rising, among the ones that are left."""
        return Candidates(self.scores[places], self.indices[places], self.entries)

    def only(self, indices: Indices) -> "Candidates":
        """Those of some entries that are left."""
        return self.keep(np.flatnonzero(np.isin(self.indices, indices)))

    def possible(self) -> "Candidates":
        """Those with any chance: minus infinity is the score of what is forbidden."""
        if self.scores.min(initial=np.inf) > -np.inf:
            return self
        return self.keep(np.flatnonzero(self.scores > -np.inf))

    def dense(self, out: float = -np.inf) -> Logits:
        """Scores of all entries, float32 [entries], with another one for those that are out."""
        if len(self.scores) == self.entries:
            return self.scores
        scores = np.full(self.entries, out, np.float32)
        scores[self.indices] = self.scores
        return scores


class Generator:
    """PyTorch's CPU generator: the stream of random numbers of one prompt.

    Args:
        seed: counts modulo 2**32.
    """

    def __init__(self, seed: int) -> None:
        words = np.random.MT19937()
        words.state = cast("Any", np.random.RandomState(seed % 2**32).get_state(legacy=False))
        self._generator = np.random.Generator(words)
        # Words that forks have drawn ahead, in order.
        self._ahead: deque[Words] = deque()

    def fork(self) -> "Generator":
        """A generator whose draws are those that come next here, at the same numbers of entries."""
        return _Fork(self)

    def multinomial(self, candidates: Candidates, count: int = 1) -> Indices:
        """Draws entries without replacement.

        Returns:
            Indices, int64 [count], in the order in which they were drawn.
        """
        entries, possible = candidates.entries, candidates.possible()
        if not len(possible.scores):  # transformers fails here; as greedy decoding does, go on with the first
            self.skip(entries)
            return largest(candidates.dense(), count)
        words = self._words(entries)
        if len(possible.scores) < entries:
            words = words[possible.indices]
        probabilities = softmax(possible.scores)
        if len(probabilities) > max(count, _FEW):
            finalists = _finalists(probabilities, words, count)
            possible, probabilities, words = possible.keep(finalists), probabilities[finalists], words[finalists]
        race = _race(probabilities, words)
        if np.count_nonzero(race) >= count:
            return possible.indices[[race.argmax()] if count == 1 else largest(race, count)]
        # Too few entries are possible, so impossible ones are drawn as well.
        return largest(replace(possible, scores=race).dense(0.0), count)

    def skip(self, entries: int) -> None:
        """Moves on as if one of `entries` entries had been drawn."""
        self._words(entries)

    def _words(self, entries: int) -> Words:
        """Two 32-bit words for each entry, the first one in the upper half."""
        return self._ahead.popleft() if self._ahead else self._draw(entries)

    def _draw(self, entries: int) -> Words:
        return self._generator.integers(0, 2**64, size=entries, dtype=np.uint64)


class _Fork(Generator):
    """Draws ahead of another generator, which then need not draw again."""

    def __init__(self, other: Generator) -> None:
        self._other, self._place = other, 0

    def _words(self, entries: int) -> Words:
        ahead = self._other._ahead
        if self._place == len(ahead):
            ahead.append(self._other._draw(entries))
        self._place += 1
        return ahead[self._place - 1]


@functools.lru_cache(maxsize=4)
def _numbers(count: int) -> Indices:
    """The numbers below `count`, which nobody changes."""
    numbers = np.arange(count)
    numbers.flags.writeable = False
    return numbers


def _race(probabilities: Logits, words: Words) -> Logits:
    """p / q of each entry, q from its words."""
    uniform = (words & _LOW_53_BITS).astype(np.float64) * 2.0**-53
    with np.errstate(divide="ignore"):
        exponential: Logits = (-np.log1p(-uniform)).astype(np.float32)
        return probabilities / exponential


def _finalists(probabilities: Logits, words: Words, count: int) -> Indices:
    """Entries among which are those of the `count` largest p / q.

    Few logarithms are taken: as q is at least u, p / u bounds p / q from above. All where fewer have any chance.
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
