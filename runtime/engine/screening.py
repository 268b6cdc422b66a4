"""Which logits are worth computing in full, and estimates of the others that are certain to be less.

Greedy search looks at the largest logit, sampling with top-k at the k largest; but the output head of GPT-2 small is a third
of all that a step reads from memory. With the head in 8 bits all logits are estimated, and those of the tokens whose
estimates are highest are computed again, in full. How far an estimate can be off is known (`Estimates.margin`): where the
k-th highest is so far above the lowest of those that were computed again that no other token can be among the k largest, the
k largest logits are exact, and all others are estimates that are less. The idea is that of candidates in SVD-softmax
(https://proceedings.neurips.cc/paper_files/paper/2017/hash/4e2a6330465c8ffcaa696a5a16639176-Abstract.html), but with a
certain bound.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
# Gives the rows of an output head from one number up to another, float32 [count, width].
Rows = Callable[[int, int], Array]

# So many tokens for each logit that has to be exact, and so many at the least: fewer often turn out not to be enough.
_FOR_EACH, _LEAST = 40, 256
# In one pass: to compute more logits one by one takes longer than all of them together.
_MOST = 2048
# Rows of the head at a time: what is computed of them stays in the processor's cache.
_AT_ONCE = 256
# Of so many rows these many show what the rows have in common.
_SAMPLED, _OF = 64, 1024
_LARGEST = 127
_EPSILON = np.float32(np.finfo(np.float32).eps)
_BLOCK_SIZES = 64, 32, 16


def block_size(width: int) -> int:
    """How many numbers of a row share a scale: a divisor of the width; 0 where there is none that will do."""
    return next((size for size in _BLOCK_SIZES if width % size == 0), 0)


def candidates(positions: int, certain: int | None, vocab_size: int) -> int:
    """How many logits to compute in full at each position; 0 for all of them.

    Args:
        positions: whose logits are wanted.
        certain: of how many largest logits the search needs the exact values; None for all.
        vocab_size: logits in all.
    """
    if certain is None:
        return 0
    count = max(_LEAST, _FOR_EACH * certain)
    return count if positions * count <= _MOST and count < vocab_size else 0


class RoundedHead(NamedTuple):
    """An output head in 8 bits.

    Attributes:
        rows: uint8 [vocabulary, blocks, size of a block]: 128 stands for 0.
        scales: what one step in a block is, float32 [vocabulary, blocks].
        bias: float32 [vocabulary].
    """

    rows: npt.NDArray[np.uint8]
    scales: Array
    bias: Array


@dataclass(frozen=True)
class Estimates:
    """How inputs are arranged for a rounded head, and how far off its products can be.

    With x the input and w a row of the head, x w = (x - mean) (w - common) + (x - mean) common + mean w. The first product is
    rounded, after one side was multiplied and the other divided by `balance`; the rest isn't.

    Attributes:
        mean: of the inputs, float32 [width].
        common: about the mean of the rows, float32 [width].
        balance: float32 [width].
        block_size: numbers that share a scale.
        error: what rounding a row changed, as a share of its length; the largest.
        longest: length of the longest rounded row.
        longest_row: of the head itself.
    """

    mean: Array
    common: Array
    balance: Array
    block_size: int
    error: np.float32
    longest: np.float32
    longest_row: np.float32

    def margin(self, states: Array, balanced: Array) -> Array:
        """By how much estimates for inputs [count, width] are off at most, float32 [count].

        By the inequality of Cauchy and Schwarz the error of a product is at most the length of one side times the length of
        what the other is off by: for the rows that is known; of the inputs MatMulNBits rounds each number by at most half
        a step, and a step is a 127th of its block's greatest number. Last, what sums of float32 may be off by in an estimate
        and in the logit itself.

        Args:
            states: the inputs.
            balanced: (states - mean) * balance, what the rounded rows are multiplied with.
        """
        peaks = np.abs(balanced).reshape(len(states), -1, self.block_size).max(-1)
        half_steps = np.float32(math.sqrt(self.block_size) / (2 * _LARGEST))
        share = self.error * _length(balanced) + half_steps * _length(peaks)
        lengths = self.longest_row * (_length(states) + _length(self.mean)) + self.longest * _length(balanced)
        return np.asarray(share * self.longest + lengths * np.float32(len(self.mean)) * _EPSILON, np.float32)


def round_head(
    rows: Rows, vocab_size: int, states: Array, block_size: int, threads: int = 1
) -> tuple[RoundedHead, Estimates]:
    """Rounds a head so that this costs little for inputs such as these.

    Args:
        rows: the head's.
        vocab_size: how many rows it has.
        states: float32 [count, width].
        block_size: numbers that share a scale; the width is a multiple.
        threads: that work on it.

    Returns:
        The head in 8 bits: its rows without `common`, divided by `balance`, and as bias mean w of each row. And how
        inputs are arranged for it.

    Raises:
        MemoryError: there isn't enough for the result, a fourth of the head.
    """
    width = states.shape[1]
    sample = np.concatenate([rows(at, min(at + _SAMPLED, vocab_size)) for at in range(0, vocab_size, _OF)])
    mean, common = states.mean(0), sample.mean(0)
    balance = np.sqrt(_spread(sample, common) / _spread(states, mean))
    data = np.empty((vocab_size, width // block_size, block_size), np.uint8)
    scales, bias = np.empty(data.shape[:2], np.float32), np.empty(vocab_size, np.float32)

    def fill(first: int) -> tuple[np.float32, np.float32, np.float32]:
        part = slice(first, min(first + _AT_ONCE, vocab_size))
        exact = rows(part.start, part.stop)
        bias[part] = exact @ mean
        squares = np.einsum("rw,rw->r", exact, exact)
        arranged = ((exact - common) / balance).reshape(len(exact), *data.shape[1:])
        steps = np.maximum(arranged.max(-1), -arranged.min(-1)) / np.float32(_LARGEST)
        steps[steps == 0] = 1
        values = np.rint(arranged / steps[..., None])
        np.add(values, 128, out=data[part], casting="unsafe")
        scales[part] = steps
        values *= steps[..., None]
        lengths = np.sqrt(np.einsum("rbk,rbk->r", values, values))
        arranged -= values
        errors = np.sqrt(np.einsum("rbk,rbk->r", arranged, arranged))
        return (errors / np.where(lengths > 0, lengths, 1)).max(), lengths.max(), squares.max()

    with ThreadPoolExecutor(threads) as pool:
        found = np.array(list(pool.map(fill, range(0, vocab_size, _AT_ONCE))))
    # Which is no number if one of them isn't, and then nothing is certain.
    error, longest, square = found.max(0)
    return RoundedHead(data, scales, bias), Estimates(
        mean, common, balance, block_size, error, longest, np.sqrt(square)
    )


def _spread(vectors: Array, mean: Array) -> Array:
    """The standard deviation along the first axis; where vectors are few or alike, a share of what their numbers are like."""
    least = np.maximum(np.float32(0.1) * np.median(np.abs(vectors)), _EPSILON)
    result: Array = np.maximum(np.sqrt(np.square(vectors - mean).mean(0)), least)
    return result


def _length(vectors: Array) -> Array:
    """The Euclidean length along the last axis."""
    result: Array = np.sqrt(np.square(vectors).sum(-1))
    return result
