"""Speculative decoding: a faster network drafts the next tokens, one pass of the network itself verifies them.

The strategy chooses every token from the network's own logits; a draft only says which positions are computed in one pass.
Drafts come from a fork of the strategy, so sampling, penalties and filters are drafted with as well.

The draft length is the one with the most expected tokens per second, by the times that passes take in this process and by
the share of drafted tokens that were right; it is 0 where drafting doesn't pay.
Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", section 3.
"""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from gpt2onnx.errors import BackendError, OptionError

from ..arrays import Logits, Tokens
from ..decoding.strategy import Strategy, advance
from .draft_length import Acceptance, PassTimes
from .rows import Network, Rows, Running, common_prefix

_log = logging.getLogger(__name__)
OPEN_AFTER = 48  # tokens, after which opening the drafting network has paid: it takes as long as it saves on this many
LONGEST = 7
# Length of a draft that measures: for one sequence, where a few more tokens cost hardly more, and for several.
_TRIAL, _TRIAL_OF_SEVERAL = 4, 1
# Steps without drafts where these don't pay, until the next trial; twice as many each time, up to the second number.
_FIRST_REST, _LONGEST_REST = 64, 2048
# Times are noisy, so drafts have to promise 5 % more tokens a second. One step in 64 goes without drafts: the time of such a
# step has to stay known.
_LEAST_GAIN, _STEPS_PER_PLAIN = 1.05, 64
_NOTHING = np.zeros(0, np.int64)


