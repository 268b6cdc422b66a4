"""Logits processors: what makes some next tokens more or less likely, in transformers' order and with its semantics.

A processor is a function `(tokens, scores)` that changes the scores of one sequence in place: its tokens so far, prompt
included, int64 [length], and float32 scores [vocabulary]. What sampling alone does comes afterwards: see `warpers`.
To add one: write its factory, and name it in `processors`.
Semantics: transformers, src/transformers/generation/logits_process.py, the class named in each factory.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .options import GenerationConfig
from .sampling import Logits

Tokens = npt.NDArray[np.int64]
Processor = Callable[[Tokens, Logits], None]


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
    return chain


def process(chain: Sequence[Processor], tokens: Tokens, scores: Logits) -> Logits:
    """What processors make of scores, one after another: a new array, or the scores themselves where there are none."""
    if not chain:
        return scores
    processed = scores.copy()
    for processor in chain:
        processor(tokens, processed)
    return processed


def repetition_penalty(penalty: float) -> Processor:
    """Divides positive scores of tokens seen before by the penalty, multiplies negative ones (RepetitionPenaltyLogitsProcessor)."""
    factor = np.float32(penalty)

    def processor(tokens: Tokens, scores: Logits) -> None:
        seen = scores[tokens]
        scores[tokens] = np.where(seen < 0, seen * factor, seen / factor)

    return processor


def no_repeat_ngram(size: int) -> Processor:
    """Forbids tokens that would complete an n-gram seen before (NoRepeatNGramLogitsProcessor)."""

    def processor(tokens: Tokens, scores: Logits) -> None:
        if len(tokens) < size:
            return
        # Where the last size - 1 tokens stood before, what followed them is forbidden.
        ends = np.arange(len(tokens)) if size == 1 else np.flatnonzero(tokens[size - 2 : -1] == tokens[-1]) + size - 1
        for offset in range(2, size):
            ends = ends[tokens[ends - offset] == tokens[-offset]]
        scores[tokens[ends]] = -np.inf

    return processor


def bad_words(words: Sequence[Sequence[int]], ends: Sequence[int]) -> Processor:
    """Forbids the last token of each sequence where the rest of it has just been written (NoBadWordsLogitsProcessor).

    A sequence that is just an end token is left out, as in transformers.
    """
    forbidden = [np.array(word, np.int64) for word in words if not (len(word) == 1 and word[0] in ends)]

    def processor(tokens: Tokens, scores: Logits) -> None:
        completed = [
            word[-1]
            for word in forbidden
            if len(word) - 1 <= len(tokens) and np.array_equal(tokens[len(tokens) - len(word) + 1 :], word[:-1])
        ]
        _forbid(scores, np.array(completed, np.int64))

    return processor


def min_length(length: int, ends: Sequence[int]) -> Processor:
    """Forbids the end tokens while there are fewer tokens than `length`, prompt included (MinLengthLogitsProcessor)."""
    forbidden = np.array(ends, np.int64)

    def processor(tokens: Tokens, scores: Logits) -> None:
        if len(tokens) < length:
            _forbid(scores, forbidden)

    return processor


def suppress(token_ids: Sequence[int]) -> Processor:
    """Forbids tokens (SuppressTokensLogitsProcessor)."""
    forbidden = np.array(token_ids, np.int64)

    def processor(tokens: Tokens, scores: Logits) -> None:
        _forbid(scores, forbidden)

    return processor


def _forbid(scores: Logits, forbidden: Tokens) -> None:
    # Some ids may lie outside the vocabulary, where nothing has to be forbidden.
    scores[forbidden[(forbidden >= 0) & (forbidden < len(scores))]] = -np.inf
