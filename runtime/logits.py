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
from .sampling import Logits, largest, log_softmax

Tokens = npt.NDArray[np.int64]
Processor = Callable[[Tokens, Logits], Logits]


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
        starts = np.arange(len(tokens) - size + 1)
        for offset in range(size - 1):
            starts = starts[tokens[starts + offset] == tokens[len(tokens) - size + 1 + offset]]
        return _without(scores, tokens[starts + size - 1])

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
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        return np.where(scores < threshold, np.float32(-np.inf), scores)

    return processor


def top_p(p: float, keep: int = 1) -> Processor:
    """Drops the least likely tokens whose probabilities together stay within 1 - p (TopPLogitsWarper)."""
    dropped_mass = np.float32(1 - p)

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        # Forbidden tokens add nothing to the sums, so only the others need sorting.
        candidates = np.flatnonzero(scores > -np.inf)
        order = candidates[np.argsort(scores[candidates], kind="stable")]
        dropped = _cumulative(scores[order]) <= dropped_mass
        dropped[-keep:] = False
        return _without(scores, order[dropped])

    return processor


def min_p(p: float, keep: int = 1) -> Processor:
    """Drops tokens less likely than p times the likeliest (MinPLogitsWarper)."""
    share = np.float32(p)

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        probabilities = np.exp(log_softmax(scores))
        dropped = probabilities < share * probabilities.max()
        dropped[largest(probabilities, keep)] = False
        return np.where(dropped, np.float32(-np.inf), scores)

    return processor


def typical_p(mass: float, keep: int = 1) -> Processor:
    """Keeps the tokens whose surprise is nearest to the entropy, up to a probability mass (TypicalLogitsWarper)."""
    limit = np.float32(mass)

    def processor(tokens: Tokens, scores: Logits) -> Logits:
        log_probabilities = log_softmax(scores)
        candidates = np.flatnonzero(scores > -np.inf)
        logs = log_probabilities[candidates]
        entropy = -(logs * np.exp(logs)).sum()
        distance = np.abs(-logs - entropy)
        order = np.argsort(distance, kind="stable")
        within = int((_cumulative(scores[candidates[order]]) < limit).sum())
        threshold = distance[order[min(within, len(order) - 1)]]
        dropped = distance[order] > threshold
        dropped[:keep] = False
        return _without(scores, candidates[order[dropped]])

    return processor


def _without(scores: Logits, forbidden: Tokens) -> Logits:
    result = scores.copy()
    # An end token may lie outside the vocabulary, where nothing has to be forbidden.
    result[forbidden[forbidden < len(scores)]] = -np.inf
    return result


def _cumulative(scores: Logits) -> Logits:
    """Running sums of the probabilities, added up in double precision as PyTorch does."""
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    return probabilities.cumsum(dtype=np.float64).astype(np.float32)
