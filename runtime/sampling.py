"""Random draws as PyTorch's CPU generator makes them, so that a seed gives transformers' tokens.

PyTorch's generator is MT19937, seeded as NumPy's legacy RandomState with the seed modulo 2**32.
`torch.multinomial` draws q ~ Exponential(1) for every entry and takes the largest p / q (the n largest,
without replacement). Each q takes two 32-bit words, the higher one first; the low 53 bits make u in
[0, 1), and q = -log1p(-u) in double precision, rounded to float32.
Source: ATen/native/Distributions.cpp, ATen/core/DistributionsHelper.h and CPUGeneratorImpl.cpp.
"""

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

_LOW_53_BITS = np.uint64(2**53 - 1)


class Generator:
    """The stream of random numbers of one prompt."""

    def __init__(self, seed: int | None) -> None:
        self._state = np.random.RandomState(None if seed is None else seed % 2**32)

    def multinomial(self, scores: Logits, count: int = 1) -> npt.NDArray[np.int64]:
        """Draws entries without replacement.

        Args:
            scores: unnormalised log probabilities, float32 [entries].
            count: how many to draw.

        Returns:
            Indices, int64 [count], in the order in which they were drawn.
        """
        words = self._state.randint(0, 2**32, size=(len(scores), 2), dtype=np.uint32)
        candidates = np.flatnonzero(scores > -np.inf)
        survivors = scores[candidates]
        probabilities = np.exp(survivors - survivors.max())
        probabilities /= probabilities.sum()
        high, low = words[candidates].astype(np.uint64).T
        uniform = ((high << np.uint64(32) | low) & _LOW_53_BITS) * 2.0**-53
        exponential = (-np.log1p(-uniform)).astype(np.float32)
        with np.errstate(divide="ignore"):
            race = probabilities / exponential
        if count == 1:
            return candidates[race.argmax(keepdims=True)]
        return candidates[largest(race, count)]

    def skip(self, entries: int) -> None:
        """Moves on as if one entry of so many had been drawn."""
        self._state.randint(0, 2**32, size=(entries, 2), dtype=np.uint32)


def largest(values: Logits, count: int) -> npt.NDArray[np.int64]:
    """Indices of the `count` largest values, the largest first; of equal ones the first."""
    count = min(count, len(values))
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= threshold)
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]


def log_softmax(scores: Logits) -> Logits:
    """Log probabilities along the last axis, float32."""
    shifted = scores - scores.max(-1, keepdims=True)
    result: Logits = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
