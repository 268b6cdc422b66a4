"""ONNX graphs: their initialisers, which lie in the file itself or in one beside it.

https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

import math
import mmap
from pathlib import Path

from gpt2onnx.errors import CheckpointError

from ....models import protobuf
from ..arrays import FLOATS, StoredArray, StridedArray, dense_strides, item_size
from .saved import SavedWeights, beside

_GRAPH, _INITIALIZER = 7, 5  # of ModelProto, GraphProto
_DIMENSIONS, _TYPE, _FLOATS, _NAME, _RAW, _EXTERNAL = 1, 2, 4, 8, 9, 13  # of TensorProto
_TYPES = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
_QUANTISED = "_quantized"  # ONNX Runtime's and optimum's ending


def open_onnx(path: Path) -> SavedWeights:
    """The initialisers of a graph that are vectors and matrices of floating-point numbers, by name.

    Raises:
        CheckpointError: the file is damaged, a file beside it is missing, or the weights are quantised.
    """
    arrays: dict[str, StoredArray] = {}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for kind, graph in protobuf.fields(content, 0, len(content)):
                if kind != _GRAPH or not isinstance(graph, slice):
                    continue
                for part, place in protobuf.fields(content, graph.start, graph.stop):
                    if part == _INITIALIZER and isinstance(place, slice) and (array := _array(path, content, place)):
                        arrays[array.name] = array
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
    except ValueError as error:  # an empty file can't be mapped
        raise CheckpointError(f"{path} is not a whole ONNX file: {error}") from error
    return SavedWeights(path, arrays)


def _array(path: Path, content: mmap.mmap, place: slice) -> StridedArray | None:
    """The array of an initialiser; None if it is no weight of a network."""
    shape: list[int] = []
    name, kind, data, external = "", 0, slice(0, 0), dict[str, str]()
    for number, value in protobuf.fields(content, place.start, place.stop):
        if number == _DIMENSIONS:
            shape += [value] if isinstance(value, int) else _packed(content, value)
        elif number == _TYPE and isinstance(value, int):
            kind = value
        elif isinstance(value, slice):
            if number == _NAME:
                name = content[value].decode("utf-8")
            elif number in (_RAW, _FLOATS):
                data = value
            elif number == _EXTERNAL:
                entry = protobuf.messages(content[value])
                key, text = (entry.get(each, [b""])[-1].decode("utf-8") for each in (_KEY, _VALUE))
                external[key] = text
        if len(shape) > 2:
            return None
    if name.endswith(_QUANTISED):
        raise CheckpointError(f"{path}: the weights are quantised, as {name} shows: export the graph in fp32 or fp16")
    if _TYPES.get(kind) not in FLOATS or not shape:
        return None
    begin, size = data.start, data.stop - data.start
    file = path
    whole = math.prod(shape) * item_size(_TYPES[kind])
    if external:
        file, begin, size = _place(path, external, whole)
    if whole != size:
        raise ValueError(f"tensor {name} has another size than its shape")
    return StridedArray(file, name, tuple(shape), _TYPES[kind], begin, dense_strides(shape))


def _packed(content: mmap.mmap, place: slice) -> list[int]:
    found, at = list[int](), place.start
    while at < place.stop and len(found) < 3:  # a third axis is enough to know that it is no matrix
        number, at = protobuf.varint(content, at, place.stop)
        found.append(number)
    return found


def _place(path: Path, external: dict[str, str], whole: int) -> tuple[Path, int, int]:
    """File, offset and size of data that lie in another file of the same folder; `whole` is the size where it isn't told."""
    file = beside(path, external.get("location", ""))
    offset, size = int(external.get("offset", 0)), int(external.get("length", whole))
    if offset < 0 or size < 0 or offset + size > file.stat().st_size:
        raise CheckpointError(f"{file} is truncated: fetch or save it again")
    return file, offset, size
