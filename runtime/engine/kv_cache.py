"""Keys and values of the positions computed so far; the only owner of position.

Knows no tokens and no onnxruntime. A row is one sequence; its positions are used from the left, each
row to a length of its own, so sequences of unequal length are never padded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import OptionError

from ..host import resources

# [layer, key or value, row, head, position, size]
Shape = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Copy:
    """Positions from `start` to before `end` of one row that another row is to take over."""

    source: int
    target: int
    start: int
    end: int


def check_room(rows: int, positions: int, size: int) -> None:
    """Refuses so many sequences of so many tokens where what they need can't fit into memory.

    Args:
        rows: sequences.
        positions: tokens in each.
        size: bytes that they need.

    Raises:
        OptionError: with the numbers, and what to lower.
    """
    if short := resources.shortage(size):
        raise OptionError(
            f"{rows} sequences of {positions} tokens need {short}: lower the batch size, the beams or the length"
        )


class Storage(Protocol):
    """Where keys and values lie: a piece of memory laid out as an array of a cache's shape.

    Attributes:
        base: address of the memory; another one when the content has moved.
    """

    base: int

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copies positions from row to row; all sources are read before any target is written."""
        ...

    def take_over(self, smaller: Any, rows: int) -> None:
        """Copies the first rows of a storage of the same kind, with no more rows and positions than this one."""
        ...


class HostStorage:
    """Keys and values in a NumPy array, `data`."""

    def __init__(self, shape: Shape, dtype: npt.DTypeLike) -> None:
        self.data: npt.NDArray[Any] = np.zeros(shape, dtype)
        self.base = int(self.data.ctypes.data)

    def copy(self, copies: Sequence[Copy]) -> None:
        # What nobody reads any more can be written at once; rows that trade places have to be set aside.
        pending, sources = list(copies), {one.source for one in copies}
        while ready := [one for one in pending if one.target not in sources]:
            for one in ready:
                self._part(one.target, one)[:] = self._part(one.source, one)
            pending = [one for one in pending if one.target in sources]
            sources = {one.source for one in pending}
        parts = [self._part(one.source, one).copy() for one in pending]
        for one, part in zip(pending, parts, strict=True):
            self._part(one.target, one)[:] = part

    def _part(self, row: int, copy: Copy) -> npt.NDArray[Any]:
        return self.data[:, :, row, :, copy.start : copy.end]

    def take_over(self, smaller: "HostStorage", rows: int) -> None:
        positions = smaller.data.shape[4]
        self.data[:, :, :rows, :, :positions] = smaller.data[:, :, :rows]


class Cache:
    """Keys and values of all layers, and which positions of each row they stand for.

    Args:
        shape: [layer, key or value, row, head, position, size].
        dtype: of keys and values.
        storage: makes the memory for them.

    Attributes:
        storage: the keys and values.
        mask: int64 [row, position], 1 for each position in use.
        lengths: int64 [row], positions in use.
        bindings: the session's own store of buffers bound to this cache.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: npt.DTypeLike = np.float32,
        storage: Callable[[Shape, npt.DTypeLike], Storage] = HostStorage,
    ) -> None:
        _, _, self.rows, _, self.positions, _ = self.shape = shape
        self._dtype = np.dtype(dtype)
        self.storage = storage(shape, dtype)
        self.mask = np.zeros((self.rows, self.positions), np.int64)
        self.lengths = np.zeros(self.rows, np.int64)
        self.bindings: dict[Any, Any] = {}
        self._claimed = 0

    @property
    def data(self) -> npt.NDArray[Any]:
        """The keys and values, where they lie in the host's memory."""
        assert isinstance(self.storage, HostStorage)
        return self.storage.data

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self._dtype.itemsize

    def address(self, layer: int, part: int, row: int) -> int:
        """Of a row's keys (part 0) or values (part 1) in one layer; those of the next rows follow it."""
        _, parts, rows, *row_shape = self.shape
        return self.storage.base + ((layer * parts + part) * rows + row) * math.prod(row_shape) * self._dtype.itemsize

    @property
    def claimed_bytes(self) -> int:
        """What the rows that were ever in use take."""
        return self.nbytes * self._claimed // self.rows if self.rows else 0

    def claim(self, rows: int) -> None:
        """Says that so many rows come to be used; those beyond take no memory until then.

        Raises:
            OptionError: what is new among them can't fit into the host's memory.
        """
        new = rows - self._claimed
        if new > 0 and isinstance(self.storage, HostStorage):
            check_room(new, self.positions, self.nbytes * new // self.rows)
        self._claimed = max(rows, self._claimed)

    def advance(self, rows: slice, count: int, lengths: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
        """Takes the next `count` positions of each row, or so many of them, into use; returns all, int64 [rows, count]."""
        begins = self.lengths[rows]
        ends = begins + (count if lengths is None else lengths)
        positions: npt.NDArray[np.int64] = begins[:, None] + np.arange(count)
        for row, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True), rows.start):
            self.mask[row, begin:end] = 1
        self.lengths[rows] = ends
        return positions

    def trim(self, row: int, length: int) -> None:
        """Forgets a row's positions from `length` on."""
        self.mask[row, length : self.lengths[row]] = 0
        self.lengths[row] = length

    def copy(self, copies: Sequence[Copy]) -> None:
        """Makes each target row equal to its source row up to `end`, as it already is up to `start`.

        All sources are read before any target is written, so rows may trade places.
        """
        if not copies:
            return
        self.storage.copy(copies)
        for one in copies:
            self.trim(one.target, one.start)
            self.mask[one.target, : one.end] = 1
            self.lengths[one.target] = one.end

    def take_over(self, smaller: "Cache") -> None:
        """Copies the rows in use of a cache with no more rows and positions than this one.

        Raises:
            OptionError: they can't fit into the host's memory.
        """
        rows, positions = int(np.flatnonzero(smaller.lengths).max(initial=-1)) + 1, smaller.positions
        self.claim(rows)
        self.storage.take_over(smaller.storage, rows)
        self.mask[:rows, :positions] = smaller.mask[:rows]
        self.lengths[:rows] = smaller.lengths[:rows]
