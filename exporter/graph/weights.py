"""Where graphs keep their weights: one after another in an external data file, or in the graph itself."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import StringStringEntryProto, TensorProto, ValueInfoProto, helper, numpy_helper

# ONNX Runtime memory-maps each weight where it lies: large ones begin with a page, small ones with a cache line.
_PAGE, _CACHE_LINE = 4096, 64
_LARGE = 1 << 20  # bytes


# Stores a weight; gives an initializer of that name for it.
Store: TypeAlias = Callable[[str, npt.NDArray[np.generic]], TensorProto]


class WeightsFile:
    """An external data file: each array at an aligned offset."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file

    def append(self, name: str, array: npt.NDArray[np.generic]) -> TensorProto:
        self._file.write(bytes(-self._file.tell() % (_PAGE if array.nbytes >= _LARGE else _CACHE_LINE)))
        array = np.ascontiguousarray(array)
        place = {"location": self._path.name, "offset": str(self._file.tell()), "length": str(array.nbytes)}
        self._file.write(array.data)
        return TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
            external_data=[StringStringEntryProto(key=key, value=value) for key, value in place.items()],
        )


def inline(name: str, array: npt.NDArray[np.generic]) -> TensorProto:
    """Stores a weight in the graph itself, for graphs that no file holds."""
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def view(tensor: TensorProto, name: str, shape: Sequence[int], first_byte: int = 0) -> TensorProto:
    """An initializer on some of the bytes of another one that lies in a file.

    Args:
        shape: the view's, of no more numbers.
        first_byte: offset in the other one.
    """
    again = TensorProto()
    again.CopyFrom(tensor)
    again.name = name
    again.dims[:] = shape
    place = {entry.key: entry for entry in again.external_data}
    place["offset"].value = str(int(place["offset"].value) + first_byte)
    place["length"].value = str(int(place["length"].value) * math.prod(shape) // math.prod(tensor.dims))
    return again


def without_data(value: ValueInfoProto, file: str) -> TensorProto:
    """An initializer whose data the runtime supplies.

    Args:
        file: a file of the bundle, too short for the data, so that nothing loads it by mistake.
    """
    kind = value.type.tensor_type
    # ONNX Runtime takes only external data from its caller.
    place = StringStringEntryProto(key="location", value=PurePosixPath(file).name)
    return TensorProto(
        name=value.name, dims=[each.dim_value for each in kind.shape.dim], data_type=kind.elem_type,
        data_location=TensorProto.EXTERNAL, external_data=[place],
    )  # fmt: skip


def mapped(tensor: TensorProto, folder: Path) -> npt.NDArray[Any]:
    """The numbers of an initializer, mapped into memory if they lie in a file.

    Args:
        folder: of its graph.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {each.key: each.value for each in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / place["location"], dtype, "r", int(place["offset"]), tuple(tensor.dims))
