"""Strategies: the logits of a prompt's rows in, their next tokens out.

Knows neither text, cache nor onnxruntime. A search carries on one sequence a row; after each forward
pass `advance` lengthens them and says which row of the last pass each row of the next one continues.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..options import GenerationConfig
from .drafts import Drafts
from .filters import warp, warpers
from .processors import Processor, Tokens, process, processors
from .sampling import Candidates, Generator, Indices, Logits, log_softmax
from .torch_topk import ascending, largest

# Whether a sequence ends with the tokens it has now; the search's own end tokens and lengths aside.
Stop = Callable[[Tokens], bool]
# Takes the logits [positions, vocabulary] after the next tokens of a prompt; the array is overwritten later.
Reader = Callable[[Logits], None]

_NEVER = np.float32(-1e9)  # transformers' score for what must not be chosen


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of one generated token.

    Attributes:
        token_id: the token that was chosen.
        logprob: its log probability as the network gave it.
        processed_logprob: the same after all processors, which is what the choice was made from.
        top: the likeliest tokens as the network gave them, with their log probabilities, best first.
    """

    token_id: int
    logprob: float
    processed_logprob: float
    top: list[tuple[int, float]]


@dataclass
class Continuation:
    """One continuation of a prompt.

    Attributes:
        tokens: prompt and new tokens, int64 [length].
        finish_reason: "stop" (end token or stop string), "length" or "context"; None while it goes on.
        logprobs: of each new token, where they were asked for.
    """

    tokens: Tokens
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Search(Protocol):
    """One prompt's way through the network."""

    prompt: Tokens
    positions: int
    """Positions that a row may come to need in the cache."""
    reader: Reader | None
    """Who wants the logits of the whole prompt; None for nobody."""
    certain: int | None
    """At so many largest logits it looks; None for all."""

    @property
    def rows(self) -> int:
        """Sequences in the next forward pass; the first pass is over the prompt alone, once for all of them."""
        ...

    @property
    def done(self) -> bool: ...

    def tokens(self, row: int) -> Tokens:
        """The row's sequence; its last token is the one that the next forward pass takes."""
        ...

    def draft(self) -> Tokens:
        """Tokens that may well follow, to be verified in one forward pass; none where the search can't use them."""
        ...

    def advance(self, logits: Logits) -> list[int]:
        """Lengthens the sequences, given the logits [rows, vocabulary] after each row's last token.

        Returns:
            For each row of the next pass, the row of this pass that it continues.
        """
        ...

    def cancel(self) -> None:
        """Ends it where it is: it is done, and its rows are free."""
        ...

    def continuations(self) -> list[Continuation]:
        """The results, best first where they are ranked; unfinished ones as far as they are."""
        ...


class _Limits:
    """When a sequence ends: an end token, a stop string, its length, or the context window."""

    def __init__(self, prompt: Tokens, options: GenerationConfig, context: int, stop: Stop | None) -> None:
        wanted = len(prompt) + options.new_tokens(len(prompt))
        # The last token needs no position of its own: it is chosen from the logits of the one before.
        self.max_length = min(wanted, context + 1)
        self._full_reason = "length" if wanted <= context + 1 else "context"
        self._ends = frozenset(options.eos_token_ids)
        self._stop = stop

    def reason(self, tokens: Tokens) -> str | None:
        """The finish reason of a sequence, or None where it goes on."""
        if int(tokens[-1]) in self._ends or (self._stop is not None and self._stop(tokens)):
            return "stop"
        return self._full_reason if len(tokens) >= self.max_length else None


class Sampling:
    """Greedy decoding and sampling, of one or several continuations that share a stream of random numbers.

    Args:
        prompt: int64 [length].
        options: the strategy.
        context: positions the network has.
        stop: a further reason to end a sequence.
    """

    def __init__(self, prompt: Tokens, options: GenerationConfig, context: int, stop: Stop | None = None) -> None:
        self.prompt = prompt
        self._options = options
        self._limits = _Limits(prompt, options, context, stop)
        self._processors = processors(options, prompt)
        self._warpers = warpers(options)
        self._generator = Generator(options.seed) if options.do_sample else None
        count = options.num_return_sequences
        self._buffer = np.zeros((count, max(self._limits.max_length, len(prompt))), np.int64)
        self._buffer[:, : len(prompt)] = prompt
        self._results = [Continuation(self._buffer[index, : len(prompt)]) for index in range(count)]
        self._active = list(range(count))
        self._drafts = Drafts(options.prompt_lookup)
        self.reader: Reader | None = None
        self.certain = _certain(options, self._processors)
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
        row_of = {index: row for row, index in enumerate(self._active)}
        for index, result in enumerate(self._results):
            row = row_of.get(index)
            if row is not None:
                self._extend(index, result, logits[row])
            elif self._generator is not None:
                # transformers draws for finished sequences too, which moves the shared stream.
                self._generator.skip(logits.shape[-1])
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

    def _extend(self, index: int, result: Continuation, logits: Logits) -> None:
        scores, logprobs = process(self._processors, result.tokens, logits), self._options.logprobs
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


@dataclass(frozen=True)
class _Hypothesis:
    score: np.float32
    tokens: Tokens
    finished: bool


