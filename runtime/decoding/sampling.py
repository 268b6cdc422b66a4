"""Greedy search and sampling."""

import numpy as np

from ..arrays import Logits, Tokens
from ..options import GenerationConfig
from .drafts import Drafts
from .extensions import Extensions
from .filters import warp
from .logprobs import token_logprobs
from .strategy import Continuation, Decoding, Stop


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
        self._drafts = Drafts(options.prompt_lookup)
        self.exact_top_k = self._exact_top_k()
        self.positions = self._buffer.shape[1] - 1

    @property
    def rows(self) -> int:
        return len(self._active)

    @property
    def done(self) -> bool:
        return not self._active

    def tokens(self, row: int) -> Tokens:
        return self._results[self._active[row]].tokens

    def draft(self) -> Tokens:
        tokens = self._results[0].tokens
        room = self._limits.max_length - len(tokens) - 1
        if self._drafts.longest < 1 or room < 1 or self.rows != 1:
            return tokens[:0]
        return self._drafts.propose(tokens, room)

    def advance(self, logits: Logits) -> list[int]:
        sequences = [self._results[index].tokens for index in self._active]
        scores = self._score(sequences, logits)
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
        return rows

    def cancel(self) -> None:
        self._active = []

    def continuations(self) -> list[Continuation]:
        return self._results

    def _extend(self, index: int, logits: Logits, scores: Logits) -> None:
        """Appends the next token to a continuation, given the network's logits and the scores, each [vocab]."""
        result, logprobs = self._results[index], self._options.logprobs
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

    def _exact_top_k(self) -> int | None:
        """How many of the largest logits it looks at; None for all."""
        options = self._options
        if self._score.need_all or options.logprobs is not None:
            return None
        if not options.do_sample:
            return 1
        return None if options.top_h is not None else options.top_k or None
