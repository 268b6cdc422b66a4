"""PyTorch's checkpoint files, read without PyTorch and without running code in them.

A file is a pickle, in which tensors refer to storages, and the numbers of the storages: since PyTorch 1.6 as
members of a zip archive (data.pkl, data/0, data/1 …), before that one after another behind the pickle.
The format: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py

TorchScript and LibTorch (so tch and rust-bert) write the same archive. Its pickle is a module: tensors and further modules are
its attributes. The program beside it, in code/, isn't read.
https://github.com/pytorch/pytorch/blob/main/torch/csrc/jit/docs/serialization.md
"""

import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader, BytesIO, FileIO, RawIOBase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpt2onnx.errors import CheckpointError

from ....models import limits
from ....models.messages import one_line, shown
from ..arrays import StoredArray, StridedArray, extent, item_size
from . import unpickle
from .unpickle import Call, PickleError, Record, UnsupportedPickleError, container, record

_ZIP_START = b"PK\x03\x04"
_ZIP_HEADER = 30  # bytes of a member's local header, without its name
_MOST_AXES = 32  # of an array in every NumPy
_LONGEST_LINE = 2**16  # bytes, of a name or a number
_MODULE = "__torch__"  # package of TorchScript's classes
_LONGEST_NAME = 1024  # letters, of a tensor in modules in modules
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
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
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
}
_DTYPES = (*_STORAGE_TYPES.values(), "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")

# Packages whose objects lie beside weights: settings, and the states of random generators. They become records.
_BESIDE = ("__main__", "argparse", "megatron", "numpy", "_codecs")

# First byte and end of each storage in the file.
_Spans = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class _Storage:
    """A storage, or a view of it: its name in the file, the type of its numbers, and the view's first number."""

    key: str
    dtype: str
    first: int = 0


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the pickle describes it. None of its values has been checked."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _File(BufferedReader):
    """A file of which neither zipfile nor pickletools reads more than limits.PICKLE at once, be it a list of members or a text."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > limits.PICKLE:
            raise UnsupportedPickleError(f"a part of it beside the tensors has more than {limits.PICKLE:,} bytes")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(_LONGEST_LINE)


class _Part(RawIOBase):
    """A part of a file, as a file of its own.

    Args:
        file: the whole file, which is closed with it.
        offset: of the part, in bytes.
        length: of the part, in bytes.
    """

    def __init__(self, file: FileIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)]) or 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def read_checkpoint_file(path: Path, levels: int = 2) -> Any:
    """The content of a file that `torch.save` wrote.

    Args:
        path: the file.
        levels: of mappings in mappings.

    Returns:
        The saved object, with a `StoredArray` in the place of each tensor of the mappings down to this level; no tensor
        is read yet.

    Raises:
        CheckpointError: the file is missing, truncated, of another kind, or asks for anything but
            tensors and plain containers.
    """
    content, spans = _read(path, lambda: FileIO(path))
    return _located(content, path, spans, levels, {})


def read_saved_tensor(path: Path, name: str, offset: int, length: int) -> StoredArray:
    """A tensor that `torch.save` wrote into a part of a file.

    Args:
        path: the file.
        name: of the tensor.
        offset: of the part, in bytes.
        length: of the part, in bytes.

    Raises:
        CheckpointError: as for `read_checkpoint_file`.
    """
    content, spans = _read(path, lambda: _Part(FileIO(path), offset, length))
    if not isinstance(content, _Tensor):
        raise CheckpointError(f"{path} has no tensor {name} where it should be: fetch or save it again")
    return _array(name, content, path, {key: (begin + offset, end + offset) for key, (begin, end) in spans.items()})


def _read(path: Path, opened: Callable[[], RawIOBase]) -> tuple[Any, _Spans]:
    """The unpickled content, and the places of the storages."""
    try:
        with _File(opened()) as file:
            zipped = file.read(len(_ZIP_START)) == _ZIP_START
            file.seek(0)
            content, spans = (_read_zip if zipped else _read_legacy)(path, file)
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
    if any(end > size for _, end in spans.values()):
        raise CheckpointError(f"{path} is truncated: fetch or save it again")
    return content, spans


def read_plain_pickle(path: Path, names: Mapping[str, object] = MappingProxyType({})) -> Any:
    """The content of a pickle of plain containers, numbers and texts.

    Args:
        path: the file.
        names: what further names of torch and pathlib stand for.

    Raises:
        CheckpointError: the file can't be read, is damaged, or asks for anything else.
    """
    try:
        with _File(FileIO(path)) as file:
            return _Pickles(path, names).load(file)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"can't read {path}: {one_line(error)}") from error


def _read_zip(path: Path, file: _File) -> tuple[Any, _Spans]:
    """The unpickled content, and the places of the storages."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        root = next((name.removesuffix("data.pkl") for name in members if name.split("/")[1:] == ["data.pkl"]), None)
        if root is None:
            raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote")
        if (order := members.get(f"{root}byteorder")) is not None and (
            order.file_size > len(b"little") or archive.read(order) != b"little"
        ):
            raise CheckpointError(f"{path} was saved on a big-endian machine, which isn't supported: save it again")
        spans = {}
        for name, member in members.items():
            if name != f"{root}data.pkl" and not name.startswith(f"{root}data/"):
                continue
            if member.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path} was compressed after it was saved: save it again with torch.save")
            begin = _data_offset(path, file, member)
            spans[name.removeprefix(f"{root}data/")] = begin, begin + member.file_size
        if members[f"{root}data.pkl"].file_size > limits.PICKLE:
            raise UnsupportedPickleError(f"its pickle has more than {limits.PICKLE:,} bytes")
        return _Pickles(path).load(BytesIO(archive.read(f"{root}data.pkl"))), spans


