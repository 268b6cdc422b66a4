"""Logits of a bundle by the three ways through the runtime, and their difference from expected ones."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.arrays import Logits, Tokens
from ...runtime.engine.runner import Runner


def whole(runner: Runner, prompts: list[Tokens]) -> Iterator[Logits]:
    """Each prompt in one forward pass."""
    for prompt in prompts:
        cache = runner.new_cache(1, len(prompt))
        yield runner.forward(cache, slice(0, 1), prompt[None], logits="all")


def cached(runner: Runner, prompts: list[Tokens]) -> Iterator[Logits]:
    """Each prompt's first half in one pass, then token by token."""
    for prompt in prompts:
        cache = runner.new_cache(1, len(prompt))
        half = (len(prompt) + 1) // 2
        parts = [runner.forward(cache, slice(0, 1), prompt[None, :half], logits="all").copy()]
        parts += [runner.forward(cache, slice(0, 1), token[None, None]).copy() for token in prompt[half:]]
        yield np.concatenate(parts)


def ragged(runner: Runner, prompts: list[Tokens]) -> Iterator[Logits]:
    """All prompts in three passes, each row with its own number of tokens behind its own past."""
    lengths = np.array([len(prompt) for prompt in prompts])
    cache = runner.new_cache(len(prompts), lengths.max())
    found: list[list[Logits]] = [[] for _ in prompts]
    for share in (1 / 3, 2 / 3, 1):
        begins = cache.lengths.copy()
        counts = np.ceil(share * lengths).astype(np.int64) - begins
        tokens = np.zeros((len(prompts), counts.max()), np.int64)
        for row, prompt, begin, count in zip(tokens, prompts, begins, counts, strict=True):
            row[:count] = prompt[begin : begin + count]
        logits = runner.forward(cache, slice(0, len(prompts)), tokens, counts, "all").copy()
        for part, each in zip(found, np.split(logits, counts.cumsum()[:-1]), strict=True):
            part.append(each)
    yield from map(np.concatenate, found)


def largest_difference(found: Iterable[Logits], expected: Iterable[Logits]) -> float:
    """The root mean square difference of the position that differs most."""
    return float(np.concatenate([_differences(*pair) for pair in zip(found, expected, strict=True)]).max())


def figures(found: Iterable[Logits], expected: Iterable[Logits]) -> dict[str, Any]:
    """Differences over the last positions of each prompt, as many as are found.

    Args:
        found: the bundle's logits, float32 [positions, vocabulary] of each prompt.
        expected: float32 [length, vocabulary] of each prompt.
    """
    positions = agreeing = 0
    kl_sum = 0.0
    differences, largest, size = [], [], []
    for ours, wanted in zip(found, expected, strict=True):
        wanted = wanted[-len(ours) :]
        positions += len(ours)
        differences.append(_differences(ours, wanted).max())
        largest.append(np.abs(ours - wanted).max())
        size.append(np.abs(wanted).max())
        agreeing += int((ours.argmax(-1) == wanted.argmax(-1)).sum())
        kl_sum += float(divergence(log_softmax(wanted), log_softmax(ours)).sum())
    return {
        "positions": positions,
        # NumPy's maximum is NaN where any position's is.
        "difference": float(np.max(differences)),
        "max_abs": float(np.max(largest)),
        "max_relative": float(np.max(largest) / np.max(size)),
        "top1_agreement": agreeing / positions,
        "kl": kl_sum / positions,
    }


def judged(found: Iterable[Logits], expected: Iterable[Logits], allowed: float, noise: float) -> dict[str, Any]:
    """The figures, and whether they pass.

    Args:
        found: the bundle's logits.
        expected: of each prompt.
        allowed: root mean square difference of a position.
        noise: difference that passes in any case, relative to the largest logit.
    """
    result = figures(found, expected)
    passed = result["difference"] <= allowed or result["max_relative"] <= noise
    return result | {"allowed": allowed, "passed": passed}


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Log probabilities [positions, vocabulary], in double precision since their differences are small."""
    exact = logits.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    return exact


def divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """KL(p || q) at each position, in nats, of log probabilities [positions, vocabulary]."""
    result: npt.NDArray[np.float64] = np.einsum("rv,rv->r", np.exp(p), p - q)
    return result


def _differences(found: Logits, expected: Logits) -> npt.NDArray[np.float64]:
    """Root mean square difference at each position."""
    result: npt.NDArray[np.float64] = np.sqrt(np.square(found - expected, dtype=np.float64).mean(-1))
    return result
