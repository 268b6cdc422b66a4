"""Keys and values of the positions computed so far; the only owner of position.

Knows no tokens and no onnxruntime. A row is one sequence; its positions are used from the left, each
row to a length of its own, so sequences of unequal length are never padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Copy:
    """Positions from `start` to before `end` of one row that another row is to take over."""

    source: int
    target: int
    start: int
    end: int


class Cache:
    """Keys and values of all layers in one array.

    Attributes:
        data: float [layer, key or value, row, head, position, size]; a slice of rows of one layer is
            contiguous in memory, so it can be handed to the graph as it is.
        mask: int64 [row, position], 1 for each position in use.
        lengths: int64 [row], positions in use.
        bindings: the session's own store of buffers bound to this cache.
    """

    def __init__(self, shape: tuple[int, int, int, int, int, int], dtype: npt.DTypeLike = np.float32) -> None:
        _, _, rows, _, positions, _ = shape
        self.data: npt.NDArray[Any] = np.zeros(shape, dtype)
        self.mask = np.zeros((rows, positions), np.int64)
        self.lengths = np.zeros(rows, np.int64)
        self.bindings: dict[Any, Any] = {}

    @property
    def rows(self) -> int:
        return int(self.data.shape[2])

    @property
    def positions(self) -> int:
        """Positions that a row can hold."""
        return int(self.data.shape[4])

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def advance(self, rows: slice, count: int) -> npt.NDArray[np.int64]:
        """Takes the next `count` positions of each row into use and returns them, int64 [rows, count]."""
        positions: npt.NDArray[np.int64] = self.lengths[rows, None] + np.arange(count)
        for row, length in enumerate(self.lengths[rows].tolist(), rows.start):
            self.mask[row, length : length + count] = 1
        self.lengths[rows] += count
        return positions

    def trim(self, row: int, length: int) -> None:
        """Forgets a row's positions from `length` on."""
        self.mask[row, length : self.lengths[row]] = 0
        self.lengths[row] = length

    def copy(self, copies: Sequence[Copy]) -> None:
        """Makes each target row equal to its source row up to `end`, as it already is up to `start`.

        All sources are read before any target is written, so rows may trade places.
        """
        parts = [self.data[:, :, one.source, :, one.start : one.end].copy() for one in copies]
        for one, part in zip(copies, parts, strict=True):
            self.trim(one.target, one.start)
            self.data[:, :, one.target, :, one.start : one.end] = part
            self.mask[one.target, : one.end] = 1
            self.lengths[one.target] = one.end

    def take_over(self, smaller: "Cache") -> None:
        """Copies the content of a cache with no more rows and positions than this one."""
        rows, positions = smaller.rows, smaller.positions
        self.data[:, :, :rows, :, :positions] = smaller.data
        self.mask[:rows, :positions] = smaller.mask
        self.lengths[:rows] = smaller.lengths
