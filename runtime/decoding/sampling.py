"""Greedy search and sampling."""

from copy import copy
from dataclasses import replace

import numpy as np

from ..arrays import Logits, Tokens
from ..extensions import Extensions
from ..options import GenerationConfig
from .filters import warp
from .logprobs import token_logprobs
from .prompt_lookup import PromptLookup
from .strategy import Continuation, Decoding, Scores, Stop


class Sampling(Decoding):
    """Greedy search and sampling, of one or several continuations that share a stream of random numbers."""

    def __init__(
        self, prompt: Tokens, options: GenerationConfig, context: int, stop: Stop | None, extensions: Extensions
    ) -> None:
        super().__init__(prompt, options, context, stop, extensions)
        count = options.num_return_sequences
        self._buffer = np.zeros((count, max(self._limits.max_length, len(prompt))), np.int64)
        self._buffer[:, : len(prompt)] = prompt
        self._results = [Continuation(self._buffer[index, : len(prompt)]) for index in range(count)]
        self._active = list(range(count))
        self._lookup = PromptLookup(options.prompt_lookup)
        self._logprobs = options.logprobs
        self.positions = self._buffer.shape[1] - 1

    @property
    def rows(self) -> int:
        return len(self._active)

    def tokens(self, row: int) -> Tokens:
        return self._results[self._active[row]].tokens

    @property
    def _room(self) -> int:
        """Tokens that may be drafted: the one after them is chosen from the logits that verify them."""
        return self._limits.max_length - len(self._results[0].tokens) - 1

    def draft(self) -> Tokens:
        tokens = self._results[0].tokens
        if self._lookup.longest < 1 or self._room < 1 or self.rows != 1:
            return tokens[:0]
        return self._lookup.propose(tokens, self._room)

    def fork(self) -> "Sampling | None":
        if len(self._results) > 1 or self._room < 1:
            return None
        forked = copy(self)
        own = replace(self._extensions, logits_processor=(), stopping_criteria=(), prefix_allowed_tokens_fn=None)
        if self._extensions != own:
            forked._extensions = own
            forked._score = Scores(self._options, self.prompt, own)
        forked._buffer = self._buffer.copy()
        forked._results = [Continuation(forked._buffer[0, : len(self._results[0].tokens)])]
        forked._active = self._active.copy()
        forked._logprobs = None
        forked._generator = None if self._generator is None else self._generator.fork()
        return forked

    def advance(self, logits: Logits, negative: Logits | None = None) -> list[int]:
        sequences = [self._results[index].tokens for index in self._active]
        scores = self._score(sequences, logits, negative)
        row_of = {index: row for row, index in enumerate(self._active)}
        for index in range(len(self._results)):
            if index in row_of:
                self._extend(index, logits[row_of[index]], scores[row_of[index]])
            elif self._generator is not None:
                # transformers draws for finished sequences too, which moves the shared stream.
                self._generator.skip(logits.shape[-1])
        if self._extensions.stopping_criteria:
            longer = np.stack([self._results[index].tokens for index in self._active])
            for index, stops in zip(self._active, self._extensions.stops(longer, scores), strict=True):
                if stops:
                    self._results[index].finish_reason = "stop"
        # The last row takes the place of one that has finished, so that few rows move.
        rows = list(range(len(self._active)))
        for row in reversed(rows.copy()):
            if self._results[self._active[row]].finish_reason is not None:
                self._active[row], rows[row] = self._active[-1], rows[-1]
                self._active.pop()
                rows.pop()
        if not rows:
            self.done = True
        return rows

    def continuations(self) -> list[Continuation]:
        return self._results

    def _extend(self, index: int, logits: Logits, scores: Logits) -> None:
        """Appends the next token to a continuation, given the network's logits and the scores, each [vocab]."""
        result, logprobs = self._results[index], self._logprobs
        if self._generator is None:
            token = int(scores.argmax())
        else:
            candidates = warp(self._warpers, scores)
            token = int(self._generator.multinomial(candidates)[0])
            if logprobs is not None:
                scores = candidates.dense()
        if logprobs is not None:
            result.logprobs.append(token_logprobs(token, logits, scores, logprobs))
        length = len(result.tokens)
        self._buffer[index, length] = token
        result.tokens = self._buffer[index, : length + 1]
        result.finish_reason = self._limits.reason(result.tokens)
