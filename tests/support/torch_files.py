"""Files as torch.save writes them, made with NumPy; `make reference` has PyTorch read them, and compares the bytes of their pickles."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
}


def save(content: object, path: Path, *, zipped: bool = True) -> None:
    """Writes a file that PyTorch reads.

    Args:
        content: what pickle takes, with arrays where PyTorch has tensors; views of one array share its storage.
        path: the file.
        zipped: the format since PyTorch 1.6; False for the one before.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, zipped=zipped)
    pickler.dump(content)
    if zipped:
        write_zip(path, buffer.getvalue(), {key: storage.data for key, storage in pickler.storages.items()})
        return
    # Sizes of the C types of whoever wrote it; nothing reads them any more.
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with path.open("wb") as file:
        for part in (LEGACY_MAGIC, 1001, system):
            pickle.dump(part, file, protocol=2)
        file.write(buffer.getvalue())
        pickle.dump(list(pickler.storages), file, protocol=2)
        for storage in pickler.storages.values():
            file.write(struct.pack("<q", storage.size))
            file.write(storage.data)


def write_zip(path: Path, program: bytes, storages: dict[str, Any]) -> None:
    """Writes the zip archive around a pickle and its storages' bytes."""
    root = path.stem
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", program)
        archive.writestr(f"{root}/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", "3\n")


class _Name:
    """Is pickled as a module's name for something, which need not be there."""

    def __init__(self, module: str, name: str) -> None:
        self.line = f"c{module}\n{name}\n".encode()

    def __call__(self) -> None:
        """The pickler asks of what it writes down as called that it can be."""


_REBUILD, _REBUILD_TYPED = (_Name("torch._utils", f"_rebuild_tensor_v{version}") for version in (2, 3))
_STORAGE_NAMES = {dtype: _Name("torch", name) for dtype, name in _STORAGES.items()}
_UNTYPED = _Name("torch.storage", "UntypedStorage")
_NEWER_TYPES = {name: _Name("torch", name) for name in ("uint16",)}  # which have no storages of their own


class _Storage:
    """All numbers of an array, in the order of their places."""

    def __init__(self, key: str, array: np.ndarray) -> None:
        newer = array.dtype.name in _NEWER_TYPES
        self.kind = _UNTYPED if newer else _STORAGE_NAMES[array.dtype.name]
        self.key, self.size = key, array.nbytes if newer else array.size
        self.data = array.reshape(-1).view(np.uint8).data if array.size else b""


class _Pickler(pickle._Pickler):
    """Python's own pickler, in Python, since that in C can't be told how to write a name."""

    def __init__(self, file: io.BytesIO, *, zipped: bool) -> None:
        super().__init__(file, protocol=2)
        self.zipped = zipped
        self.storages: dict[str, _Storage] = {}
        self._of_array: dict[int, _Storage] = {}
        self._arrays: list[np.ndarray] = []  # kept, so that no other array gets their id

    def persistent_id(self, obj: object) -> tuple[object, ...] | None:
        if not isinstance(obj, _Storage):
            return None
        parts = ("storage", obj.kind, obj.key, "cpu", obj.size)
        return parts if self.zipped else (*parts, None)

    def save_name(self, obj: _Name) -> None:
        self.write(obj.line)
        self.memoize(obj)

    def save_array(self, array: np.ndarray) -> None:
        whole = array
        while isinstance(whole.base, np.ndarray) and whole.base.dtype == array.dtype:
            whole = whole.base
        if not whole.flags.c_contiguous:
            whole = array = np.ascontiguousarray(array)
        if id(whole) not in self._of_array:
            key = str(len(self.storages))
            self.storages[key] = self._of_array[id(whole)] = _Storage(key, whole)
            self._arrays.append(whole)
        first = (array.ctypes.data - whole.ctypes.data) // array.itemsize if array.size else 0
        strides = tuple(stride // array.itemsize for stride in array.strides)
        rebuilt = (self._of_array[id(whole)], first, array.shape, strides, False, OrderedDict())
        if array.dtype.name in _NEWER_TYPES:
            self.save_reduce(_REBUILD_TYPED, (*rebuilt, _NEWER_TYPES[array.dtype.name]), obj=array)
        else:
            self.save_reduce(_REBUILD, rebuilt, obj=array)

    dispatch = pickle._Pickler.dispatch | {_Name: save_name, np.ndarray: save_array}