class Drafter:
    """Drafts the next tokens of sequences by a faster network.

    Args:
        open_network: opens it.
        shared: whether it works in the cache of the network itself, whose verifying pass overwrites what it leaves there;
            otherwise in a cache of its own.
        context: positions of the faster network.
        length: tokens of a draft; None: as many as pay.
        after: tokens after which it is opened; 0 opens it now.

    Raises:
        BackendError: it is to be opened now, and can't be.
    """

    def __init__(
        self, open_network: Callable[[], Network], *, shared: bool, context: int, length: int | None, after: int
    ) -> None:
        self._open_network, self._shared, self._context = open_network, shared, context
        self._length, self._left = length, after
        self._network = open_network() if after == 0 else None
        self._own: Rows | None = None
        self._draft_times, self._verify_times = PassTimes(), PassTimes()
        self._acceptance = Acceptance()
        self._rest = self._resting = _FIRST_REST
        self._drafted = 0

    def propose(self, rows: Rows, decoding: Sequence[Running]) -> list[Tokens]:
        """Drafts for the next pass, one for each running strategy; empty where none pays or none is possible."""
        single = [running for running in decoding if len(running.rows) == 1]
        network = (self._network or self._open(len(single))) if single else None
        length = self._choose_length(single, sum(len(running.rows) for running in decoding)) if network else 0
        forks = {
            running.rows[0]: fork
            for running in sorted(single, key=lambda running: running.rows)
            if length and (fork := running.strategy.fork()) and len(fork.tokens(0)) + length <= self._context
        }
        drafts = self._draft(network, rows, forks, length) if network and forks else {}
        return [drafts.get(running.rows[0], _NOTHING) for running in decoding]

    def reset(self) -> None:
        """Drops cached prefixes."""
        if self._own is not None:
            self._own.reset()

    def learn(
        self, decoding: Sequence[Running], drafts: Sequence[Tokens], right: Sequence[int], tokens: int, seconds: float
    ) -> None:
        """Takes note of a pass.

        Args:
            decoding: its strategies.
            drafts: their drafts.
            right: of each draft, how many tokens the strategy chose as well.
            tokens: of the pass, padding included.
            seconds: how long it took.
        """
        self._verify_times.note(tokens, seconds)
        for running, draft, count in zip(decoding, drafts, right, strict=True):
            if len(draft):
                for acceptance in (self._acceptance, running.acceptance):
                    if acceptance is not None:
                        acceptance.note(len(draft), count)

    def _open(self, tokens: int) -> Network | None:
        """The network, once enough tokens have been decoded; None before that, and where it can't be opened."""
        if self._left > 0:
            self._left -= tokens
            if self._left <= 0:
                try:
                    self._network = self._open_network()
                except BackendError as error:
                    _log.info("tokens aren't drafted: %s", error)
        return self._network

    def _choose_length(self, single: Sequence[Running], rows: int) -> int:
        """The length of the next drafts, for strategies of one sequence among all rows of the pass."""
        if self._length is not None:
            return self._length
        for running in single:
            if running.acceptance is None:
                running.acceptance = Acceptance(self._acceptance.share)
        trial = _TRIAL if rows == 1 else _TRIAL_OF_SEVERAL
        plain, draft = self._verify_times.expected(rows), self._draft_times.expected(rows)
        if plain is None:
            return 0
        if draft is None or self._verify_times.expected(rows * (1 + trial)) is None:
            return trial
        best, most, gained = 0, _LEAST_GAIN * rows / plain, 0.0
        for length in range(1, LONGEST + 1):
            gained += sum(running.acceptance.share**length for running in single if running.acceptance)
            verify = self._verify_times.expected(rows * (1 + length))
            if verify is not None and (rows + gained) / (verify + length * draft) > most:
                best, most = length, (rows + gained) / (verify + length * draft)
        if best:
            self._rest = self._resting = _FIRST_REST
            self._drafted += 1
            return best if self._drafted % _STEPS_PER_PLAIN else 0
        self._resting -= 1
        if self._resting:
            return 0
        self._rest = self._resting = min(2 * self._rest, _LONGEST_REST)
        # Measured anew: passes may take another time by now, as when a second graph was opened.
        self._draft_times, self._verify_times = PassTimes(), PassTimes()
        return 0

    def _draft(self, network: Network, rows: Rows, forks: dict[int, Strategy], length: int) -> dict[int, Tokens]:
        """Carries on forks, given by their rows in rising order, for up to `length` tokens."""
        if not self._shared:
            self._own = self._own or Rows(network)
            try:
                self._own.match(rows)
            except OptionError as error:
                _log.info("tokens aren't drafted any more: %s", error)
                self._network = None
                return {}
        held = self._own or rows
        before = {row: fork.tokens(0) for row, fork in forks.items()}
        starts = {row: common_prefix(held.held[row], tokens[:-1]) for row, tokens in before.items()}
        for row, start in starts.items():
            held.cache.trim(row, start)
        drafts: dict[int, list[int]] = {row: [] for row in forks}
        new = {row: tokens[starts[row] :] for row, tokens in before.items()}
        while new and length:
            began, length = time.perf_counter(), length - 1
            size, logits = self._pass(network, held, new)
            for row, row_logits in zip(list(new), logits, strict=True):
                advance(forks[row], row_logits[None])
                if forks[row].done:  # its last token needs no pass, so it is no draft
                    del new[row]
                else:
                    new[row] = forks[row].tokens(0)[-1:]
                    drafts[row].append(int(new[row][0]))
            self._draft_times.note(size, time.perf_counter() - began)
        found = {row: np.array(draft, np.int64) for row, draft in drafts.items()}
        for row, tokens in before.items():
            computed = np.append(tokens, found[row])[: held.cache.lengths[row]]
            held.keep(row, computed[: starts[row]] if self._shared else computed)
        return found

    @staticmethod
    def _pass(network: Network, held: Rows, new: dict[int, Tokens]) -> tuple[int, Logits]:
        """Computes the next tokens of rows; returns the number of tokens, padding included, and the logits [rows, vocab]."""
        counts = np.zeros(1 + max(new), np.int64)
        for row, tokens in new.items():
            counts[row] = len(tokens)
        padded = np.zeros((len(counts), counts.max()), np.int64)
        for row, tokens in new.items():
            padded[row, : len(tokens)] = tokens
        return padded.size, network.forward(held.cache, slice(0, len(counts)), padded, counts, "last")
