"""The decoding loop: which sequences take part in the next forward pass, and in which rows of the cache.

Knows neither text nor onnxruntime: the network is anything with `new_cache` and `forward`. Searches
join as soon as there is room and leave as soon as they are done, so a long job keeps its batch full.
N new tokens of a prompt cost one pass over the prompt and N - 1 passes over one token.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import OptionError

from .cache import Cache, Copy
from .logits import Tokens
from .sampling import Logits
from .search import Search

_POSITIONS_STEP = 64  # the cache grows by so many positions at a time


class Network(Protocol):
    """The forward pass; see `runtime.session.Session`."""

    def new_cache(self, rows: int, positions: int) -> Cache: ...

    def forward(self, cache: Cache, rows: slice, tokens: npt.NDArray[np.int64], keep: int = 1) -> Logits: ...


@dataclass
class _Running:
    """A search under way, and the rows of the cache that its own rows use, in their order."""

    search: Search
    slots: list[int]


class Decoder:
    """Runs searches together, and keeps the cache for later ones whose prompts begin alike.

    Args:
        network: the forward pass.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._cache = network.new_cache(0, 0)
        # Of each row of the cache, also of those not in use any more, the tokens that it holds.
        self._held: list[Tokens] = []
        # Whose each row in use is; those are the first ones, without gaps.
        self._owners: list[_Running] = []
        self._busy = False

    def run(self, searches: Iterable[Search | None], batch_size: int = 1) -> Iterator[Search | None]:
        """Decodes searches, so many at a time, and yields each of them whenever it has advanced.

        A search is yielded for the last time when it is `done`. A None among them is yielded at once.
        Closing the iterator ends all.
        """
        # A run that is still open, such as a stream left for a while, keeps its rows; this one gets others.
        decoder = Decoder(self._network) if self._busy else self
        decoder._busy = True
        try:
            yield from decoder._run(iter(searches), batch_size)
        finally:
            decoder._owners.clear()
            decoder._busy = False

    @property
    def held_bytes(self) -> int:
        """What the cache takes already."""
        return self._cache.claimed_bytes

    def forget(self) -> None:
        """Lets later searches share nothing with earlier ones, as if they were the first."""
        if not self._busy:
            self._held = [np.zeros(0, np.int64)] * len(self._held)

    def _run(self, waiting: Iterator[Search | None], batch_size: int) -> Iterator[Search | None]:
        active: list[_Running] = []
        while True:
            for search in _while_room(waiting, active, batch_size):
                if search is not None:
                    try:
                        running = self._prefill(search, batch_size)
                    except OptionError:
                        # There is no memory for it beside the others: it waits for one of them to end.
                        if not active:
                            raise
                        waiting = chain([search], waiting)
                        break
                    if not search.done:
                        active.append(running)
                yield search
            if not active:
                return
            # Several tokens after a past go through the network for one sequence at a time only.
            if len(active) == 1 and len(draft := active[0].search.draft()):
                self._verify(active[0], draft)
            else:
                self._step(active)
            for running in active:
                yield running.search
            active = [running for running in active if not running.search.done]

    def _prefill(self, search: Search, batch_size: int) -> _Running:
        """Runs the prompt through the network, once for all rows of the search."""
        first = len(self._owners)
        self._make_room(first + search.rows, search.positions, spare=max(0, batch_size - 1 - first))
        prompt = search.prompt
        # The last token has to pass through the network in any case, for its logits.
        shared = [common_prefix(prompt[:-1], held) for held in self._held]
        source = int(np.argmax(shared))
        if shared[first] < shared[source]:
            self._cache.copy([Copy(source, first, shared[first], shared[source])])
        self._cache.trim(first, shared[source])
        logits = self._network.forward(self._cache, slice(first, first + 1), prompt[None, shared[source] :])[:, -1]
        self._held[first] = prompt

        running = _Running(search, list(range(first, first + search.rows)))
        self._owners += [running] * search.rows
        search.advance(np.broadcast_to(logits, (search.rows, logits.shape[-1])))
        self._rearrange(running, [first] * search.rows)
        return running

    def _step(self, active: list[_Running]) -> None:
        """Runs the last token of every row through the network, and lets each search choose the next ones."""
        tokens = np.empty((len(self._owners), 1), np.int64)
        for running in active:
            for row, slot in enumerate(running.slots):
                self._held[slot] = running.search.tokens(row)
                tokens[slot] = self._held[slot][-1]
        logits = self._network.forward(self._cache, slice(0, len(self._owners)), tokens)[:, -1]
        parents = [running.search.advance(_rows(logits, running.slots)) for running in active]
        for running, rows in zip(active, parents, strict=True):
            self._rearrange(running, [running.slots[row] for row in rows])

    def _verify(self, running: _Running, draft: Tokens) -> None:
        """Runs the last token and a draft of what follows through the network, and keeps what the search would have chosen."""
        search = running.search
        start = search.tokens(0)
        tokens = np.append(start[-1:], draft)
        logits = self._network.forward(self._cache, slice(0, 1), tokens[None], keep=len(tokens))[0]
        accepted = len(start)
        for guess in [*draft.tolist(), None]:
            search.advance(logits[accepted - len(start)][None])
            if search.done or search.tokens(0)[-1] != guess:
                break
            accepted += 1
        self._held[0] = np.append(start, draft)[:accepted]
        self._cache.trim(0, accepted)
        self._rearrange(running, running.slots)

    def _rearrange(self, running: _Running, sources: list[int]) -> None:
        """Lets the rows of a search continue other rows of the cache, and frees those that it needs no more."""
        slots = running.slots
        if running.search.done:
            sources = []
        elif sources == slots:
            return
        # Rows share what they held before they last parted, so only what differs is copied.
        copies = [
            Copy(source, slot, common_prefix(self._held[source], self._held[slot]), len(self._held[source]))
            for slot, source in zip(slots, sources, strict=False)
            if source != slot
        ]
        self._take(copies)
        running.slots, freed = slots[: len(sources)], slots[len(sources) :]
        for slot in sorted(freed, reverse=True):
            last = len(self._owners) - 1
            if slot != last:
                shared = common_prefix(self._held[last], self._held[slot])
                self._take([Copy(last, slot, shared, len(self._held[last]))])
                owner = self._owners[slot] = self._owners[last]
                owner.slots[owner.slots.index(last)] = slot
            self._owners.pop()

    def _take(self, copies: list[Copy]) -> None:
        self._cache.copy(copies)
        held = [self._held[one.source] for one in copies]
        for one, tokens in zip(copies, held, strict=True):
            self._held[one.target] = tokens

    def _make_room(self, rows: int, positions: int, spare: int) -> None:
        """For so many rows and positions, and `spare` rows that others may need soon."""
        if rows + spare <= self._cache.rows and positions <= self._cache.positions:
            self._cache.claim(rows)
            return
        positions = -(-positions // _POSITIONS_STEP) * _POSITIONS_STEP
        larger = self._network.new_cache(max(rows + spare, self._cache.rows), max(positions, self._cache.positions))
        larger.claim(rows)
        larger.take_over(self._cache)
        self._cache = larger
        self._held += [np.zeros(0, np.int64)] * (larger.rows - len(self._held))


def _while_room(waiting: Iterator[Search | None], active: list[_Running], batch_size: int) -> Iterator[Search | None]:
    while len(active) < batch_size:
        try:
            yield next(waiting)
        except StopIteration:
            return


def common_prefix(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences share from the start."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length


def _rows(logits: Logits, slots: list[int]) -> Logits:
    """The logits of some rows, without a copy where they lie one after another."""
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return logits[slots[0] : slots[0] + len(slots)]
    return logits[slots]
