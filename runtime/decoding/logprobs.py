"""Log probabilities of tokens, as the network and the processors gave them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arrays import Logits
from .torch_random import log_softmax
from .torch_topk import largest


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of one token.

    Attributes:
        token_id: the token.
        logprob: its log probability as the network gave it.
        rank: 1 for the likeliest token as the network gave them, 2 for the next one.
        processed_logprob: the same after all processors and filters, from which the token was chosen; of a beam, as
            it is added up to the beam's score, which isn't normalised again.
        top: the likeliest tokens as the network gave them, with their log probabilities, best first.
    """

    token_id: int
    logprob: float
    rank: int
    processed_logprob: float
    top: list[tuple[int, float]]


def token_logprobs(token: int, logits: Logits, scores: Logits, count: int) -> TokenLogprobs:
    """Log probabilities of a token and of the `count` likeliest ones.

    Args:
        token: the token.
        logits: the network's, float32 [vocab].
        scores: the logits after processors and filters, float32 [vocab].
        count: of `top`.
    """
    with np.errstate(invalid="ignore"):  # where no token was possible at all
        processed = log_softmax(scores)
    return scored_token(token, logits, float(processed[token]), count)


def scored_token(token: int, logits: Logits, processed_logprob: float, count: int) -> TokenLogprobs:
    """As `token_logprobs`, where the processed log probability is known."""
    raw = log_softmax(logits)
    best = largest(logits, count) if count else np.zeros(0, np.int64)
    rank = 1 + int(np.count_nonzero(logits > logits[token]))
    return TokenLogprobs(token, float(raw[token]), rank, processed_logprob, [(int(i), float(raw[i])) for i in best])


class PromptLogprobs:
    """Collects the log probabilities of a prompt's tokens.

    Args:
        prompt: int64 [length].
        count: likeliest tokens in the place of each.

    Attributes:
        logprobs: of each token but the first, as far as logits have come.
    """

    def __init__(self, prompt: npt.NDArray[np.int64], count: int) -> None:
        self._prompt, self._count = prompt, count
        self.logprobs: list[TokenLogprobs] = []

    def __call__(self, logits: Logits) -> None:
        """Takes the logits after the prompt's next tokens, [positions, vocab]."""
        following = self._prompt[len(self.logprobs) + 1 :]  # nothing follows the last token
        for token, scores in zip(following.tolist(), logits, strict=False):
            self.logprobs.append(token_logprobs(token, scores, scores, self._count))
