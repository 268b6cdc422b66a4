"""Quality of a precision: a bundle's predictions against those of the same weights in fp32.

Two figures over positions of a text: perplexity, and the mean Kullback-Leibler divergence KL(fp32 || bundle) in nats per
token, 0 for equal predictions. Without a text, the fp32 model samples one from its own unaltered distribution: the mean
divergence there equals, in expectation, the rise of the logarithm of perplexity.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...models.bundle import Bundle
from ...runtime.engine.kv_cache import KVCache
from ...runtime.engine.runner import Runner
from ..quantize.statistics import sample
from .logits import divergence, log_softmax

# A window's logits are held twice: 128 positions of a vocabulary of 50,257 are 26 MB each.
_WINDOW = 128
_TEXTS = 4


@dataclass(frozen=True)
class Quality:
    """A bundle's predictions against those of fp32.

    Attributes:
        text: "own samples", or the caller's name of the text.
        tokens: predicted tokens; the other figures are means over them.
        reference_perplexity: of fp32.
        perplexity: of the bundle.
        kl: mean KL(fp32 || bundle), nats per token.
    """

    text: str
    tokens: int
    reference_perplexity: float
    perplexity: float
    kl: float


def report(bundle: Bundle, reference: Bundle, texts: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Any]:
    """The manifest's figures: on samples of the reference, and on texts, each a name and its tokens."""
    figures = asdict(on_own_samples(bundle, reference))
    if texts:
        figures["texts"] = [asdict(on_text(bundle, reference, tokens, name=name)) for name, tokens in texts]
    return figures


def on_text(bundle: Bundle, reference: Bundle, tokens: Sequence[int], *, name: str = "text") -> Quality:
    """Compares a bundle with the same checkpoint's fp32 bundle on a text.

    The text is cut into windows as long as the context; the first token of each is not predicted.

    Args:
        bundle: of two positions at least.
        tokens: of the text, two at least.

    Raises:
        BackendError: ONNX Runtime can't load or run a graph.
    """
    ours, theirs = _sessions(bundle, reference)
    return _summary(name, _windows(ours, theirs, tokens))


def on_own_samples(bundle: Bundle, reference: Bundle, *, tokens: int = 256, seed: int = 1) -> Quality:
    """Compares a bundle with the same checkpoint's fp32 bundle on texts that the latter samples.

    Args:
        bundle: of two positions at least.

    Raises:
        BackendError: ONNX Runtime can't load or run a graph.
    """
    ours, theirs = _sessions(bundle, reference)
    texts = sample(theirs, _TEXTS, min(theirs.config.n_positions, -(-tokens // _TEXTS) + 1), seed)
    return _summary("own samples", itertools.chain.from_iterable(_windows(ours, theirs, text) for text in texts))


def _sessions(bundle: Bundle, reference: Bundle) -> tuple[Runner, Runner]:
    """Opens both. A second graph rounds more than the first, so it is the one that is judged where there is one."""
    ours = Runner(bundle)
    ours.open_second_graph()
    return ours, Runner(reference)


# At each predicted position: the losses of fp32 and of the bundle, and their divergence.
_Figures = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]


def _windows(ours: Runner, theirs: Runner, tokens: Sequence[int] | npt.NDArray[np.int64]) -> Iterator[_Figures]:
    length = theirs.config.n_positions
    for start in range(0, len(tokens) - 1, length):
        window = np.array(tokens[start : start + length], np.int64)[None]
        caches = ours.new_cache(1, window.shape[1]), theirs.new_cache(1, window.shape[1])
        for first in range(0, window.shape[1] - 1, _WINDOW):
            part = window[:, first : first + _WINDOW]
            following = window[0, first + 1 : first + 1 + part.shape[1]]
            yield _compare(ours, theirs, caches, part, following)


def _compare(
    ours: Runner,
    theirs: Runner,
    caches: tuple[KVCache, KVCache],
    tokens: npt.NDArray[np.int64],
    following: npt.NDArray[np.int64],
) -> _Figures:
    """Runs [1, count] tokens through both; of the last there may be no following one."""
    row = slice(0, 1)
    candidate = log_softmax(ours.forward(caches[0], row, tokens, logits="all")[: len(following)])
    truth = log_softmax(theirs.forward(caches[1], row, tokens, logits="all")[: len(following)])
    rows = np.arange(len(following))
    return -truth[rows, following], -candidate[rows, following], divergence(truth, candidate)


def _summary(name: str, parts: Iterator[_Figures]) -> Quality:
    truth, candidate, divergence = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Quality(
        text=name,
        tokens=len(truth),
        reference_perplexity=math.exp(truth.mean()),
        perplexity=math.exp(candidate.mean()),
        kl=float(divergence.mean()),
    )
