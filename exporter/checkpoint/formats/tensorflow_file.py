"""TensorFlow's checkpoints, NAME.index and NAME.data-*: an index of tensors, and their numbers in flat files.

The index is a sorted table like LevelDB's, without compression: blocks of keys and values, a block that points to them, and a
footer that points to that block.
https://github.com/google/leveldb/blob/main/doc/table_format.md
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/tensor_bundle.proto
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError, MissingExtraError

from ....models import limits, protobuf
from ....models.config import read_json
from ..arrays import StridedArray, dense_strides, item_size
from .saved import SavedWeights, beside

INDEX = ".index"
# The file that names a folder's latest checkpoint, and how.
_STATE = "checkpoint"
_LATEST = re.compile(r'^model_checkpoint_path: "(.+)"', re.MULTILINE)
_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48  # bytes
_TRAILER = 5  # bytes behind a block: its compression, and a checksum
_CHUNK = 1 << 22  # bytes whose checksum is taken at once
# TensorFlow's DataType; names of those that no weight has don't matter.
_TYPES = {1: "float32", 2: "float64", 14: "bfloat16", 19: "float16"}
# Fields of BundleEntryProto and of the messages in it.
_DTYPE, _SHAPE, _SHARD, _OFFSET, _SIZE, _CHECKSUM, _SLICES = 1, 2, 3, 4, 5, 6, 7
_DIMENSION, _DIMENSION_SIZE = 2, 1
_SHARDS, _ENDIANNESS = 1, 2  # of BundleHeaderProto


@dataclass(frozen=True)
class TensorFlowArray(StridedArray):
    """A tensor with a checksum, the masked CRC-32C of its bytes."""

    checksum: int

    def read(self) -> npt.NDArray[np.generic]:
        array = super().read()
        if _masked_crc(array.reshape(-1).view(np.uint8)) != self.checksum:
            raise CheckpointError(f"{self.path}: tensor {self.name} is damaged: fetch or save it again")
        return array


def latest(folder: Path) -> Path | None:
    """The index of the folder's latest checkpoint, or of its only one; None if it has none."""
    indices = {path.name.removesuffix(INDEX): path for path in sorted(folder.glob(f"*{INDEX}"))}
    state = folder / _STATE
    if state.is_file() and len(indices) > 1:
        with state.open("rb") as file:
            named = _LATEST.search(file.read(limits.JSON).decode("utf-8", "replace"))
        # Absolute where the training was: only the name counts.
        if named and (name := re.split(r"[/\\]", named[1])[-1]) in indices:
            return indices[name]
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder} holds {', '.join(indices)}: name the one to export, such as {folder}/{min(indices)}"
        )
    return next(iter(indices.values()), None)


def open_tensorflow(index: Path) -> SavedWeights:
    """The tensors of a checkpoint by name, and the settings of hparams.json beside it.

    Args:
        index: the file NAME.index; the others lie beside it.

    Raises:
        CheckpointError: a file is missing, damaged or truncated, or of another machine's byte order.
        MissingExtraError: the package for checksums isn't installed.
    """
    try:
        with index.open("rb") as file:
            content = file.read(limits.TENSOR_HEADER + 1)
        if len(content) > limits.TENSOR_HEADER:
            raise CheckpointError(f"{index} has more than {limits.TENSOR_HEADER:,} bytes: is it another file?")
        (_, header), *entries = list(_table(content))
        facts = protobuf.numbers(header)
        if facts.get(_ENDIANNESS):
            raise CheckpointError(f"{index} was written on a big-endian machine")
        arrays = {name: _array(index, facts.get(_SHARDS, 1), name, entry) for name, entry in entries}
    except OSError as error:
        raise CheckpointError(f"can't read {index}: {error.strerror}") from error
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{index} is not a whole index of a TensorFlow checkpoint: {error}") from error
    # gpt-2-simple and the like copy OpenAI's settings beside their checkpoints.
    hparams = index.parent / "hparams.json"
    return SavedWeights(index, arrays, {"hparams": read_json(hparams)} if hparams.is_file() else {})


def _array(index: Path, shards: int, name: str, entry: bytes) -> TensorFlowArray:
    facts, parts = protobuf.numbers(entry), protobuf.messages(entry)
    if _SLICES in parts:
        raise CheckpointError(f"{index}: tensor {name} was saved in slices: save it whole")
    dimensions = protobuf.messages(parts.get(_SHAPE, [b""])[-1]).get(_DIMENSION, [])
    shape = tuple(protobuf.numbers(each).get(_DIMENSION_SIZE, 0) for each in dimensions)
    dtype = _TYPES.get(facts.get(_DTYPE, 0), f"TensorFlow's type {facts.get(_DTYPE, 0)}")
    size, offset = facts.get(_SIZE, 0), facts.get(_OFFSET, 0)
    path = index.with_name(f"{index.name.removesuffix(INDEX)}.data-{facts.get(_SHARD, 0):05}-of-{shards:05}")
    if dtype in _TYPES.values():
        if math.prod(shape) * item_size(dtype) != size:
            raise ValueError(f"tensor {name} has another size than its shape")
        if beside(index, path.name).stat().st_size < offset + size:
            raise CheckpointError(f"{path} ends inside tensor {name}: fetch or save it again")
    return TensorFlowArray(path, name, shape, dtype, offset, dense_strides(shape), facts.get(_CHECKSUM, 0))


def _table(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Keys and values of a sorted table."""
    footer = content[-_FOOTER:]
    if len(footer) < _FOOTER or int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise ValueError("it has no table's footer")
    _, at = _handle(footer, 0)
    (offset, size), _ = _handle(footer, at)
    for _, value in _entries(_block(content, offset, size)):
        (first, length), _ = _handle(value, 0)
        for key, entry in _entries(_block(content, first, length)):
            yield key.decode("utf-8"), entry


def _handle(content: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Offset and size of a block, and where the next field begins."""
    offset, at = protobuf.varint(content, at, len(content))
    size, at = protobuf.varint(content, at, len(content))
    return (offset, size), at


def _block(content: bytes, offset: int, size: int) -> bytes:
    block = content[offset : offset + size + _TRAILER]
    if len(block) != size + _TRAILER:
        raise ValueError("it ends inside a block")
    if _masked_crc(block[: size + 1]) != int.from_bytes(block[-4:], "little"):
        raise ValueError("a checksum doesn't fit")
    if block[size]:
        raise ValueError("it is compressed")
    return block[:size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block. Each key is stored without the beginning that it shares with the one before."""
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")  # before the offsets of keys stored whole
    at, key = 0, b""
    while at < end:
        shared, at = protobuf.varint(block, at, end)
        own, at = protobuf.varint(block, at, end)
        size, at = protobuf.varint(block, at, end)
        if shared > len(key) or at + own + size > end:
            raise ValueError("an entry is longer than its block")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + size]
        at += own + size


def _masked_crc(content: bytes | npt.NDArray[np.uint8]) -> int:
    """CRC-32C, masked as LevelDB does."""
    try:
        import google_crc32c
    except ModuleNotFoundError as error:
        raise MissingExtraError("Reading a TensorFlow checkpoint", "google-crc32c", "formats") from error
    crc = 0
    for begin in range(0, len(content), _CHUNK):
        crc = int(google_crc32c.extend(crc, bytes(content[begin : begin + _CHUNK])))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
