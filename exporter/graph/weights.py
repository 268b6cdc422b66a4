"""The external data file: weights one after another, each at an aligned offset."""

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from onnx import StringStringEntryProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

# ONNX Runtime memory-maps each weight where it lies: large ones begin with a page, small ones with a cache line.
_PAGE, _CACHE_LINE = 4096, 64
_LARGE = 1 << 20


class WeightsFile:
    """Appends arrays to a file, and gives the ONNX tensors that refer to them."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file

    def append(self, name: str, array: npt.NDArray[np.generic]) -> TensorProto:
        """Writes the array and returns an initializer of that name that points at its bytes."""
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

    def read(self, tensor: TensorProto) -> TensorProto:
        """The same initializer with its bytes in it, if need be those that were written here."""
        self._file.flush()
        return loaded(tensor, self._path.parent)


def view(tensor: TensorProto, name: str, shape: Sequence[int], first: int = 0) -> TensorProto:
    """Some of the bytes of an initializer in a file as another one.

    Args:
        tensor: the initializer.
        name: the view's.
        shape: its own, of no more numbers.
        first: byte of the initializer that it begins with.
    """
    again = TensorProto()
    again.CopyFrom(tensor)
    again.name = name
    again.dims[:] = shape
    place = {entry.key: entry for entry in again.external_data}
    place["offset"].value = str(int(place["offset"].value) + first)
    place["length"].value = str(int(place["length"].value) * math.prod(shape) // math.prod(tensor.dims))
    return again


def without_data(value: ValueInfoProto, file: str) -> TensorProto:
    """An initializer for whose data the runtime has to come up.

    Args:
        value: name, type and shape.
        file: of the bundle, too short for the data: it is loaded by nobody by mistake.
    """
    kind = value.type.tensor_type
    # ONNX Runtime takes only external data from its caller.
    place = StringStringEntryProto(key="location", value=PurePosixPath(file).name)
    return TensorProto(
        name=value.name, dims=[each.dim_value for each in kind.shape.dim], data_type=kind.elem_type,
        data_location=TensorProto.EXTERNAL, external_data=[place],
    )  # fmt: skip


def loaded(tensor: TensorProto, folder: Path) -> TensorProto:
    """The same initializer with its bytes in it instead of a place in a file, where it has one.

    Args:
        tensor: the initializer.
        folder: that of the graph it is in.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    read = TensorProto()
    read.CopyFrom(tensor)
    load_external_data_for_tensor(read, str(folder))
    read.ClearField("external_data")
    read.data_location = TensorProto.DEFAULT
    return read


def mapped(tensor: TensorProto, folder: Path) -> npt.NDArray[Any]:
    """The numbers of an initializer, mapped into memory where they lie in a file.

    Args:
        tensor: the initializer.
        folder: that of the graph it is in.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {each.key: each.value for each in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / place["location"], dtype, "r", int(place["offset"]), tuple(tensor.dims))
