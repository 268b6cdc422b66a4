"""Scheduler: picks the sequences of the next forward pass, and how many tokens of each it computes.

Knows neither text nor ONNX Runtime. Strategies begin as soon as there is room and leave as soon as they are done, so a long
job keeps its batch full. N new tokens cost one pass over the prompt and N - 1 passes over one token.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gpt2onnx.errors import OptionError

from ..arrays import Logits, Tokens
from ..decoding.strategy import Strategy, advance
from .rows import Network, Rows, Running, common_prefix
from .speculation import Drafter

MIN_CHUNK = 16  # prefill of fewer tokens costs the same
_FULL_PASS = 128  # tokens; prompts are padded to pass together up to this many, beyond which each token costs the same
_PADDING = 8  # tokens; padding a prompt by more costs more than a pass of its own
MAX_SCORED = 128  # positions whose logits [positions, vocab] are in memory at once


@dataclass
class _Queue:
    """Strategies that wait for room."""

    source: Iterator[Strategy | None]
    waiting: list[Strategy] = field(default_factory=list)
    open: bool = True

    def fill(self, count: int, tokens: int | None) -> bool:
        """Takes strategies from the source until enough wait.

        Args:
            count: strategies that are enough.
            tokens: prompt tokens that are enough; None for no limit.

        Returns:
            Whether the source is empty for now.
        """
        self.waiting = [strategy for strategy in self.waiting if not strategy.done]  # some were cancelled
        while self.open and len(self.waiting) < count:
            if self.waiting and tokens is not None and sum(len(each.prompt) for each in self.waiting) >= tokens:
                break
            try:
                strategy = next(self.source)
            except StopIteration:
                self.open = False
                break
            if strategy is None:
                return True
            if not strategy.done:
                self.waiting.append(strategy)
        return False


class Scheduler:
    """Runs strategies in one batch. Keeps the KV cache, so that later prompts reuse a shared prefix.

    Args:
        network: the forward pass.
        drafter: drafts tokens; None: only the strategies themselves do.
    """

    def __init__(self, network: Network, drafter: Drafter | None = None) -> None:
        self._network, self._drafter = network, drafter
        self._rows = Rows(network)
        self._decoding: list[Running] = []
        # Whose prompt is only partly computed: at most one, between two steps.
        self._prefilling: Running | None = None
        self._busy = False

    def run(
        self, strategies: Iterable[Strategy | None], batch_size: int = 1, chunk: int | None = None
    ) -> Iterator[Strategy | None]:
        """Decodes up to `batch_size` strategies at once. Yields a strategy after each step.

        A strategy is yielded for the last time when it is `done`; a cancelled one may not be yielded again. Closing the
        iterator ends all.

        Args:
            strategies: taken when there is room. None: the queue is empty; it is yielded at once, and the next step is
                run before the next strategy is asked for.
            batch_size: strategies that run at once.
            chunk: most prompt tokens computed between two decoding steps (chunked prefill); None for no limit.
        """
        # A run that is still open, such as a stream left for a while, keeps its rows; this one gets others.
        scheduler = Scheduler(self._network, self._drafter) if self._busy else self
        scheduler._busy = True
        try:
            yield from scheduler._run(_Queue(iter(strategies)), batch_size, chunk)
        finally:
            scheduler._rows.release_all()
            scheduler._decoding, scheduler._prefilling, scheduler._busy = [], None, False

    @property
    def reserved_bytes(self) -> int:
        """Memory that the KV cache has already."""
        return self._rows.cache.reserved_bytes

    def reset(self) -> None:
        """Drops cached prefixes."""
        self._rows.reset()
        if self._drafter is not None:
            self._drafter.reset()

    def _run(self, queue: _Queue, batch_size: int, chunk: int | None) -> Iterator[Strategy | None]:
        while queue.open or queue.waiting or self._prefilling or self._decoding:
            yield from self._prefill(queue, batch_size, chunk)
            self._release()
            if self._decoding:
                stepped = self._decoding
                self._step(stepped)
                for running in stepped:
                    yield running.strategy
                self._release()

    def _prefill(self, queue: _Queue, batch_size: int, chunk: int | None) -> Iterator[Strategy | None]:
        """Computes prompts while there is room for more strategies."""
        left = chunk
        while len(self._decoding) < batch_size:
            most = left if self._decoding else None
            if most is not None and chunk is not None and most < min(chunk, MIN_CHUNK):
                return
            if self._prefilling and self._prefilling.strategy.done:  # cancelled
                self._rows.rearrange(self._prefilling, [])
                self._prefilling = None
            if self._prefilling:
                group = [self._prefilling]
            else:
                if queue.fill(batch_size - len(self._decoding), left):
                    yield None
                if not queue.waiting:
                    if self._decoding or not queue.open:
                        return
                    continue
                strategies = self._together(queue.waiting, most)
                try:
                    strategies = self._reserve(strategies, queue.waiting, batch_size)
                except OptionError as error:
                    strategies[0].cancel(error)
                    yield strategies[0]
                    continue
                if not strategies:
                    return
                queue.waiting = [each for each in queue.waiting if each not in strategies]
                group = [Running(strategy) for strategy in strategies]
                for running in group:
                    running.strategy.begin()
                    self._rows.begin_prompt(running)
            computed = self._compute_prompts(group, most)
            if left is not None:
                left -= max(computed, MIN_CHUNK)
            self._prefilling = None if group[0] in self._decoding else group[0]
            if not self._prefilling:
                for running in group:
                    yield running.strategy
                self._release()

    def _reserve(self, strategies: list[Strategy], waiting: list[Strategy], batch_size: int) -> list[Strategy]:
        """Makes room for strategies; returns those that there is memory for.

        Raises:
            OptionError: there is none for the first one, though nothing else runs.
        """
        try:
            self._rows.reserve(strategies, waiting, batch_size)
        except OptionError:
            if self._decoding:  # it waits for one of them to end
                return []
            strategies = strategies[:1]
            self._rows.reserve(strategies, strategies, 1)
        return strategies

    def _release(self) -> None:
        """Frees the rows of strategies that are done, or were cancelled from outside."""
        done = [running for running in self._decoding if running.strategy.done]
        # From the last row on, so that none is moved to the place of another and freed there.
        for running in sorted(done, key=lambda running: max(running.rows, default=-1), reverse=True):
            self._rows.rearrange(running, [])
        self._decoding = [running for running in self._decoding if not running.strategy.done]

    def _together(self, waiting: list[Strategy], most: int | None) -> list[Strategy]:
        """The first waiting strategy, and those whose prompts cost less in one pass with its own than alone.

        Args:
            waiting: at least one.
            most: tokens of the pass; None for no limit.
        """
        most = _FULL_PASS if most is None else min(most, _FULL_PASS)
        shared = {id(each): self._rows.prefix(each.prompt[:-1])[1] for each in waiting}

        def new(strategy: Strategy) -> int:
            return len(strategy.prompt) - shared[id(strategy)]

        def joins(strategy: Strategy) -> bool:
            """Whether it has one sequence and, beyond the cache, shares no prefix with the others."""
            others = (common_prefix(strategy.prompt, other.prompt) for other in together)
            alone = strategy.rows > 1 or strategy.reader is not None
            return not alone and all(each < shared[id(strategy)] + MIN_CHUNK for each in others)

        together: list[Strategy] = []
        for strategy in sorted(waiting, key=lambda each: abs(new(each) - new(waiting[0]))):
            counts = [new(each) for each in (*together, strategy)]
            tokens = max(counts) * len(counts)
            if tokens <= most and tokens - sum(counts) <= _PADDING * len(together) and joins(strategy):
                together.append(strategy)
            elif not together:
                break
        return together or waiting[:1]

    def _compute_prompts(self, group: list[Running], most: int | None) -> int:
        """Computes the next tokens of prompts in one pass; begins to decode those that are complete.

        Args:
            group: in consecutive rows; one alone may be computed in parts.
            most: tokens of that one; None for no limit.

        Returns:
            Tokens of the pass, padding included.
        """
        alone = group[0].strategy if len(group) == 1 else None
        read = alone if alone and group[0].prompt is alone.prompt else None
        reader, hidden_reader = (read.reader, read.hidden_reader) if read else (None, None)
        if reader or hidden_reader:
            most = min(most or MAX_SCORED, MAX_SCORED)
        first = group[0].rows[-1]
        new = [each.prompt[len(self._rows.held[each.rows[-1]]) :] for each in group]
        new = [tokens[:most] for tokens in new] if alone else new
        counts = np.array([len(tokens) for tokens in new])
        tokens = np.zeros((len(new), counts.max()), np.int64)
        for row, each in zip(tokens, new, strict=True):
            row[: len(each)] = each
        rows = slice(first, first + len(group))
        logits = self._network.forward(
            self._rows.cache, rows, tokens, counts, "all" if reader or hidden_reader else "last"
        )
        if reader is not None:
            reader(logits)
        if hidden_reader is not None:
            hidden_reader(self._network.hidden)
        for running, count, last in zip(group, counts.tolist(), logits[-len(group) :], strict=True):
            row, prompt = running.rows[-1], running.prompt
            self._rows.held[row] = prompt[: len(self._rows.held[row]) + count]
            if len(self._rows.held[row]) < len(prompt):
                continue
            running.logits.append(last.copy())
            if len(running.logits) < len(running.strategy.prompts):
                self._rows.begin_prompt(running)
            else:
                self._begin_to_decode(running)
        return tokens.size

    def _begin_to_decode(self, running: Running) -> None:
        """Lets a strategy choose its first tokens; its sequences share the prompts in equal parts."""
        strategy, logits, prompts = running.strategy, np.stack(running.logits), running.rows.copy()
        shape = len(prompts), strategy.rows // len(prompts), logits.shape[-1]
        self._rows.expand(running, strategy.rows)
        advance(strategy, np.broadcast_to(logits[:, None], shape).reshape(-1, logits.shape[-1]))
        running.logits.clear()
        if not strategy.done:
            self._rows.rearrange(running, np.repeat(prompts, strategy.rows // len(prompts)).tolist())
        self._decoding.append(running)

    def _step(self, decoding: list[Running]) -> None:
        """Computes the last token of every sequence, and drafts behind some; each strategy chooses the next ones."""
        drafts, drafter = self._drafts(decoding)
        rows = 1 + max(row for running in decoding for row in running.rows)
        longest = 1 + max(len(draft) for draft in drafts)
        tokens, counts = np.zeros((rows, longest), np.int64), np.zeros(rows, np.int64)
        sequences = {}
        for running, draft in zip(decoding, drafts, strict=True):
            for index, row in enumerate(running.rows):
                sequences[row] = running.strategy.tokens(index)
                tokens[row, 0], tokens[row, 1 : 1 + len(draft)] = sequences[row][-1], draft
                counts[row] = 1 + len(draft)
        began = time.perf_counter()
        which: Literal["last", "all"] = "last" if longest == 1 else "all"
        logits = self._network.forward(self._rows.cache, slice(0, rows), tokens, counts, which)
        seconds = time.perf_counter() - began
        for row, sequence in sequences.items():  # only now: a row that an interrupt left uncomputed isn't held
            self._rows.held[row] = sequence
        place = np.cumsum(counts) - counts  # of each row's first logits
        parents, right = [], []
        for running, draft in zip(decoding, drafts, strict=True):
            if len(draft):
                (row,) = running.rows
                right.append(self._accept(running, draft, logits[place[row] : place[row] + counts[row]]))
                parents.append([0])
            else:
                right.append(0)
                if running.strategy.hidden_reader is not None:
                    running.strategy.hidden_reader(self._network.hidden[place[running.rows]])
                parents.append(advance(running.strategy, _of_rows(logits, place[running.rows].tolist())))
        if drafter is not None:
            drafter.learn(decoding, drafts, right, tokens.size, seconds)
        for running, sources in zip(decoding, parents, strict=True):
            if not running.strategy.done:
                self._rows.rearrange(running, [running.rows[source] for source in sources])

    def _drafts(self, decoding: list[Running]) -> tuple[list[Tokens], Drafter | None]:
        """For each strategy, the tokens that are computed behind its last one, none for most; and the drafter that was asked."""
        if len(decoding) == 1 and len(draft := decoding[0].strategy.draft()):
            return [draft], None
        if self._drafter is not None:
            return self._drafter.propose(self._rows, decoding), self._drafter
        return [np.zeros(0, np.int64)] * len(decoding), None

    def _accept(self, running: Running, draft: Tokens, logits: Logits) -> int:
        """Lets a strategy choose tokens as long as they are the drafted ones, and once more; returns how many were.

        Args:
            running: the strategy, of one sequence.
            draft: int64 [length].
            logits: [length + 1, vocab], after the sequence and after each drafted token.
        """
        strategy, (row,) = running.strategy, running.rows
        before, right = strategy.tokens(0), 0
        for guess, each in zip([*draft.tolist(), None], logits, strict=True):
            advance(strategy, each[None])
            if strategy.done or strategy.tokens(0)[-1] != guess:
                break
            right += 1
        self._rows.keep(row, np.append(before, draft)[: len(before) + right])
        return right


def _of_rows(logits: Logits, rows: list[int]) -> Logits:
    """The logits of some rows, without a copy where the rows are contiguous."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return logits[rows[0] : rows[0] + len(rows)]
    return logits[rows]
