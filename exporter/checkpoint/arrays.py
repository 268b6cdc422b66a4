"""Arrays in checkpoint files, read one at a time. Knows no network."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import ml_dtypes  # noqa: F401  # lets NumPy know bfloat16
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from gpt2onnx.errors import CheckpointError

from ...models import limits

FLOATS = ("float32", "float16", "bfloat16", "float64")
_SAFETENSORS_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class StoredArray(Protocol):
    """An array in a file.

    Attributes:
        path: the file.
        name: in the file.
        shape: in the file.
        dtype: type of its numbers by NumPy's name, or by the file's if NumPy has none.
    """

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...

    def read(self) -> npt.NDArray[np.generic]:
        """The numbers as they are stored.

        Raises:
            CheckpointError: the file is damaged, or has gone.
        """
        ...


@dataclass(frozen=True)
class SafetensorsArray:
    """An array in a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> npt.NDArray[np.generic]:
        try:
            with safe_open(self.path, framework="np") as file:
                array: npt.NDArray[np.generic] = file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: can't read tensor {self.name}: {error}") from error
        return array


@dataclass(frozen=True)
class StridedArray:
    """An array in a file of raw little-endian numbers: PyTorch's storages, and views of them. Two of the same numbers are equal.

    Attributes:
        offset: of its first number in the file, in bytes.
        strides: per axis, in numbers.
    """

    path: Path
    name: str = field(compare=False)
    shape: tuple[int, ...]
    dtype: str
    offset: int
    strides: tuple[int, ...]

    def read(self) -> npt.NDArray[np.generic]:
        size = item_size(self.dtype)
        # Only from the first to the last number: a storage can be far larger than a view of it.
        count = extent(self.shape, self.strides)
        try:
            raw = np.fromfile(self.path, np.uint8, count * size, offset=self.offset)
        except OSError as error:
            raise CheckpointError(f"{self.path}: can't read tensor {self.name}: {error.strerror or error}") from error
        if len(raw) != count * size:
            raise CheckpointError(f"{self.path} ends inside tensor {self.name}: fetch or save it again")
        steps = tuple(stride * size for stride in self.strides)
        return np.lib.stride_tricks.as_strided(raw.view(np.dtype(self.dtype)), self.shape, steps)


@dataclass(frozen=True)
class DerivedArray(ABC):
    """Base of arrays that are computed from a stored one: they have its file, its name and, unless they say so, its type."""

    stored: StoredArray
    shape: tuple[int, ...]

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @abstractmethod
    def read(self) -> npt.NDArray[np.generic]: ...


@dataclass(frozen=True)
class ReshapedArray(DerivedArray):
    """An array that its file stores in another shape, of as many numbers."""

    def read(self) -> npt.NDArray[np.generic]:
        return self.stored.read().reshape(self.shape)


def without_first_axis(array: StoredArray, axes: int) -> StoredArray:
    """The array without a first axis of length 1.

    Raises:
        CheckpointError: it has another number of axes, or its first one isn't of length 1.
    """
    if len(array.shape) != 1 + axes or array.shape[0] != 1:
        wanted = ", ".join(["1", *"nm"[:axes]])
        raise CheckpointError(f"{array.path}: tensor {array.name} has shape {list(array.shape)}, not [{wanted}]")
    return ReshapedArray(array, array.shape[1:])


@dataclass(frozen=True)
class ZeroArray:
    """Zeros: the biases of a network that was built without them."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def read(self) -> npt.NDArray[np.generic]:
        return np.zeros(self.shape, np.float32)


def item_size(dtype: str) -> int:
    """Bytes of one number."""
    return np.dtype(dtype).itemsize


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in numbers, of an array whose numbers lie one behind another, those of the last axis first."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Numbers from an array's first to its last, both included. No stride may be negative."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def with_aliases(arrays: Mapping[str, StoredArray], metadata: object) -> dict[str, StoredArray]:
    """The arrays, also by the names that a file's metadata gives them.

    safetensors.torch.save_model writes tensors that share memory, such as a tied head, once, and notes their other names:
    {"transformer.wte.weight": "lm_head.weight"}.
    """
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    return {alias: arrays[kept] for alias, kept in pairs if isinstance(kept, str) and kept in arrays} | dict(arrays)


def open_safetensors(path: Path) -> dict[str, StoredArray]:
    """The arrays of a safetensors file by name, and by the other names that it notes.

    Raises:
        CheckpointError: the file is missing, damaged or truncated.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: fetch or save the checkpoint again")
    arrays: dict[str, StoredArray] = {}
    try:
        with path.open("rb") as start:
            if int.from_bytes(start.read(8), "little") > limits.TENSOR_HEADER:
                raise CheckpointError(
                    f"{path} is no safetensors file: its header would have more than {limits.TENSOR_HEADER:,} bytes"
                )
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # a method, not a dictionary's
                view = file.get_slice(name)
                stored = str(view.get_dtype())
                arrays[name] = SafetensorsArray(
                    path, name, tuple(view.get_shape()), _SAFETENSORS_TYPES.get(stored, stored)
                )
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    return with_aliases(arrays, metadata)
