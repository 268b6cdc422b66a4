"""The decoding loop: which sequences take part in the next forward pass, and in which rows of the cache.

Knows neither text nor onnxruntime: the network is anything with `new_cache` and `forward`. Searches
join as soon as there is room and leave as soon as they are done, so a long job keeps its batch full.
N new tokens of a prompt cost one pass over the prompt and N - 1 passes over one token.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import OptionError

from ..decoding.processors import Tokens
from ..decoding.sampling import Logits
from ..decoding.strategy import Search
from .kv_cache import Cache, Copy

_POSITIONS_STEP = 64  # the cache grows by so many positions at a time
_LEAST_PASS = 16  # tokens of a prompt: a pass over fewer takes about as long
_FULL_PASS = 128  # tokens: a pass over more takes no less time for each
_PADDING = 8  # tokens that take less time than a pass of its own for another prompt
_MOST_READ = 128  # positions whose logits are in memory together, where all of them are wanted


class Network(Protocol):
    """The forward pass; see `runtime.session.Session`."""

    def new_cache(self, rows: int, positions: int) -> Cache: ...

    def forward(
        self,
        cache: Cache,
        rows: slice,
        tokens: npt.NDArray[np.int64],
        keep: int = 1,
        lengths: npt.NDArray[np.int64] | None = None,
        certain: int | None = None,
    ) -> Logits: ...


@dataclass
class _Running:
    """A search under way, and the rows of the cache that its own rows use, in their order."""

    search: Search
    slots: list[int]


@dataclass
class _Joining:
    """A search whose prompt is passing through the network, into a row of the cache beyond those in use."""

    search: Search
    slot: int
    length: int  # of the prompt, so much is in the cache


@dataclass
class _Queue:
    """Searches that wait for room, and the one that is joining."""

    source: Iterator[Search | None]
    waiting: list[Search] = field(default_factory=list)
    joining: _Joining | None = None
    open: bool = True

    def fill(self, count: int, tokens: int | None) -> bool:
        """Lets so many wait, or prompts of so many tokens, if there are as many; says whether the source has none just now."""
        # Those that were cancelled before they began don't count.
        self.waiting = [search for search in self.waiting if not search.done]
        while self.open and len(self.waiting) < count:
            if self.waiting and tokens is not None and sum(len(each.prompt) for each in self.waiting) >= tokens:
                break
            try:
                search = next(self.source)
            except StopIteration:
                self.open = False
                break
            if search is None:
                return True
            if not search.done:
                self.waiting.append(search)
        return False


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

    def run(
        self, searches: Iterable[Search | None], batch_size: int = 1, chunk: int | None = None
    ) -> Iterator[Search | None]:
        """Decodes searches, so many at a time, and yields each of them whenever it has advanced.

        A search is yielded for the last time when it is `done`; one that was cancelled may not be yielded again.
        Closing the iterator ends all.

        Args:
            searches: taken as there is room. A None among them is yielded at once and says that nothing waits
                just now: what runs takes its next step before the next one is asked for.
            batch_size: searches that run at a time.
            chunk: while others run, about so many tokens of prompts at most go through the network between
                two of their steps; None for no limit.
        """
        # A run that is still open, such as a stream left for a while, keeps its rows; this one gets others.
        decoder = Decoder(self._network) if self._busy else self
        decoder._busy = True
        try:
            yield from decoder._run(_Queue(iter(searches)), batch_size, chunk)
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

    def _run(self, queue: _Queue, batch_size: int, chunk: int | None) -> Iterator[Search | None]:
        active: list[_Running] = []
        while queue.open or queue.waiting or active:
            yield from self._admit(queue, active, batch_size, chunk)
            active = self._going_on(active)
            if not active:
                continue
            # Several tokens after a past go through the network for one sequence at a time only.
            if len(active) == 1 and len(draft := active[0].search.draft()):
                self._verify(active[0], draft)
            else:
                self._step(active)
            for running in active:
                yield running.search
            active = self._going_on(active)

    def _admit(
        self, queue: _Queue, active: list[_Running], batch_size: int, chunk: int | None
    ) -> Iterator[Search | None]:
        """Lets searches join while there is room, and adds them to the active ones."""
        left = chunk
        while len(active) < batch_size:
            most = left if active else None
            if most is not None and chunk is not None and most < min(chunk, _LEAST_PASS):
                return
            if queue.joining is None:
                if queue.fill(batch_size - len(active), left):
                    yield None
                if not queue.waiting:
                    if active or not queue.open:
                        return
                    continue
                searches = self._together(queue.waiting, most)
                try:
                    self._make_room(searches, queue.waiting, batch_size)
                except OptionError:
                    # There is no memory for it beside the others: it waits for one of them to end.
                    if not active:
                        raise
                    return
                queue.waiting = [search for search in queue.waiting if search not in searches]
                if len(searches) > 1:
                    joined = self._join_together(searches)
                    if left is not None:
                        left -= len(searches) * max(len(search.prompt) for search in searches)
                    active += joined
                    for running in joined:
                        yield running.search
                    active[:] = self._going_on(active)
                    continue
                queue.joining = self._enter(searches[0])
            joining = queue.joining
            if not joining.search.done:  # otherwise it was cancelled on the way
                begin = joining.length
                logits = self._prefill(joining, most)
                if left is not None:
                    left -= max(joining.length - begin, _LEAST_PASS)
                if joining.length < len(joining.search.prompt):
                    continue
                running = self._join(joining, logits)
                if not running.search.done:
                    active.append(running)
                yield running.search
            queue.joining = None

    def _going_on(self, active: list[_Running]) -> list[_Running]:
        """Those that aren't done; the rows of others are freed, also where they were cancelled from outside."""
        done = [running for running in active if running.search.done]
        if not done:
            return active
        # From the last row on, so that none is moved to the place of another and freed there.
        for running in sorted(done, key=lambda running: max(running.slots, default=-1), reverse=True):
            self._rearrange(running, [])
        return [running for running in active if not running.search.done]

    def _together(self, waiting: list[Search], most: int | None) -> list[Search]:
        """The first that waits, with others whose prompts pass through the network with its own in less time than alone.

        Args:
            waiting: at least one.
            most: so many tokens at most; None for no limit.
        """
        most = _FULL_PASS if most is None else min(most, _FULL_PASS)
        together: list[Search] = []
        for search in sorted(waiting, key=lambda search: abs(len(search.prompt) - len(waiting[0].prompt))):
            lengths = [len(each.prompt) for each in (*together, search)]
            tokens = max(lengths) * len(lengths)
            if tokens <= most and tokens - sum(lengths) <= _PADDING * len(together) and self._is_new(search, together):
                together.append(search)
            elif not together:
                break
        return together or waiting[:1]

    def _is_new(self, search: Search, others: list[Search]) -> bool:
        """Whether a search is of one row and begins as nothing that the cache holds or is about to hold."""
        if search.rows > 1 or search.reader is not None:
            return False
        known = [*self._held, *(other.prompt for other in others)]
        return all(common_prefix(search.prompt, held) < _LEAST_PASS for held in known)

    def _join_together(self, searches: list[Search]) -> list[_Running]:
        """Lets searches of one row begin on the first rows that are free, their prompts in one pass."""
        first = len(self._owners)
        lengths = np.array([len(search.prompt) for search in searches])
        tokens = np.zeros((len(searches), lengths.max()), np.int64)
        for row, search in enumerate(searches):
            tokens[row, : lengths[row]] = self._held[first + row] = search.prompt
            self._cache.trim(first + row, 0)
        rows = slice(first, first + len(searches))
        certain = _certain(searches)
        logits = self._network.forward(self._cache, rows, tokens, lengths=lengths, certain=certain)[:, -1]
        joined = [_Running(search, [slot]) for slot, search in enumerate(searches, first)]
        self._owners += joined
        for row, running in enumerate(joined):
            running.search.advance(logits[row : row + 1])
        return joined

    def _enter(self, search: Search) -> _Joining:
        """Takes over what the cache holds of a search's prompt."""
        first = len(self._owners)
        # The last token has to pass through the network in any case, for its logits; where all are wanted, every token.
        beginning = search.prompt[:-1] if search.reader is None else search.prompt[:0]
        shared = [common_prefix(beginning, held) for held in self._held]
        source = int(np.argmax(shared))
        if shared[first] < shared[source]:
            self._cache.copy([Copy(source, first, shared[first], shared[source])])
        self._cache.trim(first, shared[source])
        self._held[first] = search.prompt[: shared[source]]
        return _Joining(search, first, shared[source])

    def _prefill(self, joining: _Joining, most: int | None) -> Logits:
        """Runs the next tokens of a prompt through the network, and returns the logits after the last one."""
        search, slot, begin = joining.search, joining.slot, joining.length
        if search.reader is not None:
            most = min(most or _MOST_READ, _MOST_READ)
        tokens = search.prompt[begin : None if most is None else begin + most]
        keep = 1 if search.reader is None else len(tokens)
        certain = search.certain if search.reader is None else None
        logits = self._network.forward(self._cache, slice(slot, slot + 1), tokens[None], keep, certain=certain)[0]
        joining.length += len(tokens)
        self._held[slot] = search.prompt[: joining.length]
        if search.reader is not None:
            search.reader(logits)
        last: Logits = logits[-1]
        return last

    def _join(self, joining: _Joining, logits: Logits) -> _Running:
        """Lets a search whose prompt is in the cache begin, on the first rows that are free."""
        search, first = joining.search, len(self._owners)
        if first < joining.slot:  # others have ended meanwhile
            shared = common_prefix(self._held[first], search.prompt)
            self._take([Copy(joining.slot, first, shared, len(search.prompt))])
        running = _Running(search, list(range(first, first + search.rows)))
        self._owners += [running] * search.rows
        search.advance(np.broadcast_to(logits, (search.rows, len(logits))))
        self._rearrange(running, [first] * search.rows)
        return running

    def _step(self, active: list[_Running]) -> None:
        """Runs the last token of every row through the network, and lets each search choose the next ones."""
        tokens = np.empty((len(self._owners), 1), np.int64)
        for running in active:
            for row, slot in enumerate(running.slots):
                self._held[slot] = running.search.tokens(row)
                tokens[slot] = self._held[slot][-1]
        certain = _certain([running.search for running in active])
        logits = self._network.forward(self._cache, slice(0, len(self._owners)), tokens, certain=certain)[:, -1]
        parents = [running.search.advance(_rows(logits, running.slots)) for running in active]
        for running, rows in zip(active, parents, strict=True):
            if not running.search.done:
                self._rearrange(running, [running.slots[row] for row in rows])

    def _verify(self, running: _Running, draft: Tokens) -> None:
        """Runs the last token and a draft of what follows through the network, and keeps what the search would have chosen."""
        search = running.search
        start = search.tokens(0)
        tokens = np.append(start[-1:], draft)
        certain = search.certain
        logits = self._network.forward(self._cache, slice(0, 1), tokens[None], keep=len(tokens), certain=certain)[0]
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

    def _make_room(self, searches: list[Search], waiting: list[Search], batch_size: int) -> None:
        """For searches that are to join, and in the same piece of memory for those that wait."""
        rows = len(self._owners) + sum(search.rows for search in searches)
        spare = max(0, batch_size - len(self._owners) - len(searches))
        positions = max(search.positions for search in searches)
        if rows + spare <= self._cache.rows and positions <= self._cache.positions:
            self._cache.claim(rows)
            return
        try:
            larger = self._larger_cache(rows, spare, max(search.positions for search in waiting))
        except OptionError:
            larger = self._larger_cache(rows, spare, positions)
        larger.take_over(self._cache)
        self._cache = larger
        self._held += [np.zeros(0, np.int64)] * (larger.rows - len(self._held))

    def _larger_cache(self, rows: int, spare: int, positions: int) -> Cache:
        positions = -(-positions // _POSITIONS_STEP) * _POSITIONS_STEP
        larger = self._network.new_cache(max(rows + spare, self._cache.rows), max(positions, self._cache.positions))
        larger.claim(rows)
        return larger


def common_prefix(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences share from the start."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length


def _certain(searches: list[Search]) -> int | None:
    """At how many of the largest logits any of the searches looks; None for all."""
    certain = 1
    for search in searches:
        if search.certain is None:
            return None
        certain = max(certain, search.certain)
    return certain


def _rows(logits: Logits, slots: list[int]) -> Logits:
    """The logits of some rows, without a copy where they lie one after another."""
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return logits[slots[0] : slots[0] + len(slots)]
    return logits[slots]
