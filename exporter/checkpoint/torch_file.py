"""PyTorch's checkpoint files, read without PyTorch and without running anything that they contain.

A file is a pickle, in which tensors refer to storages, and the storages' raw numbers: since PyTorch 1.6 as
members of a zip archive (data.pkl, data/0, data/1 …), before that one after another behind the pickle.
The format: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py
"""

import io
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt2onnx.errors import CheckpointError

from ...models.messages import one_line, shown
from . import unpickle
from .arrays import StoredArray, StridedArray, extent
from .unpickle import MOST_BYTES, Call, PickleError, Readable, Record, RecordType, UnsupportedPickleError
from .zips import check_directory

_ZIP_START = b"PK\x03\x04"
_MOST_AXES = 32  # the most that every NumPy has
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ITEM_SIZE = {"bfloat16": 2}  # the one type that NumPy lacks
# Scripts keep these beside the weights, as they do devices: their names are enough.
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_STORAGE_TYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


# Where each storage begins and ends in the file, in bytes.
_Stretches = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class _StorageType:
    dtype: str

    @property
    def item_size(self) -> int:
        return _ITEM_SIZE.get(self.dtype) or np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class _Storage:
    """A stretch of numbers: `key` names it in the file, `first` is where a view of it begins."""

    key: str
    type: _StorageType
    length: int
    first: int = 0


@dataclass(frozen=True)
class _Tensor:
    """What a pickle says of a tensor: where its numbers are, not yet in which file."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_checkpoint_file(path: Path) -> Any:
    """The content of a file that `torch.save` wrote.

    Returns:
        What was saved, with a `StoredArray` in the place of each tensor of the outermost mapping and of the
        mappings in it; no tensor is read yet.

    Raises:
        CheckpointError: the file is missing, truncated, of another kind, or asks for anything but
            tensors and plain containers.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP_START)) == _ZIP_START:
                content, stretches = _read_zip(path, file)
            else:
                file.seek(0)
                content, stretches = _read_legacy(path, file)
            size = file.seek(0, 2)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: fetch or save the checkpoint again") from error
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except UnsupportedPickleError as error:
        raise CheckpointError(f"{path} was refused: {error}; save the model's state_dict() alone") from error
    except Exception as error:  # a damaged archive or pickle can fail in any way
        raise CheckpointError(f"{path} is truncated or damaged ({one_line(error)}): fetch or save it again") from error
    if any(end > size for _, end in stretches.values()):
        raise CheckpointError(f"{path} is truncated: fetch or save it again")
    return _located(content, path, stretches)


def read_plain_pickle(path: Path) -> Any:
    """The content of a pickle of plain containers, numbers and texts.

    Raises:
        CheckpointError: the file can't be read, is damaged, or asks for anything else.
    """
    try:
        with path.open("rb") as file:
            return _Names(path).load(file)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"can't read {path}: {one_line(error)}") from error


def _read_zip(path: Path, file: BinaryIO) -> tuple[Any, _Stretches]:
    """The unpickled content, and where the storages are."""
    check_directory(path, file)
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        root = next((name.removesuffix("data.pkl") for name in members if name.split("/")[1:] == ["data.pkl"]), None)
        if root is None:
            raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote")
        if f"{root}constants.pkl" in members:
            raise CheckpointError(f"{path} is a TorchScript program: save the model's state_dict() instead")
        if (order := members.get(f"{root}byteorder")) is not None and (
            order.file_size > len(b"little") or archive.read(order) != b"little"
        ):
            raise CheckpointError(f"{path} was saved on a big-endian machine, which isn't supported: save it again")
        stretches = {}
        for name, member in members.items():
            if name != f"{root}data.pkl" and not name.startswith(f"{root}data/"):
                continue
            if member.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path} was compressed after it was saved: save it again with torch.save")
            begin = _data_offset(path, file, member)
            stretches[name.removeprefix(f"{root}data/")] = begin, begin + member.file_size
        with archive.open(f"{root}data.pkl") as stream:
            # What is larger would be refused for its length on the way.
            return _Names(path).load(io.BytesIO(stream.read(MOST_BYTES))), stretches


