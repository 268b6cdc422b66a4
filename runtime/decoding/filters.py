"""Filters of sampling: which tokens it draws from, in transformers' order and with its semantics (there: warpers).

A warper is a function from `Candidates` to `Candidates`. Each looks only at those that the ones before it left.
To add one: write its factory, and name it in `warpers`.
Semantics: transformers, src/transformers/generation/logits_process.py, the class named in each factory.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays import Logits
from ..option_table import LARGEST
from ..options import GenerationConfig
from .torch_random import Candidates, log_softmax, softmax
from .torch_topk import ascending, best, largest

Warper = Callable[[Candidates], Candidates]

_HIGHEST = 1e38  # score behind the temperature: the difference of two such is a float32, too
_MOST_LIKELY = 100  # tokens that top-h looks at, as in transformers
_FEW = 1024  # entries that are sorted at once; more are binned first, which is faster
_BIN_BITS = 18  # of a float32; bins are then a 32nd of a power of two wide


def warpers(options: GenerationConfig) -> list[Warper]:
    """The warpers that the options ask for, in the order in which transformers applies them; none without sampling."""
    chain: list[Warper] = []
    if not options.do_sample:
        return chain
    # A beam needs a candidate that doesn't end it, besides one for each end token.
    keep = 1 if options.num_beams == 1 else max(2, len(options.eos_token_ids) + 1)
    if options.temperature != 1.0:
        chain.append(temperature(options.temperature))
    if options.top_h is not None:
        chain.append(top_h(options.top_h))
    if options.top_k != 0:
        chain.append(top_k(options.top_k, keep))
    if options.top_p < 1.0:
        chain.append(top_p(options.top_p, keep))
    if options.min_p is not None:
        chain.append(min_p(options.min_p, keep))
    if options.typical_p < 1.0:
        chain.append(typical_p(options.typical_p, keep))
    if 0 < options.epsilon_cutoff < 1:
        chain.append(epsilon_cutoff(options.epsilon_cutoff, keep))
    if 0 < options.eta_cutoff < 1:
        chain.append(eta_cutoff(options.eta_cutoff, keep))
    if options.renormalize_logits:
        chain.append(renormalize())
    return chain


def warp(chain: Sequence[Warper], scores: Logits) -> Candidates:
    """The candidates that all warpers leave of scores, float32 [vocabulary]."""
    candidates = Candidates.all(scores)
    for warper in chain:
        candidates = warper(candidates)
    return candidates


def _among_possible(warper: Warper) -> Warper:
    """A warper that gets those with any chance only, and isn't asked where there are none."""

    def among_possible(candidates: Candidates) -> Candidates:
        candidates = candidates.possible()
        return warper(candidates) if len(candidates.scores) else candidates

    return among_possible


def temperature(value: float) -> Warper:
    """Divides the scores (TemperatureLogitsWarper)."""
    divisor = np.float32(value)
    # Scores up to LARGEST that would leave float32.
    highest = np.float32(_HIGHEST * value) if _HIGHEST * value < LARGEST else None

    def warper(candidates: Candidates) -> Candidates:
        scores: Logits = candidates.scores if highest is None else np.minimum(candidates.scores, highest)
        with np.errstate(over="ignore"):  # minus infinity is right for what is as low as that
            return replace(candidates, scores=scores / divisor)

    return warper


def top_h(share: float) -> Warper:
    """Keeps the likeliest of the 100 likeliest while their terms of the entropy add up to a share of it (TopHLogitsWarper).

    With a share of 1, or where one token has nearly all weight, the last digits of two sums decide about the least likely
    of those that are kept. There this may keep one more or less than PyTorch, whose own digits depend on the processor.
    """
    limit = np.float32(share)

    @_among_possible
    def warper(candidates: Candidates) -> Candidates:
        scores = candidates.dense()
        likeliest = largest(scores, _MOST_LIKELY)  # among all, as their number decides about the order of equal ones
        likeliest = likeliest[scores[likeliest] > -np.inf]
        top = scores[likeliest]
        logs = top - (top[0] + np.log(np.exp(top - top[0]).sum()))
        probabilities = softmax(logs)
        entropy = -(logs * probabilities).sum()
        above_zero = probabilities[probabilities > 0]
        running = (-above_zero * np.log(above_zero)).cumsum(dtype=np.float64).astype(np.float32)
        kept = max(1, int(np.count_nonzero(running <= entropy * limit)))
        return candidates.keep(np.searchsorted(candidates.indices, np.sort(likeliest[:kept])))

    return warper


def top_k(k: int, keep: int = 1) -> Warper:
    """Keeps the k best, and all that tie with the last of them (TopKLogitsWarper)."""
    k = max(k, keep)

    def warper(candidates: Candidates) -> Candidates:
        return candidates if k >= len(candidates.scores) else candidates.keep(best(candidates.scores, k))

    return warper


