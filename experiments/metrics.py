"""Diversity metrics of generated texts, from token ids: no word splitter is needed."""

from collections.abc import Iterable, Sequence

Ngram = tuple[int, ...]
# Figures of a run's texts, by their names in records and files.
METRICS = ("mean_length", "mean_logprob", "distinct_1", "distinct_2", "distinct_3", "repeated_4gram_share")


def ngrams(tokens: Sequence[int], size: int) -> list[Ngram]:
    """All n-grams of `size` tokens, overlapping."""
    return [tuple(tokens[begin : begin + size]) for begin in range(len(tokens) - size + 1)]


def distinct(sequences: Iterable[Sequence[int]], size: int) -> float | None:
    """Distinct-n: different n-grams by all n-grams, over all sequences together; None without n-grams.

    Source: Li et al. 2016, A Diversity-Promoting Objective Function for Neural Conversation Models.
    """
    found = [ngram for tokens in sequences for ngram in ngrams(tokens, size)]
    return len(set(found)) / len(found) if found else None


def repeated(sequences: Iterable[Sequence[int]], size: int = 4) -> float | None:
    """Seq-rep-n: share of n-grams that stood in the same sequence before, mean over sequences; None without n-grams.

    Source: Welleck et al. 2020, Neural Text Generation with Unlikelihood Training.
    """
    shares = [1 - len(set(found)) / len(found) for tokens in sequences if (found := ngrams(tokens, size))]
    return sum(shares) / len(shares) if shares else None