class BeamSearch:
    """Beam search and beam sampling, as transformers' `GenerationMixin._beam_search` defines them.

    Args:
        prompt: int64 [length].
        options: the strategy; num_beams at least 2.
        context: positions the network has.
        stop: a further reason to end a sequence.
    """

    def __init__(self, prompt: Tokens, options: GenerationConfig, context: int, stop: Stop | None = None) -> None:
        self.prompt = prompt
        self.rows = options.num_beams
        self._options = options
        self._limits = _Limits(prompt, options, context, stop)
        self._processors = processors(options, prompt)
        self._warpers = warpers(options)
        self._generator = Generator(options.seed) if options.do_sample else None
        # Enough candidates that num_beams go on even if all better ones end.
        self._candidates = max(2, 1 + len(options.eos_token_ids)) * self.rows
        self._running = np.tile(prompt, (self.rows, 1))
        # All rows are still the same: only the first may be continued.
        self._scores = np.full(self.rows, _NEVER, np.float32)
        self._scores[0] = 0
        self._best = [_Hypothesis(_NEVER, prompt, finished=False)] * self.rows
        self._improvable = True
        self._done = False
        self.reader: Reader | None = None
        self.certain: int | None = None
        self.positions = max(self._limits.max_length, len(prompt)) - 1

    @property
    def done(self) -> bool:
        return self._done

    def tokens(self, row: int) -> Tokens:
        tokens: Tokens = self._running[row]
        return tokens

    def draft(self) -> Tokens:
        return self.prompt[:0]

    def advance(self, logits: Logits) -> list[int]:
        scores = log_softmax(logits)
        for row, sequence in zip(scores, self._running, strict=True):
            for processor in self._processors:
                processor(sequence, row)
        chosen, log_probs = self._choose(scores)
        beams, tokens = np.divmod(chosen, logits.shape[-1])
        sequences = np.concatenate([self._running[beams], tokens[:, None]], axis=1)
        ended = np.array([self._limits.reason(sequence) is not None for sequence in sequences])

        # Those that ended don't go on; what goes on is chosen after they were told apart.
        running_scores = np.where(ended, log_probs + _NEVER, log_probs)
        going_on = largest(running_scores, self.rows)
        self._update_best(log_probs, sequences, ended)
        self._running = sequences[going_on]
        self._scores = running_scores[going_on]
        self._update_done(all_ended=bool(ended.all()))
        return [int(beam) for beam in beams[going_on]]

    def cancel(self) -> None:
        self._done = True

    def continuations(self) -> list[Continuation]:
        best = self._best[: self._options.num_return_sequences]
        return [Continuation(one.tokens, self._limits.reason(one.tokens) if one.finished else None) for one in best]

    def _choose(self, scores: Logits) -> tuple[Indices, Logits]:
        """Which of all next tokens [rows * vocabulary] may go on, and the log probabilities of the beams they make."""
        if self._generator is None:
            scores += self._scores[:, None]
            flat = scores.reshape(-1)
            chosen = largest(flat, self._candidates)
        else:
            rows = [warp(self._warpers, row) for row in scores]
            beams = [replace(row, scores=row.scores + score) for row, score in zip(rows, self._scores, strict=True)]
            candidates = Candidates.joined(beams)
            drawn, flat = self._generator.multinomial(candidates, self._candidates), candidates.dense()
            # Best first, as transformers does from 5.24 on; ties as torch.sort leaves them.
            chosen = drawn[ascending(-flat[drawn])]
        return chosen, flat[chosen]

    def _update_best(self, log_probs: Logits, sequences: Tokens, ended: npt.NDArray[np.bool_]) -> None:
        """Lets candidates that ended among the first num_beams take the place of worse ones."""
        new_tokens = len(sequences[0]) - len(self.prompt)
        scores = log_probs / _power(new_tokens, self._options.length_penalty)
        full = all(one.finished for one in self._best) and self._options.early_stopping is True
        eligible = ended & (np.arange(len(ended)) < self.rows)
        for excluded in (full, not self._improvable, ~eligible):
            scores = scores + np.multiply(excluded, _NEVER)

        def hypothesis(candidate: int) -> _Hypothesis:
            return _Hypothesis(scores[candidate], sequences[candidate], finished=bool(eligible[candidate]))

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
        self._improvable = self._improvable and any(best_possible > (worst if done else _NEVER) for done in finished)
        full = all(finished) and options.early_stopping is True
        self._done = all_ended or full or not self._improvable


def start(prompt: Tokens, options: GenerationConfig, context: int, stop: Stop | None = None) -> Search:
    """The search that the options ask for."""
    strategy = BeamSearch if options.num_beams > 1 else Sampling
    return strategy(prompt, options, context, stop)


def _certain(options: GenerationConfig, chain: list[Processor]) -> int | None:
    """At how many of the largest logits greedy search or sampling looks; None for all of them."""
    if chain or options.logprobs is not None:
        return None
    if not options.do_sample:
        return 1
    return None if options.top_h is not None else options.top_k or None


def _power(length: int, exponent: float) -> np.float32:
    """What divides the score of so many new tokens; infinite or 0 where float32 can't hold it."""
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(np.float64(length) ** exponent)


def token_logprobs(token: int, logits: Logits, scores: Logits, count: int) -> TokenLogprobs:
    """Log probabilities of a token and of so many likeliest ones, given the network's logits and what processors made of them."""
    raw = log_softmax(logits)
    best = largest(logits, count) if count else np.zeros(0, np.int64)
    with np.errstate(invalid="ignore"):  # where no token was possible at all
        processed = log_softmax(scores)
    return TokenLogprobs(token, float(raw[token]), float(processed[token]), [(int(i), float(raw[i])) for i in best])
