"""What a generated text is judged by. Knows token ids only.

Diversity is counted in tokens, not in words, so that it needs no word splitter.
"""

from collections.abc import Iterable, Sequence

Ngram = tuple[int, ...]


def ngrams(tokens: Sequence[int], size: int) -> list[Ngram]:
    """All runs of so many tokens, overlapping ones too."""
    return [tuple(tokens[begin : begin + size]) for begin in range(len(tokens) - size + 1)]


def distinct(sequences: Iterable[Sequence[int]], size: int) -> float | None:
    """Different n-grams by all n-grams, over all sequences together; None where there are none.

    Source: distinct-n of Li et al. 2016, A Diversity-Promoting Objective Function for Neural Conversation Models.
    """
    found = [ngram for tokens in sequences for ngram in ngrams(tokens, size)]
    return len(set(found)) / len(found) if found else None


def repeated(sequences: Iterable[Sequence[int]], size: int = 4) -> float | None:
    """The share of n-grams that stood in the same sequence before; a mean over sequences, None where there are no n-grams.

    Source: seq-rep-n of Welleck et al. 2020, Neural Text Generation with Unlikelihood Training.
    """
    shares = [1 - len(set(found)) / len(found) for tokens in sequences if (found := ngrams(tokens, size))]
    return sum(shares) / len(shares) if shares else None