def top_p(p: float, keep: int = 1) -> Warper:
    """Drops the least likely tokens whose probabilities together stay within 1 - p (TopPLogitsWarper)."""
    dropped_mass = np.float32(1 - p)

    @_among_possible
    def warper(candidates: Candidates) -> Candidates:
        scores = candidates.scores
        probabilities = softmax(scores)
        dropped, least = _reach(scores, probabilities, probabilities, np.less_equal, dropped_mass)
        least_left = min(keep, len(scores))
        left = max(least_left, len(scores) - dropped)
        kept = best(scores, left) if left == least_left else np.flatnonzero(scores >= least)
        if len(kept) > left:  # of equal scores, those that PyTorch sorts last
            return candidates.only(ascending(candidates.dense())[-left:])
        return candidates.keep(kept)

    return warper


def min_p(p: float, keep: int = 1) -> Warper:
    """Drops tokens less likely than p times the likeliest (MinPLogitsWarper)."""
    share = np.float32(p)

    @_among_possible
    def warper(candidates: Candidates) -> Candidates:
        probabilities = softmax(candidates.scores)
        kept = np.flatnonzero(probabilities >= share * probabilities.max())
        if len(kept) < keep:
            return candidates.only(largest(replace(candidates, scores=probabilities).dense(0.0), keep))
        return candidates.keep(kept)

    return warper


def typical_p(mass: float, keep: int = 1) -> Warper:
    """Keeps the tokens whose surprise is nearest to the entropy, up to a probability mass (TypicalLogitsWarper)."""
    limit = np.float32(mass)

    @_among_possible
    def warper(candidates: Candidates) -> Candidates:
        scores = candidates.scores
        logs = log_softmax(scores)
        distance = np.abs(-logs - _entropy(logs))
        _, farthest = _reach(distance, distance, softmax(scores), np.less, limit)
        kept = np.flatnonzero(distance <= farthest)
        if len(kept) < keep:
            kept = best(-distance, min(keep, len(scores)))
            if len(kept) > keep:  # of equally typical ones, those that PyTorch sorts first
                return candidates.only(ascending(replace(candidates, scores=distance).dense(np.inf))[:keep])
        return candidates.keep(kept)

    return warper


def epsilon_cutoff(epsilon: float, keep: int = 1) -> Warper:
    """Keeps tokens of at least a probability (EpsilonLogitsWarper)."""
    least = np.float32(epsilon)

    @_among_possible
    def warper(candidates: Candidates) -> Candidates:
        return _at_least(candidates, softmax(candidates.scores), least, keep)

    return warper


def eta_cutoff(epsilon: float, keep: int = 1) -> Warper:
    """Keeps tokens of at least a probability, which falls as the entropy grows (EtaLogitsWarper)."""
    least = np.float32(epsilon)

    @_among_possible
    def warper(candidates: Candidates) -> Candidates:
        eta = min(least, np.sqrt(least) * np.exp(-_entropy(log_softmax(candidates.scores))))
        return _at_least(candidates, softmax(candidates.scores), eta, keep)

    return warper


def renormalize() -> Warper:
    """Makes log probabilities of the scores that are left (LogitNormalization)."""

    @_among_possible
    def warper(candidates: Candidates) -> Candidates:
        return replace(candidates, scores=log_softmax(candidates.scores))

    return warper


def _entropy(log_probabilities: Logits) -> np.float32:
    """In nats, of what is possible; float32 [entries], none of them minus infinity."""
    entropy: np.float32 = -(log_probabilities * np.exp(log_probabilities)).sum()
    return entropy


def _at_least(candidates: Candidates, probabilities: Logits, least: np.float32, keep: int) -> Candidates:
    """Those of at least a probability, but at least `keep` of the likeliest, and all that tie with the last of them."""
    kept = np.flatnonzero(probabilities >= least)
    if len(kept) < keep:
        kept = best(candidates.scores, min(keep, len(candidates.scores)))
    return candidates.keep(kept)


def _reach(
    keys: Logits, sizes: Logits, probabilities: Logits, holds: Callable[..., Any], limit: np.float32
) -> tuple[int, np.float32]:
    """How many entries, in rising order of keys, have a running sum of probabilities within a limit.

    Only entries near the limit are sorted: sums up to there are those of bins, which floats' upper bits number.

    Args:
        keys: float32 [entries].
        sizes: float32 [entries], not negative, in the same order as the keys.
        probabilities: float32 [entries].
        holds: compares running sums with the limit, less or less_equal.
        limit: of the sums. They are added up in double precision and rounded to float32, as PyTorch does.

    Returns:
        The number of entries, at most all but one, and the key of the next one.
    """
    passed, before = 0, 0.0
    if len(keys) > _FEW:
        bins = sizes.view(np.int32) >> _BIN_BITS
        sums = np.bincount(bins, weights=probabilities).cumsum()
        last = min(int(np.count_nonzero(holds(sums.astype(np.float32), limit))), len(sums) - 1)
        members = np.flatnonzero(bins == last)
        passed, before = int(np.count_nonzero(bins < last)), sums[last - 1] if last else 0.0
        keys, probabilities = keys[members], probabilities[members]
    order = np.argsort(keys)
    running = (probabilities[order].cumsum(dtype=np.float64) + before).astype(np.float32)
    within = min(int(np.count_nonzero(holds(running, limit))), len(order) - 1)
    return passed + within, keys[int(order[within])]
