"""Flax's msgpack files: nested mappings, whose arrays are a shape, a type and the numbers.

https://github.com/msgpack/msgpack/blob/master/spec.md
https://github.com/google/flax/blob/main/flax/serialization.py
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

from gpt2onnx.errors import CheckpointError

from ....models.messages import one_line
from ..arrays import FLOATS, StoredArray, StridedArray, dense_strides, item_size
from .saved import SavedWeights

_DEEPEST = 16  # mappings in mappings
_NDARRAY = 1  # Flax's kind of an extension
# First bytes of values: bytes of their length, which follows.
_MAPS = {0xDE: 2, 0xDF: 4}
_TEXTS, _BYTES, _EXTENSIONS = {0xD9: 1, 0xDA: 2, 0xDB: 4}, {0xC4: 1, 0xC5: 2, 0xC6: 4}, {0xC7: 1, 0xC8: 2, 0xC9: 4}
_NUMBERS = (
    {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
    | {0xCC + n: 1 << n for n in range(4)}
    | {0xD0 + n: 1 << n for n in range(4)}
)
_SHORT_EXTENSIONS = {0xD4 + n: 1 << n for n in range(5)}


def open_flax(path: Path) -> SavedWeights:
    """The arrays of a file, named by the keys that lead to them, with slashes between.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            arrays = dict(_Reader(path, content).arrays())
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, LookupError) as error:  # an empty file can't be mapped
        raise CheckpointError(f"{path} is not a whole msgpack file of Flax: {one_line(error)}") from error
    return SavedWeights(path, arrays)


class _Reader:
    """Walks through a file.

    Args:
        path: its name.
        content: its bytes.
    """

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, 0

    def arrays(self, name: str = "", depth: int = 0) -> Iterator[tuple[str, StoredArray]]:
        """The arrays of the next value."""
        first = self._byte()
        count = first & 0x0F if first >> 4 == 0x8 else self._length(_MAPS, first)
        if count is not None:
            if depth == _DEEPEST:
                raise ValueError("its mappings are too deep")
            for _ in range(count):
                key = self._text()
                yield from self.arrays(f"{name}/{key}" if name else key, depth + 1)
        elif (size := _SHORT_EXTENSIONS.get(first, self._length(_EXTENSIONS, first))) is not None:
            kind, end = self._byte(), self._at + size
            if end > len(self._content):
                raise ValueError(f"it ends inside {name}")
            if kind == _NDARRAY:
                yield name, self._array(name, end)
            self._at = end
        elif first in _NUMBERS:
            self._at += _NUMBERS[first]
        elif 0x7F < first < 0xE0:
            raise ValueError(f"{name} is no array")

    def _array(self, name: str, end: int) -> StoredArray:
        if self._byte() != 0x93 or (axes := self._byte()) >> 4 != 0x9:
            raise ValueError(f"{name} is damaged")
        shape = tuple(self._number() for _ in range(axes & 0x0F))
        dtype = self._text()
        size = self._length(_BYTES, self._byte())
        if size is None or self._at + size != end or (dtype in FLOATS and math.prod(shape) * item_size(dtype) != size):
            raise ValueError(f"{name} has another size than its shape")
        return StridedArray(self._path, name, shape, dtype, self._at, dense_strides(shape))

    def _text(self) -> str:
        first = self._byte()
        size = first & 0x1F if first >> 5 == 0x5 else self._length(_TEXTS, first)
        if size is None:
            raise ValueError("a key is no text")
        self._at += size
        return self._content[self._at - size : self._at].decode("utf-8")

    def _number(self) -> int:
        first = self._byte()
        return first if first < 0x80 else self._big_endian({0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}[first])

    def _length(self, kinds: dict[int, int], first: int) -> int | None:
        """The length of a value that begins with this byte; None if it is of other kinds."""
        return self._big_endian(kinds[first]) if first in kinds else None

    def _big_endian(self, size: int) -> int:
        self._at += size
        return int.from_bytes(self._content[self._at - size : self._at], "big")

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]