def _data_offset(path: Path, file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, whose length only the header itself tells."""
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(_ZIP_START):
        raise CheckpointError(f"{path} is damaged at {member.filename}: fetch or save it again")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    return member.header_offset + 30 + int(name_length) + int(extra_length)


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, _Stretches]:
    """As `_read_zip`, of the format before PyTorch 1.6."""
    if file.read(1) != b"\x80":
        raise CheckpointError(f"{path} is not a file that torch.save wrote")
    file.seek(0)
    if _Names(path).load(file) != _LEGACY_MAGIC:
        raise CheckpointError(f"{path} is a pickle, but not one that torch.save wrote")
    _Names(path).load(file)  # the protocol's version
    system = _Names(path).load(file)
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise CheckpointError(f"{path} was saved on a big-endian machine, which isn't supported: save it again")
    sizes: dict[str, int] = {}
    content = _Names(path, sizes).load(file)
    keys = _Names(path).load(file)
    stretches = {}
    for key in keys if isinstance(keys, list) else []:
        count = file.read(8)
        if len(count) < 8 or not isinstance(key, str) or key not in sizes:
            raise CheckpointError(f"{path} is truncated or damaged: fetch or save it again")
        begin = file.tell()
        stretches[key] = begin, begin + max(0, struct.unpack("<q", count)[0]) * sizes[key]
        file.seek(stretches[key][1])
    return content, stretches


class _Names:
    """What a checkpoint's pickles may name: tensors, plain containers, and classes of the script that wrote them.

    Args:
        path: what errors name.
        item_sizes: filled with the bytes of one number of each storage that a pickle refers to.
    """

    def __init__(self, path: Path, item_sizes: dict[str, int] | None = None) -> None:
        self._path, self._item_sizes = path, item_sizes

    def load(self, file: Readable) -> Any:
        return unpickle.load(file, self._find, self._refer)

    def _find(self, module_name: str, name: str) -> object:
        if module_name in ("torch", "torch.storage") and name in _STORAGE_TYPES:
            return _StorageType(_STORAGE_TYPES[name])
        # Pickles that PyTorch writes call this module by its name in Python 2.
        module = "builtins" if module_name == "__builtin__" else module_name
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and name in _DTYPES:
            return name
        if module == "__main__":
            return RecordType(name)
        raise CheckpointError(
            f"{self._path} was refused: {shown(f'{module}.{name}')[1:-1]} is no tensor and no plain container, and"
            " might run code; save the model's state_dict() alone"
        )

    def _refer(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType() as kind, str() as key, str(), int() as length, *views):
                if self._item_sizes is not None:
                    self._item_sizes[key] = kind.item_size
                match views:
                    case [] | [None]:
                        return _Storage(key, kind, length)
                    case [(_, int() as first, int() as view_length)]:
                        return _Storage(key, kind, view_length, first)
        raise CheckpointError(f"{self._path} refers to a storage in an unknown way: save it with a newer PyTorch")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> _Tensor:
    """Takes the place of torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(data: object, *_: object) -> object:
    """Takes the place of torch._utils._rebuild_parameter; a parameter is its tensor."""
    return data


def _container(kind: Callable[..., Any]) -> Call:
    """An empty container, or one of a list's items."""

    def make(*items: Any) -> Any:
        if not items:
            return kind()
        if len(items) == 1 and isinstance(items[0], list | tuple):
            return kind(items[0])
        raise PickleError("a container is made of what is no list")

    return Call(make)


_ALLOWED: Mapping[tuple[str, str], Call] = {
    ("torch._utils", "_rebuild_tensor"): Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Call(_rebuild_parameter),
    ("torch", "device"): Call(lambda *parts: ":".join(map(str, parts))),
    ("torch", "Size"): _container(tuple),
    ("collections", "OrderedDict"): _container(unpickle.mapping),
    ("builtins", "set"): _container(unpickle.plain_set),
}


def _located(content: Any, path: Path, stretches: _Stretches, depth: int = 0) -> Any:
    """The same content with arrays for tensors, as deep as weights can be, and mappings for records."""
    if isinstance(content, Record):
        return content.fields
    if not isinstance(content, dict):
        return content
    located = {}
    for name, value in content.items():
        if isinstance(value, _Tensor):
            located[name] = _array(str(name), value, path, stretches)
        else:
            located[name] = _located(value, path, stretches, depth + 1) if depth == 0 else value
    return located


def _array(name: str, tensor: _Tensor, path: Path, stretches: _Stretches) -> StoredArray:
    """A tensor's place in the file, once it is proven to lie inside its storage."""
    match tensor:
        case _Tensor(
            _Storage(str() as key, _StorageType(str() as dtype), int(), int() as first), offset, shape, strides
        ):
            pass
        case _:
            raise CheckpointError(f"{path}: tensor {name} is damaged: fetch or save it again")
    whole = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= _MOST_AXES
    if not whole or not all(
        isinstance(number, int) and 0 <= number < 2**63 for number in (first, offset, *shape, *strides)
    ):
        raise CheckpointError(f"{path}: tensor {name} is damaged: fetch or save it again")
    size = tensor.storage.type.item_size
    begin, end = stretches.get(key, (0, 0))
    begin += (first + offset) * size
    # With strides of 0, a few numbers would stand for more than any memory holds.
    if begin + max(extent(shape, strides), math.prod(shape)) * size > end:
        raise CheckpointError(f"{path} ends before tensor {name} does: fetch or save it again")
    return StridedArray(path, name, shape, dtype, begin, strides)
