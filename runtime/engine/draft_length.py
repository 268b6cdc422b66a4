"""What the length of drafts follows from: how long passes take in this process, and how many drafted tokens are right."""

from bisect import bisect_left, bisect_right
from collections import deque

_KEPT = 5  # passes of a size whose median counts
_CLOSE = 1.5  # a pass of this many times the tokens is still like the other
_MEMORY = 100  # drafted tokens, about, that a share of right ones is taken over


class PassTimes:
    """Seconds of a network's forward passes by their number of tokens, padding included."""

    def __init__(self) -> None:
        self._passes: dict[int, deque[float]] = {}
        self._sizes: list[int] = []  # with at least one time, rising
        self._seconds: list[float] = []  # medians, one for each size

    def note(self, tokens: int, seconds: float) -> None:
        """Notes a pass. The first one of a size doesn't count: it allocates and binds memory."""
        if tokens not in self._passes:
            self._passes[tokens] = deque(maxlen=_KEPT)
            return
        passes = self._passes[tokens]
        passes.append(seconds)
        place = bisect_left(self._sizes, tokens)
        if len(passes) == 1:
            self._sizes.insert(place, tokens)
            self._seconds.insert(place, seconds)
        else:
            self._seconds[place] = sorted(passes)[len(passes) // 2]

    def expected(self, tokens: int) -> float | None:
        """Seconds of a pass; None where neither a pass of about its size was noted, nor a smaller and a larger one."""
        sizes, seconds = self._sizes, self._seconds
        after = bisect_right(sizes, tokens)
        if 0 < after < len(sizes):
            share = (tokens - sizes[after - 1]) / (sizes[after] - sizes[after - 1])
            return seconds[after - 1] + share * (seconds[after] - seconds[after - 1])
        if not sizes:
            return None
        if after == 0:
            return seconds[0] if sizes[0] <= _CLOSE * tokens else None
        return seconds[-1] * tokens / sizes[-1] if tokens <= _CLOSE * sizes[-1] else None


class Acceptance:
    """The share of drafted tokens that were right.

    Args:
        share: where it begins, as if ten tokens had been drafted.
    """

    def __init__(self, share: float = 0.8) -> None:
        self._right, self._tried = 10 * share, 10.0

    @property
    def share(self) -> float:
        return self._right / self._tried

    def note(self, drafted: int, right: int) -> None:
        """Notes a draft, of which the first `right` tokens were right; those behind a wrong one say nothing."""
        tried = min(right + 1, drafted)
        fading = (1 - 1 / _MEMORY) ** tried
        self._right, self._tried = fading * self._right + right, fading * self._tried + tried
