"""KV cache: keys and values of the positions computed so far; the only owner of position.

Knows no tokens and no ONNX Runtime. A row is one sequence; its positions fill from the left, to a length of its own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import OptionError

from ..arrays import CacheCopy, CacheShape
from ..host import resources


class Storage(Protocol):
    """Memory of keys and values, laid out as an array of a cache's shape.

    Attributes:
        base: address of the memory; changes when the content moves.
    """

    base: int

    def copy(self, copies: Sequence[CacheCopy]) -> None:
        """Copies positions from row to row; all sources are read before any target is written."""
        ...

    def take_over(self, smaller: Any, rows: int) -> None:
        """Copies the first rows of a storage of the same kind that has no more rows and positions than this one."""
        ...


class HostStorage:
    """Keys and values in a NumPy array, `data`."""

    def __init__(self, shape: CacheShape, dtype: npt.DTypeLike) -> None:
        self.data: npt.NDArray[Any] = np.zeros(shape, dtype)
        self.base = int(self.data.ctypes.data)

    def copy(self, copies: Sequence[CacheCopy]) -> None:
        # A target that nobody reads is written at once; rows that trade places are set aside first.
        pending, sources = list(copies), {one.source for one in copies}
        while ready := [one for one in pending if one.target not in sources]:
            for one in ready:
                self._part(one.target, one)[:] = self._part(one.source, one)
            pending = [one for one in pending if one.target in sources]
            sources = {one.source for one in pending}
        parts = [self._part(one.source, one).copy() for one in pending]
        for one, part in zip(pending, parts, strict=True):
            self._part(one.target, one)[:] = part

    def _part(self, row: int, copy: CacheCopy) -> npt.NDArray[Any]:
        return self.data[:, :, row, :, copy.start : copy.end]

    def take_over(self, smaller: "HostStorage", rows: int) -> None:
        positions = smaller.data.shape[4]
        self.data[:, :, :rows, :, :positions] = smaller.data[:, :, :rows]


class KVCache:
    """Keys and values of all layers, and how many positions of each row are in use.

    Args:
        shape: [layer, key or value, row, head, position, size].
        dtype: of keys and values.
        storage: makes the memory for them.

    Attributes:
        storage: the keys and values.
        lengths: int64 [row], positions in use.
    """

    def __init__(
        self,
        shape: CacheShape,
        dtype: npt.DTypeLike = np.float32,
        storage: Callable[[CacheShape, npt.DTypeLike], Storage] = HostStorage,
    ) -> None:
        _, _, self.rows, _, self.positions, _ = self.shape = shape
        self._dtype = np.dtype(dtype)
        self.storage = storage(shape, dtype)
        self.lengths = np.zeros(self.rows, np.int64)
        self._reserved = 0

    @property
    def data(self) -> npt.NDArray[Any]:
        """The keys and values, where they are in host memory."""
        assert isinstance(self.storage, HostStorage)
        return self.storage.data

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self._dtype.itemsize

    def address(self, layer: int, part: int, row: int) -> int:
        """Address of a row's keys (part 0) or values (part 1) in one layer; the next rows follow it."""
        _, parts, rows, *row_shape = self.shape
        return self.storage.base + ((layer * parts + part) * rows + row) * math.prod(row_shape) * self._dtype.itemsize

    @property
    def reserved_bytes(self) -> int:
        """Memory of the rows that were ever in use."""
        return self.nbytes * self._reserved // self.rows if self.rows else 0

    def reserve(self, rows: int) -> None:
        """Allows the first `rows` rows to be written; until then they take no memory.

        Raises:
            OptionError: the new rows don't fit into the host's memory.
        """
        new = rows - self._reserved
        if new > 0 and isinstance(self.storage, HostStorage):
            check_memory(new, self.positions, self.nbytes * new // self.rows)
        self._reserved = max(rows, self._reserved)

    def advance(self, rows: slice, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Takes the next `counts` positions of each row into use; returns the lengths before, int64 [rows]."""
        past: npt.NDArray[np.int64] = self.lengths[rows].copy()
        self.lengths[rows] += counts
        return past

    def trim(self, row: int, length: int) -> None:
        """Drops a row's positions from `length` on."""
        self.lengths[row] = length

    def copy(self, copies: Sequence[CacheCopy]) -> None:
        """Makes each target row equal to its source row up to `end`; both are equal up to `start` already.

        All sources are read before any target is written, so rows may trade places.
        """
        if not copies:
            return
        self.storage.copy(copies)
        for one in copies:
            self.lengths[one.target] = one.end

    def take_over(self, smaller: "KVCache") -> None:
        """Copies the rows in use of a cache with no more rows and positions than this one.

        Raises:
            OptionError: they don't fit into the host's memory.
        """
        rows = int(np.flatnonzero(smaller.lengths).max(initial=-1)) + 1
        self.reserve(rows)
        self.storage.take_over(smaller.storage, rows)
        self.lengths[:rows] = smaller.lengths[:rows]


def check_memory(rows: int, positions: int, size: int) -> None:
    """Raises OptionError if `size` bytes, for rows [rows, positions], don't fit into the host's memory."""
    if short := resources.shortage(size):
        raise OptionError(
            f"{rows} sequences of {positions} tokens need {short}: lower the batch size, the beams or the length"
        )
