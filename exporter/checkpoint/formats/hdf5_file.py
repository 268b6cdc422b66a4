"""Weights in HDF5, as Keras saves them: arrays in groups, each in one piece.

https://docs.hdfgroup.org/hdf5/latest/_f_m_t3.html
"""

from pathlib import Path
from typing import Any

from gpt2onnx.errors import CheckpointError, MissingExtraError

from ....models.messages import one_line
from ..arrays import FLOATS, StoredArray, StridedArray, dense_strides
from .saved import SavedWeights


def open_hdf5(path: Path) -> SavedWeights:
    """The floating-point arrays of a file, named by their groups, with slashes between.

    Raises:
        CheckpointError: the file is damaged or truncated, or an array lies elsewhere or in pieces.
        MissingExtraError: the package h5py isn't installed.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise MissingExtraError("Reading an HDF5 file", "h5py", "formats") from error
    arrays: dict[str, StoredArray] = {}
    size = path.stat().st_size

    def add(name: str, each: Any) -> None:
        if not isinstance(each, h5py.Dataset) or each.dtype.name not in FLOATS:
            return
        offset = each.id.get_offset()
        if offset is None or each.dtype.byteorder == ">" or not 0 <= offset <= offset + each.nbytes <= size:
            raise CheckpointError(f"{path}: tensor {name} isn't stored whole in this file: save it again, uncompressed")
        shape = tuple(int(length) for length in each.shape)
        arrays[name] = StridedArray(path, name, shape, each.dtype.name, int(offset), dense_strides(shape))

    try:
        with h5py.File(path, "r") as file:
            file.visititems(add)  # doesn't follow links, which could lead to other files
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise CheckpointError(f"{path} is not a whole HDF5 file: {one_line(error)}") from error
    return SavedWeights(path, arrays)
