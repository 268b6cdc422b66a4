"""Logits processors: what makes some next tokens more or less likely, in transformers' order and with its semantics.

A processor is a function `(tokens, scores) -> scores` over one sequence: its tokens so far, prompt
included, int64 [length], and float32 scores [vocabulary]. It returns a new array where it changes
anything and never writes to its argument. To add one: write its factory, and name it in `processors`.
Semantics: transformers, src/transformers/generation/logits_process.py, the class named in each factory.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .options import GenerationConfig
from .sampling import Logits, log_softmax, softmax
from .topk import ascending, best, largest

Tokens = npt.NDArray[np.int64]
Processor = Callable[[Tokens, Logits], Logits]

_FEW = 512  # entries sorted at first where only the best are needed
_SAFELY = 1.0001  # far more than rounding changes a sum of probabilities


def processors(options: GenerationConfig, prompt_length: int) -> list[Processor]:
    """The processors that the options ask for, in the order in which transformers applies them."""
    chain: list[Processor] = []
    ends = options.eos_token_ids
    if options.repetition_penalty != 1.0:
        chain.append(repetition_penalty(options.repetition_penalty))
    if options.no_repeat_ngram_size > 0:
        chain.append(no_repeat_ngram(options.no_repeat_ngram_size))
    if options.bad_words_ids:
        chain.append(bad_words(options.bad_words_ids, ends))
    if options.min_length > 0 and ends:
        chain.append(min_length(options.min_length, ends))
    if options.min_new_tokens is not None and options.min_new_tokens > 0 and ends:
        chain.append(min_length(prompt_length + options.min_new_tokens, ends))
    if options.suppress_tokens:
        chain.append(suppress(options.suppress_tokens))
    if not options.do_sample:
        return chain
    # A beam needs a candidate that doesn't end it, besides one for each end token.
    keep = 1 if options.num_beams == 1 else max(2, len(ends) + 1)
    if options.temperature != 1.0:
        chain.append(temperature(options.temperature))
    if options.top_k != 0:
        chain.append(top_k(options.top_k, keep))
    if options.top_p < 1.0:
        chain.append(top_p(options.top_p, keep))
    if options.min_p is not None:
        chain.append(min_p(options.min_p, keep))
    if options.typical_p < 1.0:
        chain.append(typical_p(options.typical_p, keep))
    return chain


def process(chain: Sequence[Processor], tokens: Tokens, scores: Logits) -> Logits:
    """Applies processors one after another."""
    for processor in chain:
        scores = processor(tokens, scores)
    return scores


def repetition_penalty(penalty: float) -> Processor:
    """Divides positive scores of tokens seen before by the penalty, multiplies negative ones (RepetitionPenaltyLogitsProcessor)."""
    factor = np.float32(penalty)

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        seen = scores[tokens]
        result = scores.copy()
        result[tokens] = np.where(seen < 0, seen * factor, seen / factor)
        return result

    return processor


def no_repeat_ngram(size: int) -> Processor:
    """Forbids tokens that would complete an n-gram seen before (NoRepeatNGramLogitsProcessor)."""

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        if len(tokens) < size:
            return scores
        # Where the last size - 1 tokens stood before, what followed them is forbidden.
        ends = np.arange(len(tokens)) if size == 1 else np.flatnonzero(tokens[size - 2 : -1] == tokens[-1]) + size - 1
        for offset in range(2, size):
            ends = ends[tokens[ends - offset] == tokens[-offset]]
        return _without(scores, tokens[ends])

    return processor


def bad_words(words: Sequence[Sequence[int]], ends: Sequence[int]) -> Processor:
    """Forbids the last token of each sequence where the rest of it has just been written (NoBadWordsLogitsProcessor).

    A sequence that is just an end token is left out, as in transformers.
    """
    forbidden = [np.array(word, np.int64) for word in words if not (len(word) == 1 and word[0] in ends)]

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        completed = [
            word[-1]
            for word in forbidden
            if len(word) - 1 <= len(tokens) and np.array_equal(tokens[len(tokens) - len(word) + 1 :], word[:-1])
        ]
        return _without(scores, np.array(completed, np.int64)) if completed else scores

    return processor


def min_length(length: int, ends: Sequence[int]) -> Processor:
    """Forbids the end tokens while there are fewer tokens than `length`, prompt included (MinLengthLogitsProcessor)."""
    forbidden = np.array(ends, np.int64)

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        return _without(scores, forbidden) if len(tokens) < length else scores

    return processor


def suppress(token_ids: Sequence[int]) -> Processor:
    """Forbids tokens (SuppressTokensLogitsProcessor)."""
    forbidden = np.array(token_ids, np.int64)

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        return _without(scores, forbidden)

    return processor


def temperature(value: float) -> Processor:
    """Divides the scores (TemperatureLogitsWarper)."""
    divisor = np.float32(value)

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        return scores / divisor

    return processor


def top_k(k: int, keep: int = 1) -> Processor:
    """Keeps the k best, and whatever ties with the last of them (TopKLogitsWarper)."""
    k = max(k, keep)

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        if k >= len(scores):
            return scores
        return _only(scores, best(scores, k))

    return processor


def top_p(p: float, keep: int = 1) -> Processor:
    """Drops the least likely tokens whose probabilities together stay within 1 - p (TopPLogitsWarper)."""
    dropped_mass = np.float32(1 - p)

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        if scores.max() == -np.inf:
            return scores
        possible = scores[scores > -np.inf]
        probabilities = softmax(possible)
        # Tokens this unlikely stay within the limit even all together, so only the others need sorting.
        likely = probabilities > dropped_mass / (2 * len(possible))
        if np.count_nonzero(likely) < keep:
            likely[:] = True
        unlikely_mass = float(probabilities[~likely].sum(dtype=np.float64))
        dropped = _cumulative(np.sort(probabilities[likely]), unlikely_mass) <= dropped_mass
        dropped[-keep:] = False
        first = np.count_nonzero(dropped)
        ranked = np.sort(possible[likely])
        if first > 0 and ranked[first - 1] == ranked[first]:
            return _only(scores, ascending(scores)[first - len(ranked) :])
        return _only(scores, np.flatnonzero(scores >= ranked[first]))

    return processor


def min_p(p: float, keep: int = 1) -> Processor:
    """Drops tokens less likely than p times the likeliest (MinPLogitsWarper)."""
    share = np.float32(p)

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        if scores.max() == -np.inf:
            return scores
        probabilities = softmax(scores)
        kept = np.flatnonzero(probabilities >= share * probabilities.max())
        # The likeliest is among them in any case.
        return _only(scores, kept if keep == 1 else np.union1d(kept, largest(probabilities, keep)))

    return processor


def typical_p(mass: float, keep: int = 1) -> Processor:
    """Keeps the tokens whose surprise is nearest to the entropy, up to a probability mass (TypicalLogitsWarper)."""
    limit = np.float32(mass)

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        if scores.max() == -np.inf:
            return scores
        logs = log_softmax(scores)
        probabilities = softmax(scores)
        possible = logs[scores > -np.inf]
        entropy = -(possible * np.exp(possible)).sum()
        distance = np.abs(-logs - entropy)
        nearest = _nearest(distance, probabilities, mass, keep)
        order = nearest[np.argsort(distance[nearest])]
        within = int((_cumulative(probabilities[order]) < limit).sum())
        kept = distance[order] <= distance[order[min(within, len(order) - 1)]]
        kept[:keep] = True
        last = int(kept.sum())
        if last < len(order) and distance[order[last - 1]] == distance[order[last]]:
            order = ascending(distance)
        return _only(scores, order[:last])

    return processor


def _nearest(distance: Logits, probabilities: Logits, mass: float, keep: int) -> Tokens:
    """Entries of the least distance that certainly hold a probability mass, so that not all need sorting."""
    count = max(_FEW, keep)
    while count < len(distance):
        near = np.flatnonzero(distance <= np.partition(distance, count)[count])
        if probabilities[near].sum(dtype=np.float64) > mass * _SAFELY:
            return near
        count *= 8
    return np.arange(len(distance))


def _only(scores: Logits, kept: Tokens) -> Logits:
    result = np.full_like(scores, -np.inf)
    result[kept] = scores[kept]
    return result


def _without(scores: Logits, forbidden: Tokens) -> Logits:
    result = scores.copy()
    # Some ids may lie outside the vocabulary, where nothing has to be forbidden.
    result[forbidden[(forbidden >= 0) & (forbidden < len(scores))]] = -np.inf
    return result


def _cumulative(probabilities: Logits, before: float = 0.0) -> Logits:
    """Running sums, added up in double precision as PyTorch does, from a sum of `before` on."""
    sums = probabilities.cumsum(dtype=np.float64)
    sums += before
    return sums.astype(np.float32)
