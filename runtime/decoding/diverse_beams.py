"""Diverse beam search, as transformers' `_group_beam_search` and `BeamSearchScorer` define it up to release 4.56.

Source: Vijayakumar et al. 2018, "Diverse Beam Search".
"""

import numpy as np

from gpt2onnx.errors import OptionError

from ..arrays import Logits, Tokens
from ..extensions import Extensions
from ..options import GenerationConfig
from .beam_search import NEVER
from .logprobs import TokenLogprobs, scored_token
from .strategy import Continuation, Decoding, Stop
from .torch_random import log_softmax
from .torch_topk import largest


class _Group:
    """Beams that compete with each other.

    Attributes:
        tokens: of its beams, int64 [beams, length].
        scores: log probability of each beam, float32 [beams].
        logprobs: of each beam's new tokens, if they were asked for.
        ended: best continuations that have ended, at most one for each beam.
        done: whether no better ones are to be expected.
    """

    def __init__(self, prompt: Tokens, beams: int) -> None:
        self.tokens = np.tile(prompt, (beams, 1))
        # All beams are still the same: only the first may be continued.
        self.scores = np.full(beams, NEVER, np.float32)
        self.scores[0] = 0
        self.logprobs: list[list[TokenLogprobs]] = [[] for _ in range(beams)]
        self.ended: list[Continuation] = []
        self.done = False


class DiverseBeams(Decoding):
    """Diverse beam search: each group of beams is led away from the tokens that the groups before it have chosen."""

    def __init__(
        self, prompt: Tokens, options: GenerationConfig, context: int, stop: Stop | None, extensions: Extensions
    ) -> None:
        super().__init__(prompt, options, context, stop, extensions)
        if extensions.stopping_criteria:
            raise OptionError("diverse beams end by end tokens only: leave out num_beam_groups or stopping_criteria")
        self._beams = options.num_beams // options.num_beam_groups
        self._groups = [_Group(prompt, self._beams) for _ in range(options.num_beam_groups)]
        self.positions = max(self._limits.max_length, len(prompt)) - 1

    @property
    def _open(self) -> list[_Group]:
        return [group for group in self._groups if not group.done]

    @property
    def rows(self) -> int:
        return self._beams * len(self._open)

    def tokens(self, row: int) -> Tokens:
        tokens: Tokens = self._open[row // self._beams].tokens[row % self._beams]
        return tokens

    def advance(self, logits: Logits) -> list[int]:
        chosen = np.zeros(logits.shape[-1], np.float32)  # how often, by the groups so far
        sources: list[int] = []
        row = 0
        for group in self._groups:
            if group.done:
                # transformers pads its beams with the first end token, which leads the next groups away from it.
                end = self._options.eos_token_ids[0]
                chosen[end : end + 1] += self._beams
                continue
            own = logits[row : row + self._beams]
            # transformers subtracts behind sequence_bias, which comes to the same.
            scores = log_softmax(own) - np.float32(self._options.diversity_penalty) * chosen
            scores = self._score(list(group.tokens), scores)
            if self._extensions.constraint is not None and not group.ended:
                self._extensions.constraint.check(scores)
            parents = self._advance(group, own, scores)
            np.add.at(chosen, group.tokens[:, -1], 1)
            if not group.done:
                sources += [row + parent for parent in parents]
            row += self._beams
        self.done = not self._open or self._reason(self._open[0].tokens[0]) is not None
        return sources

    def continuations(self) -> list[Continuation]:
        found: list[Continuation] = []
        for group in self._groups:
            ended = group.ended
            if not group.done:
                for tokens, score, logprobs in zip(group.tokens, group.scores, group.logprobs, strict=True):
                    ended = self._with(ended, Continuation(tokens, self._reason(tokens), logprobs, float(score)))
            found += ended
        ranked = sorted(found, key=_score_of)[::-1]  # of equal ones, transformers takes the last first
        return ranked[: self._options.num_return_sequences]

    def _advance(self, group: _Group, logits: Logits, scores: Logits) -> list[int]:
        """Lengthens a group's beams, given logits and scores [beams, vocab]; returns the beam that each one continues."""
        options, ends = self._options, self._options.eos_token_ids
        flat = (scores + group.scores[:, None]).reshape(-1)
        # Enough candidates that all beams go on even if all better ones end.
        best = largest(flat, max(2, 1 + len(ends)) * self._beams)
        going_on: list[tuple[int, Tokens, np.float32, list[TokenLogprobs]]] = []
        for rank, candidate in enumerate(best.tolist()):
            beam, token = divmod(candidate, logits.shape[-1])
            tokens, logprobs = np.append(group.tokens[beam], token), group.logprobs[beam]
            if options.logprobs is not None:
                found = scored_token(token, logits[beam], float(scores[beam, token]), options.logprobs)
                logprobs = [*logprobs, found]
            if token not in ends:
                going_on.append((beam, tokens, flat[candidate], logprobs))
            elif rank < self._beams:
                one = Continuation(tokens, "stop", logprobs, float(flat[candidate]))
                group.ended = self._with(group.ended, one)
            if len(going_on) == self._beams:
                break
        parents = [beam for beam, *_ in going_on]
        group.tokens = np.stack([tokens for _, tokens, *_ in going_on])
        group.scores = np.array([score for *_, score, _ in going_on])
        group.logprobs = [logprobs for *_, logprobs in going_on]
        length = group.tokens.shape[1]
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = self._limits.max_length
        full = len(group.ended) == self._beams
        possible = self._per_length(float(flat[best[0]]), length)
        group.done = full and (options.early_stopping is True or min(map(_score_of, group.ended)) >= possible)
        return parents

    def _with(self, ended: list[Continuation], one: Continuation) -> list[Continuation]:
        """The best of those that have ended and another one, whose score is still its log probability."""
        one.score = self._per_length(_score_of(one), len(one.tokens))
        if len(ended) < self._beams:
            return [*ended, one]
        worst = min(range(len(ended)), key=lambda index: _score_of(ended[index]))
        if _score_of(one) <= _score_of(ended[worst]):
            return ended
        return [*ended[:worst], *ended[worst + 1 :], one]

    def _per_length(self, log_probability: float, length: int) -> float:
        """A score; 0 or infinite where a float can't hold it."""
        with np.errstate(all="ignore"):
            divisor = np.float64(length - len(self.prompt)) ** self._options.length_penalty
            return float(np.float64(log_probability) / divisor)

    def _reason(self, tokens: Tokens) -> str | None:
        return self._limits.reason(tokens) if len(tokens) > len(self.prompt) else None


def _score_of(one: Continuation) -> float:
    assert one.score is not None
    return one.score