def _data_offset(path: Path, file: _File, member: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes. Only the local header before them tells its own length."""
    file.seek(member.header_offset)
    header = file.read(_ZIP_HEADER)
    if len(header) < _ZIP_HEADER or not header.startswith(_ZIP_START):
        raise CheckpointError(f"{path} is damaged at {member.filename}: fetch or save it again")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    return member.header_offset + _ZIP_HEADER + int(name_length) + int(extra_length)


def _read_legacy(path: Path, file: _File) -> tuple[Any, _Spans]:
    """As `_read_zip`, in the format before PyTorch 1.6."""
    if file.peek()[:1] != b"\x80":
        raise CheckpointError(f"{path} is not a file that torch.save wrote")
    pickles = _Pickles(path)
    if pickles.load(file) != _LEGACY_MAGIC:
        raise CheckpointError(f"{path} is a pickle, but not one that torch.save wrote")
    pickles.load(file)  # the protocol's version
    system = pickles.load(file)
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise CheckpointError(f"{path} was saved on a big-endian machine, which isn't supported: save it again")
    content, keys = pickles.load(file), pickles.load(file)
    spans = {}
    for key in keys if isinstance(keys, list) else []:
        count = file.read(8)
        if len(count) < 8 or not isinstance(key, str) or key not in pickles.item_sizes:
            raise CheckpointError(f"{path} is truncated or damaged: fetch or save it again")
        begin = file.tell()
        spans[key] = begin, begin + max(0, struct.unpack("<q", count)[0]) * pickles.item_sizes[key]
        file.seek(spans[key][1])
    return content, spans


class _Pickles:
    """Reads the pickles of a checkpoint. They may name tensors, plain containers, and classes of the script that wrote them.

    Args:
        path: the file that errors name.
        names: what further names of torch and pathlib stand for.

    Attributes:
        item_sizes: bytes of one number of each storage that the pickles refer to.
    """

    def __init__(self, path: Path, names: Mapping[str, object] = MappingProxyType({})) -> None:
        self._path, self._names = path, names
        self.item_sizes: dict[str, int] = {}

    def load(self, file: BytesIO | _File) -> Any:
        return unpickle.load(file, self._find, self._refer)

    def _find(self, module_name: str, name: str) -> object:
        if module_name in ("torch", "torch.storage") and name in _STORAGE_TYPES:
            return _StorageType(_STORAGE_TYPES[name])
        # Pickles that PyTorch writes call this module by its name in Python 2.
        module = "builtins" if module_name == "__builtin__" else module_name
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        # Scripts save types beside the weights, as they do devices: their names are enough.
        if module == "torch" and name in _DTYPES:
            return name
        if name in self._names and module.partition(".")[0] in ("torch", "pathlib"):
            return self._names[name]
        if (package := module.partition(".")[0]) in _BESIDE or package == _MODULE:
            return record(_MODULE if package == _MODULE else name)
        raise CheckpointError(
            f"{self._path} was refused: {shown(f'{module}.{name}')[1:-1]} is no tensor and no plain container, and"
            " might run code; save the model's state_dict() alone"
        )

    def _refer(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType() as kind, str() as key, str(), int(), *views):
                self.item_sizes[key] = item_size(kind.dtype)
                match views:
                    case [] | [None]:
                        return _Storage(key, kind.dtype)
                    case [(_, int() as first, int())]:
                        return _Storage(key, kind.dtype, first)
        raise CheckpointError(f"{self._path} refers to a storage in an unknown way: save it with a newer PyTorch")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> _Tensor:
    """Takes the place of torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    return _Tensor(storage, offset, size, stride)


def _rebuild_typed_tensor(storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> _Tensor:
    """Takes the place of torch._utils._rebuild_tensor_v3: its storage has bytes, the type of its numbers comes behind two flags."""
    dtype = others[2]
    if not isinstance(storage, _Storage) or dtype not in _DTYPES:
        raise PickleError("it has a tensor of no type")
    return _Tensor(replace(storage, dtype=dtype), offset, size, stride)


def _rebuild_parameter(data: object, *_: object) -> object:
    """Takes the place of torch._utils._rebuild_parameter; a parameter is its tensor."""
    return data


_ALLOWED: Mapping[tuple[str, str], Call] = {
    ("torch._utils", "_rebuild_tensor"): Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Call(_rebuild_typed_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Call(_rebuild_parameter),
    ("torch", "device"): Call(lambda *parts: ":".join(map(str, parts))),
    ("torch", "Size"): container(tuple),
    ("collections", "OrderedDict"): container(unpickle.mapping),
    ("collections", "Counter"): container(unpickle.mapping),
    ("builtins", "set"): container(unpickle.plain_set),
    ("builtins", "bytearray"): record("bytearray"),
    ("builtins", "complex"): record("complex"),
}


def _located(content: Any, path: Path, spans: _Spans, levels: int, known: dict[int, dict[Any, Any]]) -> Any:
    """The same content with arrays for tensors, down to a level, and mappings for records; `known` are those that it met."""
    if levels == 0 or not isinstance(content, Record | dict):
        return content
    if (located := known.get(id(content))) is None:
        located = known[id(content)] = {}
        whole: dict[Any, Any] = content.fields if isinstance(content, Record) else content
        if isinstance(content, Record) and content.name == _MODULE:
            whole = _tensors(content, path)
        for name, value in whole.items():
            if isinstance(value, _Tensor):
                located[name] = _array(str(name), value, path, spans)
            else:
                located[name] = _located(value, path, spans, levels - 1, known)
    return located


def _tensors(module: Record, path: Path) -> dict[str, _Tensor]:
    """The tensors of a TorchScript module, and of the modules in it, by their names in a state dict."""
    found, pending, seen = dict[str, _Tensor](), [("", module)], {module}
    while pending:
        prefix, record = pending.pop()
        for name, value in record.fields.items():
            if len(prefix) + len(name) > _LONGEST_NAME:
                raise CheckpointError(
                    f"{path} was refused: the name of a tensor has more than {_LONGEST_NAME:,} letters"
                )
            if isinstance(value, _Tensor):
                # A name in TorchScript has no dots; tch writes bars for them.
                found[f"{prefix}{name}".replace("|", ".")] = value
            elif isinstance(value, Record) and value not in seen:
                seen.add(value)
                pending.append((f"{prefix}{name}.", value))
    return found


def _array(name: str, tensor: _Tensor, path: Path, spans: _Spans) -> StoredArray:
    """A tensor's place in the file. It is proven to lie inside its storage."""
    storage, offset, shape, strides = tensor.storage, tensor.offset, tensor.shape, tensor.strides
    whole = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not (whole and len(shape) == len(strides) <= _MOST_AXES) or not all(
        isinstance(number, int) and 0 <= number < 2**63 for number in (storage.first, offset, *shape, *strides)
    ):
        raise CheckpointError(f"{path}: tensor {name} is damaged: fetch or save it again")
    size = item_size(storage.dtype)
    begin, end = spans.get(storage.key, (0, 0))
    begin += (storage.first + offset) * size
    # With strides of 0, a few numbers would stand for more than any memory holds.
    if begin + max(extent(shape, strides), math.prod(shape)) * size > end:
        raise CheckpointError(f"{path} ends before tensor {name} does: fetch or save it again")
    return StridedArray(path, name, shape, storage.dtype, begin, strides)
