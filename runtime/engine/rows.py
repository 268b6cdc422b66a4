"""Rows: which tokens each row of the KV cache holds, and which strategy uses it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from gpt2onnx.errors import OptionError

from ..arrays import CacheCopy, Float32Array, Logits, Tokens
from ..decoding.strategy import Strategy
from .draft_length import Acceptance
from .kv_cache import KVCache

_POSITIONS_STEP = 64  # the cache's positions are a multiple of this


class Network(Protocol):
    """The forward pass: see `runtime.engine.runner.Runner`."""

    @property
    def hidden(self) -> Float32Array: ...

    def new_cache(self, rows: int, positions: int) -> KVCache: ...

    def forward(
        self,
        cache: KVCache,
        rows: slice,
        tokens: Tokens,
        counts: Tokens,
        logits: Literal["last", "all"] = "last",
    ) -> Logits: ...


@dataclass(eq=False)
class Running:
    """A strategy under way, and the cache rows of its sequences, in their order; one for each prompt until these are computed.

    Attributes:
        strategy: the strategy.
        rows: of the cache.
        logits: after each computed prompt, [vocab].
        acceptance: how many tokens that were drafted for it are right; None before the first draft.
    """

    strategy: Strategy
    rows: list[int] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)
    acceptance: Acceptance | None = None

    @property
    def prompt(self) -> Tokens:
        """The prompt that its last row begins with."""
        return self.strategy.prompts[len(self.rows) - 1]


class Rows:
    """The rows of a KV cache. Rows in use come first, without gaps; the others keep their tokens for later prompts.

    Args:
        network: makes the cache.

    Attributes:
        cache: keys and values.
        held: of each row, the tokens whose keys and values it holds, int64 [length].
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self.cache = network.new_cache(0, 0)
        self.held: list[Tokens] = []
        self._owners: list[Running] = []

    @property
    def used(self) -> int:
        """Rows in use."""
        return len(self._owners)

    def reset(self) -> None:
        """Drops the tokens of rows that aren't in use."""
        self.held[self.used :] = [np.zeros(0, np.int64)] * (len(self.held) - self.used)

    def release_all(self) -> None:
        """Frees all rows."""
        self._owners.clear()

    def reserve(self, strategies: Sequence[Strategy], waiting: Sequence[Strategy], batch_size: int) -> None:
        """Makes room for strategies that begin, and in the same piece of memory for those that wait.

        Raises:
            OptionError: there isn't the memory.
        """
        rows = self.used + sum(strategy.rows for strategy in strategies)
        spare = max(0, batch_size - self.used - len(strategies))
        positions = max(strategy.positions for strategy in strategies)
        if rows + spare <= self.cache.rows and positions <= self.cache.positions:
            self.cache.reserve(rows)
            return
        try:
            larger = self._larger_cache(rows, spare, max(strategy.positions for strategy in waiting))
        except OptionError:
            try:
                larger = self._larger_cache(rows, spare, positions)
            except OptionError:
                if self.used or not self.held:
                    raise
                # Nothing runs: the memory of the old cache may do.
                self.cache, self.held = self._network.new_cache(0, 0), []
                larger = self._larger_cache(rows, spare, positions)
        larger.take_over(self.cache)
        self.cache = larger
        self.held += [np.zeros(0, np.int64)] * (larger.rows - len(self.held))

    def _larger_cache(self, rows: int, spare: int, positions: int) -> KVCache:
        positions = -(-positions // _POSITIONS_STEP) * _POSITIONS_STEP
        larger = self._network.new_cache(max(rows + spare, self.cache.rows), max(positions, self.cache.positions))
        larger.reserve(rows)
        return larger

    def match(self, other: "Rows") -> None:
        """Makes its cache as large as another one; drops its tokens where it was smaller.

        Raises:
            OptionError: there isn't the memory.
        """
        wanted = other.cache
        if self.cache.rows < wanted.rows or self.cache.positions < wanted.positions:
            cache = self._network.new_cache(wanted.rows, wanted.positions)
            cache.reserve(wanted.rows)
            self.cache, self.held = cache, [np.zeros(0, np.int64)] * wanted.rows

    def prefix(self, tokens: Tokens) -> tuple[int, int]:
        """The row that holds the longest prefix of the tokens, and the prefix' length."""
        shared = [common_prefix(tokens, held) for held in self.held]
        row = int(np.argmax(shared)) if shared else 0
        return row, shared[row] if shared else 0

    def begin_prompt(self, running: Running) -> None:
        """Gives a strategy's next prompt the next free row, with the longest prefix of it that the cache holds."""
        row = self.used
        running.rows.append(row)
        self._owners.append(running)
        # The last token is computed in any case, for its logits; all tokens, if somebody reads all of them.
        read = running.strategy.reader or running.strategy.hidden_reader
        reusable = running.prompt[:0] if read else running.prompt[:-1]
        source, length = self.prefix(reusable)
        present = common_prefix(reusable, self.held[row])
        self.keep(row, running.prompt[:present])
        if present < length:
            self.cache.copy([CacheCopy(source, row, present, length)])
            self.keep(row, running.prompt[:length])

    def keep(self, row: int, tokens: Tokens) -> None:
        """Notes the tokens that a row holds; positions beyond them are dropped."""
        self.held[row] = tokens
        self.cache.trim(row, len(tokens))

    def expand(self, running: Running, count: int) -> None:
        """Gives a strategy more rows, up to `count`."""
        while len(running.rows) < count:
            running.rows.append(self.used)
            self._owners.append(running)

    def rearrange(self, running: Running, sources: Sequence[int]) -> None:
        """Lets the first rows of a strategy continue other rows of the cache, and frees its rows beyond those."""
        rows = running.rows
        # Rows share the tokens up to where they last parted; only the others are copied.
        self._take([(source, row) for row, source in zip(rows, sources, strict=False) if source != row])
        running.rows, freed = rows[: len(sources)], rows[len(sources) :]
        for row in sorted(freed, reverse=True):
            last = self.used - 1
            if row != last:  # the last row fills the gap
                self._take([(last, row)])
                owner = self._owners[row] = self._owners[last]
                owner.rows[owner.rows.index(last)] = row
            self._owners.pop()

    def _take(self, pairs: list[tuple[int, int]]) -> None:
        """Makes each pair's second row a copy of its first."""
        new = [
            (target, self.held[source], common_prefix(self.held[source], self.held[target])) for source, target in pairs
        ]
        copies = [
            CacheCopy(source, target, start, len(tokens))
            for (source, target), (_, tokens, start) in zip(pairs, new, strict=True)
        ]
        # Until the copies are done only the shared beginning counts as held: an interrupt may leave the rest half written.
        for target, tokens, start in new:
            self.held[target] = tokens[:start]
        self.cache.copy(copies)
        for target, tokens, _ in new:
            self.held[target] = tokens


def common_prefix(one: Tokens, other: Tokens) -> int:
    """Number of tokens that two sequences share from the start."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
