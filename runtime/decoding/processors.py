"""Logits processors: make some next tokens more or less likely, in transformers' order and with its semantics.

A processor is a function `(tokens, scores)` that changes the scores of one sequence in place: its tokens so far, prompt
included, int64 [length], and float32 scores [vocabulary]. Filters of sampling come afterwards: see `filters`.
To add one: write its factory, and name it in `processors`.
Semantics: transformers, src/transformers/generation/logits_process.py, the class named in each factory.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..arrays import Logits, Tokens
from ..option_table import LARGEST
from ..options import GenerationConfig
from .torch_random import log_softmax

Processor = Callable[[Tokens, Logits], None]


def processors(options: GenerationConfig, prompt: Tokens, allowed: Processor | None = None) -> list[Processor]:
    """The processors that the options ask for, in transformers' order.

    Args:
        options: the generation options.
        prompt: int64 [length].
        allowed: a processor for `prefix_allowed_tokens_fn`.
    """
    chain: list[Processor] = []
    ends = options.eos_token_ids
    if options.sequence_bias:
        chain.append(sequence_bias(options.sequence_bias))
    if options.logit_bias:
        chain.append(sequence_bias([((token,), bias) for token, bias in options.logit_bias]))
    # In a model without an encoder, transformers' encoder tokens are the prompt.
    if options.encoder_repetition_penalty != 1.0:
        chain.append(repetition_penalty(1 / options.encoder_repetition_penalty, prompt))
    if options.repetition_penalty != 1.0:
        chain.append(repetition_penalty(options.repetition_penalty))
    if options.presence_penalty or options.frequency_penalty:
        chain.append(new_token_penalty(options.presence_penalty, options.frequency_penalty, len(prompt)))
    if options.no_repeat_ngram_size > 0:
        chain.append(no_repeat_ngram(options.no_repeat_ngram_size))
    if options.encoder_no_repeat_ngram_size > 0:
        chain.append(no_repeat_ngram(options.encoder_no_repeat_ngram_size, prompt))
    if options.bad_words_ids:
        chain.append(bad_words(options.bad_words_ids, ends))
    if options.min_length > 0 and ends:
        chain.append(min_length(options.min_length, ends))
    if options.min_new_tokens and ends:
        chain.append(min_length(len(prompt) + options.min_new_tokens, ends))
    if allowed is not None:
        chain.append(allowed)
    if options.forced_bos_token_id is not None:
        chain.append(forced([options.forced_bos_token_id], 1))
    if options.forced_eos_token_ids:
        chain.append(forced(options.forced_eos_token_ids, len(prompt) + options.new_tokens(len(prompt)) - 1))
    if options.exponential_decay_length_penalty is not None and ends:
        start, factor = options.exponential_decay_length_penalty
        chain.append(exponential_decay(len(prompt) + start, factor, ends))
    if options.suppress_tokens:
        chain.append(suppress(options.suppress_tokens))
    if options.begin_suppress_tokens:
        begins_forced = len(prompt) == 1 and options.forced_bos_token_id is not None
        chain.append(suppress(options.begin_suppress_tokens, len(prompt) + 1 if begins_forced else len(prompt)))
    return chain


def process(chain: Sequence[Processor], tokens: Tokens, scores: Logits) -> Logits:
    """Scores after all processors: a new array, or the scores themselves without processors."""
    if not chain:
        return scores
    processed = scores.copy()
    # Several numbers that are each in range can make an infinite score, from which no probability can be computed.
    with np.errstate(over="ignore"):
        for processor in chain:
            processor(tokens, processed)
    np.minimum(processed, np.finfo(np.float32).max, out=processed)
    return processed


def guided(logits: Logits, negative: Logits, scale: float) -> Logits:
    """Scores [rows, vocab] of logits and of those after the negative prompt (UnbatchedClassifierFreeGuidanceLogitsProcessor)."""
    wanted, unwanted = log_softmax(logits), log_softmax(negative)
    return np.float32(scale) * (wanted - unwanted) + unwanted


def sequence_bias(biases: Sequence[tuple[Sequence[int], float]]) -> Processor:
    """Adds biases to the last token of each sequence where the rest of it has just been written (SequenceBiasLogitsProcessor).

    Of a sequence that is given twice, the last bias counts.
    """
    last_given = {tuple(ids): np.float32(bias) for ids, bias in biases}
    # transformers adds them up by length, single tokens first, the other lengths as they come up.
    lengths = list(dict.fromkeys([1, *map(len, last_given)]))
    ordered = sorted(last_given.items(), key=lambda pair: lengths.index(len(pair[0])))
    words = [(np.array(ids[:-1], np.int64), ids[-1], bias) for ids, bias in ordered]

    def processor(tokens: Tokens, scores: Logits) -> None:
        added = np.zeros_like(scores)
        for before, last, bias in words:
            if _ends_with(tokens, before):
                added[last] += bias
        scores += added

    return processor


def repetition_penalty(penalty: float, seen: Tokens | None = None) -> Processor:
    """Divides positive scores of tokens seen before by the penalty, multiplies negative ones (RepetitionPenaltyLogitsProcessor).

    Given the prompt as `seen`, it penalises only these tokens; with the inverse penalty that is EncoderRepetitionPenaltyLogitsProcessor.
    """
    factor = np.float32(penalty)

    def processor(tokens: Tokens, scores: Logits) -> None:
        penalised = tokens if seen is None else seen
        before = scores[penalised]
        scores[penalised] = np.where(before < 0, before * factor, before / factor)

    return processor


def new_token_penalty(presence: float, frequency: float, begin: int) -> Processor:
    """Subtracts from the scores of tokens from `begin` on: once for each token, and for each time that it occurs.

    Formula: https://platform.openai.com/docs/guides/text-generation; of the new tokens only, as vLLM has it.
    """

    def processor(tokens: Tokens, scores: Logits) -> None:
        seen, counts = np.unique(tokens[begin:], return_counts=True)
        scores[seen] -= np.float32(presence) + np.float32(frequency) * counts.astype(np.float32)

    return processor


def no_repeat_ngram(size: int, seen: Tokens | None = None) -> Processor:
    """Forbids tokens that would complete an n-gram seen before (NoRepeatNGramLogitsProcessor).

    Of the prompt's n-grams only, given as `seen`, with which the sequence begins: EncoderNoRepeatNGramLogitsProcessor.
    """

    def processor(tokens: Tokens, scores: Logits) -> None:
        if len(tokens) < size:
            return
        text = tokens if seen is None else seen
        # Forbids the tokens that followed earlier places of the last size - 1 tokens.
        ends = np.arange(len(text)) if size == 1 else np.flatnonzero(text[size - 2 : -1] == tokens[-1]) + size - 1
        for offset in range(2, size):
            ends = ends[text[ends - offset] == tokens[-offset]]
        scores[text[ends]] = -np.inf

    return processor


def bad_words(words: Sequence[Sequence[int]], ends: Sequence[int]) -> Processor:
    """Forbids the last token of each sequence where the rest of it has just been written (NoBadWordsLogitsProcessor).

    A sequence that is just an end token is left out, as in transformers.
    """
    forbidden = [np.array(word, np.int64) for word in words if not (len(word) == 1 and word[0] in ends)]

    def processor(tokens: Tokens, scores: Logits) -> None:
        completed = [word[-1] for word in forbidden if _ends_with(tokens, word[:-1])]
        _forbid(scores, np.array(completed, np.int64))

    return processor


def min_length(length: int, ends: Sequence[int]) -> Processor:
    """Forbids the end tokens while there are fewer tokens than `length`, prompt included (MinLengthLogitsProcessor)."""
    forbidden = np.array(ends, np.int64)

    def processor(tokens: Tokens, scores: Logits) -> None:
        if len(tokens) < length:
            _forbid(scores, forbidden)

    return processor


def forced(token_ids: Sequence[int], length: int) -> Processor:
    """Allows only some tokens, all equally likely, when the sequence has `length` tokens, prompt included.

    ForcedBOSTokenLogitsProcessor after 1, ForcedEOSTokenLogitsProcessor after all but the last one.
    """
    allowed = np.array(token_ids, np.int64)

    def processor(tokens: Tokens, scores: Logits) -> None:
        if len(tokens) == length:
            scores[:] = -np.inf
            scores[allowed] = 0

    return processor


def exponential_decay(start: int, factor: float, ends: Sequence[int]) -> Processor:
    """Makes end tokens likelier, the more the further a sequence is beyond a length (ExponentialDecayLengthPenalty).

    Each one's score s becomes s + |s| (factor ** tokens beyond - 1), at most 1e30.

    Args:
        start: that length, prompt included.
        factor: below 1, end tokens become less likely.
        ends: the end tokens.
    """
    changed = np.unique(np.array(ends, np.int64))

    def processor(tokens: Tokens, scores: Logits) -> None:
        if len(tokens) <= start:
            return
        inside = changed[(changed >= 0) & (changed < len(scores))]
        before = scores[inside]
        with np.errstate(over="ignore", invalid="ignore"):  # what isn't finite stays as it is
            growth = np.float32(min(np.float64(factor) ** (len(tokens) - start) - 1, LARGEST))
            after = np.minimum(before + np.abs(before) * growth, np.float32(LARGEST))
        scores[inside] = np.where(np.isfinite(before), after, before)

    return processor


def suppress(token_ids: Sequence[int], length: int | None = None) -> Processor:
    """Forbids tokens (SuppressTokensLogitsProcessor).

    With a length, only when the sequence has that many tokens, prompt included: SuppressTokensAtBeginLogitsProcessor.
    """
    forbidden = np.array(token_ids, np.int64)

    def processor(tokens: Tokens, scores: Logits) -> None:
        if length is None or len(tokens) == length:
            _forbid(scores, forbidden)

    return processor


def _ends_with(tokens: Tokens, ending: Tokens) -> bool:
    begin = len(tokens) - len(ending)
    return begin >= 0 and np.array_equal(tokens[begin:], ending)


def _forbid(scores: Logits, forbidden: Tokens) -> None:
    # Some ids may lie outside the vocabulary, where nothing has to be forbidden.
    scores[forbidden[(forbidden >= 0) & (forbidden < len(scores))]] = -np.inf
