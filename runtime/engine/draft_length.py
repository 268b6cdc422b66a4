"""What the length of drafts follows from: how long passes take in this process, and how many drafted tokens are right."""

from collections import deque

_KEPT = 5  # passes of a size whose median counts; of two the shorter one, since noise only lengthens
_CLOSE = 1.5  # a pass of this many times the tokens is still like the other
_MEMORY = 100  # drafted tokens, about, that a share of right ones is taken over


class PassTimes:
    """Seconds of a network's forward passes by their number of tokens, padding included."""

    def __init__(self) -> None:
        self._passes: dict[int, deque[float]] = {}
        self._seconds: dict[int, float] = {}  # their medians

    def note(self, tokens: int, seconds: float) -> None:
        """Notes a pass. The first one of a size doesn't count: it allocates and binds memory."""
        if tokens not in self._passes:
            self._passes[tokens] = deque(maxlen=_KEPT)
            return
        passes = self._passes[tokens]
        passes.append(seconds)
        self._seconds[tokens] = sorted(passes)[(len(passes) - 1) // 2]

    def expected(self, tokens: int) -> float | None:
        """Seconds of a pass; None where neither a pass of about its size was noted, nor a smaller and a larger one."""
        seconds = self._seconds
        below = max((size for size in seconds if size <= tokens), default=None)
        above = min((size for size in seconds if size > tokens), default=None)
        if below and above:
            return seconds[below] + (tokens - below) / (above - below) * (seconds[above] - seconds[below])
        if below:
            if tokens > _CLOSE * below:
                return None
            # On the line through this size and the next smaller one.
            smaller = max((size for size in seconds if size < below), default=0)
            slope = (seconds[below] - seconds.get(smaller, 0.0)) / (below - smaller)
            return seconds[below] + max(0.0, slope) * (tokens - below)
        return seconds[above] if above and above <= _CLOSE * tokens else None


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
