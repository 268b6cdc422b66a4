"""Beam search and beam sampling."""

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ..arrays import Logits, Tokens
from ..extensions import Extensions
from ..options import GenerationConfig
from .filters import warp
from .logprobs import TokenLogprobs, scored_token
from .strategy import Continuation, Decoding, Stop
from .torch_random import Candidates, Indices, log_softmax
from .torch_topk import ascending, largest

NEVER = np.float32(-1e9)  # transformers' score for what must not be chosen


@dataclass(frozen=True)
class _Hypothesis:
    score: np.float32
    tokens: Tokens
    finished: bool
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class BeamSearch(Decoding):
    """Beam search and beam sampling, as transformers' `GenerationMixin._beam_search` defines them; num_beams is at least 2."""

    def __init__(
        self, prompt: Tokens, options: GenerationConfig, context: int, stop: Stop | None, extensions: Extensions
    ) -> None:
        super().__init__(prompt, options, context, stop, extensions)
        self.rows = options.num_beams
        # Enough candidates that num_beams go on even if all better ones end.
        self._candidates = max(2, 1 + len(options.eos_token_ids)) * self.rows
        self._running = np.tile(prompt, (self.rows, 1))
        # All rows are still the same: only the first may be continued.
        self._scores = np.full(self.rows, NEVER, np.float32)
        self._scores[0] = 0
        # Of each row's new tokens, if they were asked for.
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in range(self.rows)]
        self._best = [_Hypothesis(NEVER, prompt, finished=False)] * self.rows
        # Sequences that a criterion of the caller's ended.
        self._stopped: set[bytes] = set()
        self._improvable = True
        self.positions = max(self._limits.max_length, len(prompt)) - 1

    def tokens(self, row: int) -> Tokens:
        tokens: Tokens = self._running[row]
        return tokens

    def advance(self, logits: Logits, negative: Logits | None = None) -> list[int]:
        scores = self._score(list(self._running), log_softmax(logits), negative)
        chosen, log_probs = self._choose(scores)
        beams, tokens = np.divmod(chosen, logits.shape[-1])
        sequences = np.concatenate([self._running[beams], tokens[:, None]], axis=1)
        logprobs = self._longer_logprobs(beams, tokens, logits, scores)
        ended = np.array([self._limits.reason(sequence) is not None for sequence in sequences])
        if self._extensions.stopping_criteria:
            stopped = self._extensions.stops(sequences, scores[beams])
            self._stopped |= {sequence.tobytes() for sequence in sequences[stopped]}
            ended |= stopped

        # Candidates that ended don't go on: their scores fall below all others before the best are taken.
        running_scores = np.where(ended, log_probs + NEVER, log_probs)
        going_on = largest(running_scores, self.rows)
        self._update_best(log_probs, sequences, ended, logprobs)
        self._running = sequences[going_on]
        self._logprobs = [logprobs[candidate] for candidate in going_on.tolist()]
        self._scores = running_scores[going_on]
        self._update_done(all_ended=bool(ended.all()))
        if self._extensions.constraint is not None and not any(one.finished for one in self._best):
            self._extensions.constraint.check(scores)
        return [int(beam) for beam in beams[going_on]]

    def continuations(self) -> list[Continuation]:
        best = self._best[: self._options.num_return_sequences]
        return [Continuation(one.tokens, self._reason(one), one.logprobs, float(one.score)) for one in best]

    def _reason(self, one: _Hypothesis) -> str | None:
        if not one.finished:
            return "stop" if self.done else None  # fewer texts than beams were possible
        return "stop" if one.tokens.tobytes() in self._stopped else self._limits.reason(one.tokens)

    def _choose(self, scores: Logits) -> tuple[Indices, Logits]:
        """Which of all next tokens [rows * vocabulary] may go on, and the log probabilities of the beams they make."""
        if self._generator is None:
            flat = (scores + self._scores[:, None]).reshape(-1)
            chosen = largest(flat, self._candidates)
        else:
            rows = [warp(self._warpers, row) for row in scores]
            beams = [replace(row, scores=row.scores + score) for row, score in zip(rows, self._scores, strict=True)]
            candidates = Candidates.joined(beams)
            drawn, flat = self._generator.multinomial(candidates, self._candidates), candidates.dense()
            # Best first, as transformers does from 5.24 on; ties as torch.sort leaves them.
            chosen = drawn[ascending(-flat[drawn])]
        return chosen, flat[chosen]

    def _longer_logprobs(
        self, beams: Indices, tokens: Tokens, logits: Logits, scores: Logits
    ) -> list[list[TokenLogprobs]]:
        """Those of each candidate; none if they weren't asked for."""
        count = self._options.logprobs
        if count is None:
            return [[] for _ in beams]
        if self._warpers:
            scores = np.stack([warp(self._warpers, row).dense() for row in scores])
        return [
            [*self._logprobs[beam], scored_token(token, logits[beam], float(scores[beam, token]), count)]
            for beam, token in zip(beams.tolist(), tokens.tolist(), strict=True)
        ]

    def _update_best(
        self,
        log_probs: Logits,
        sequences: Tokens,
        ended: npt.NDArray[np.bool_],
        logprobs: list[list[TokenLogprobs]],
    ) -> None:
        """Lets candidates that ended among the first num_beams replace worse hypotheses."""
        new_tokens = len(sequences[0]) - len(self.prompt)
        scores = log_probs / _power(new_tokens, self._options.length_penalty)
        full = all(one.finished for one in self._best) and self._options.early_stopping is True
        eligible = ended & (np.arange(len(ended)) < self.rows)
        for excluded in (full, not self._improvable, ~eligible):
            scores = scores + np.multiply(excluded, NEVER)

        def hypothesis(candidate: int) -> _Hypothesis:
            finished = bool(eligible[candidate])
            return _Hypothesis(scores[candidate], sequences[candidate], finished, logprobs[candidate])

        ranking = largest(np.append(np.array([one.score for one in self._best]), scores), self.rows).tolist()
        self._best = [self._best[rank] if rank < self.rows else hypothesis(rank - self.rows) for rank in ranking]

    def _update_done(self, *, all_ended: bool) -> None:
        options = self._options
        finished = [one.finished for one in self._best]
        new_tokens = len(self._running[0]) - len(self.prompt)
        if options.early_stopping == "never" and options.length_penalty > 0:
            new_tokens = self._limits.max_length - len(self.prompt)
        best_possible = self._scores[0] / _power(new_tokens, options.length_penalty)
        worst = min(one.score for one in self._best)
        self._improvable = self._improvable and any(best_possible > (worst if done else NEVER) for done in finished)
        full = all(finished) and options.early_stopping is True
        self.done = all_ended or full or not self._improvable


def _power(length: int, exponent: float) -> np.float32:
    """The divisor of the score of `length` new tokens; infinite or 0 where float32 can't hold it."""
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(np.float64(length) ** exponent)
