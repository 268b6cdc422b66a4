"""Contrastive search, as transformers' `_contrastive_search` defines it up to release 4.55.

Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation".
"""

import numpy as np

from ..arrays import Float32Array, Logits, Tokens
from ..extensions import Extensions
from ..options import GenerationConfig
from .logprobs import token_logprobs
from .strategy import Continuation, Decoding, Stop
from .torch_random import log_softmax
from .torch_topk import largest


class ContrastiveSearch(Decoding):
    """Contrastive search: of the top_k likeliest tokens, the one that is likely, but unlike all tokens before.

    Each row computes one candidate for the next token, whose hidden state says how much it is like the others.
    """

    def __init__(
        self, prompt: Tokens, options: GenerationConfig, context: int, stop: Stop | None, extensions: Extensions
    ) -> None:
        # Candidates need a position, also those for the last token.
        super().__init__(prompt, options, context - 1, stop, extensions)
        self.rows = options.top_k
        self.positions = max(self._limits.max_length, len(prompt))
        self.hidden_reader = self._read
        self._result = Continuation(prompt)
        self._candidates = np.zeros(0, np.int64)
        self._probabilities = np.zeros(0, np.float32)
        # Behind the tokens so far: logits [vocab] and scores [1, vocab].
        self._logits, self._scores = np.zeros(0, np.float32), np.zeros((1, 0), np.float32)
        # Of the tokens so far, and of the candidates: hidden states of length 1, [tokens, width].
        self._context: list[Float32Array] = []
        self._next = np.zeros((0, 0), np.float32)

    def tokens(self, row: int) -> Tokens:
        return np.append(self._result.tokens, self._candidates[row])

    def advance(self, logits: Logits) -> list[int]:
        best = 0
        if len(self._candidates):
            best = self._append()
        elif len(self.prompt) >= self._limits.max_length:  # it fills the context window
            self._result.finish_reason = self._limits.reason(self.prompt)
        self.done = self._result.finish_reason is not None
        if self.done:
            return [best] * self.rows
        self._logits = logits[best].copy()
        self._scores = self._score([self._result.tokens], self._logits[None])
        probabilities = np.exp(log_softmax(self._scores[0]))
        self._candidates = largest(probabilities, self.rows)
        self._probabilities = probabilities[self._candidates]
        return [best] * self.rows

    def continuations(self) -> list[Continuation]:
        return [self._result]

    def _read(self, hidden: Float32Array) -> None:
        """Takes the hidden states [tokens, width] of the prompt, in parts, then those of the candidates."""
        self._next = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
        if not len(self._candidates):
            self._context.append(self._next)

    def _append(self) -> int:
        """Appends the best candidate; returns its row."""
        alpha, count, result = self._options.penalty_alpha, self._options.logprobs, self._result
        self._context = [np.concatenate(self._context)]
        similarity = (self._context[0] @ self._next.T).max(axis=0)
        best = int((np.float32(1 - alpha) * self._probabilities - np.float32(alpha) * similarity).argmax())
        self._context.append(self._next[best : best + 1])
        token = int(self._candidates[best])
        result.tokens = np.append(result.tokens, token)
        if count is not None:
            result.logprobs.append(token_logprobs(token, self._logits, self._scores[0], count))
        stopped = self._extensions.stops(result.tokens[None], self._scores).any()
        result.finish_reason = "stop" if stopped else self._limits.reason(result.tokens)
        return best
