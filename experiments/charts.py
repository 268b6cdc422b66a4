"""Chart geometry: numbers in, positions and ticks out. Knows nothing of HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Units of a chart, which the page scales. Small, so that letters stay readable on a phone.
WIDTH, HEIGHT = 400.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 12.0, 14.0, 44.0

_MOST_TICKS = 6


@dataclass(frozen=True)
class Tick:
    """Tick of an axis: position and label."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to positions, with round ticks.

    Attributes:
        title: quantity and unit.
        low, high: values at the ends.
        begin, end: positions of the ends.
    """

    title: str
    low: float
    high: float
    begin: float
    end: float
    ticks: tuple[Tick, ...]

    def at(self, value: float) -> float:
        """The position of a value."""
        return round(_position(value, self.low, self.high, self.begin, self.end), 2)


def horizontal(title: str, values: Sequence[float], *, zero: bool = False, ticks: Sequence[float] = ()) -> Axis:
    """An axis from left to right."""
    return _axis(title, values, LEFT, WIDTH - RIGHT, zero=zero, own=ticks)


def vertical(title: str, values: Sequence[float], *, zero: bool = False) -> Axis:
    """An axis from the bottom up."""
    return _axis(title, values, HEIGHT - BOTTOM, TOP, zero=zero)


def _axis(
    title: str, values: Sequence[float], begin: float, end: float, *, zero: bool, own: Sequence[float] = ()
) -> Axis:
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    # Room for marks at the edges, except at zero.
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = (low if zero and low == 0 else low - room), high + room
    step = _round_step((high - low) / (_MOST_TICKS - 1))
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    marks = list(own) or [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    labels = [f"{mark:g}" if own else f"{mark + 0.0:,.{places}f}" for mark in marks]
    ticks = tuple(
        Tick(round(_position(mark, low, high, begin, end), 2), label.replace("-", "\N{MINUS SIGN}"))
        for mark, label in zip(marks, labels, strict=True)
    )
    return Axis(title, low, high, begin, end, ticks)


def _position(value: float, low: float, high: float, begin: float, end: float) -> float:
    return begin + (value - low) / (high - low) * (end - begin)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that isn't below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))
