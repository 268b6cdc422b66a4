"""torch.distributed.checkpoint, which FSDP, accelerate and transformers' Trainer save with: an index, and pieces of tensors.

The index `.metadata` is a pickle. It tells each tensor's shape, type and pieces, and for each piece a file, an offset and a
length: there lies what torch.save made of the piece alone.
https://github.com/pytorch/pytorch/blob/main/torch/distributed/checkpoint/metadata.py
https://github.com/pytorch/pytorch/blob/main/torch/distributed/checkpoint/filesystem.py
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError

from ....models.messages import one_line
from ..arrays import FLOATS, item_size
from .saved import SavedWeights, beside
from .torch_file import read_plain_pickle, read_saved_tensor
from .unpickle import Call, Record, record

INDEX, _PIECES = ".metadata", ".distcp"
_MOST_AXES = 32
_OPTIMIZER = "optim"  # beginning of the names of what an optimizer keeps
_RECORDS = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
    "StorageMeta", "_StorageInfo",
)  # fmt: skip
# Values that say nothing about weights.
_DROPPED = ("_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING", "_get_layout", "PosixPath", "WindowsPath", "PurePosixPath")
_NAMES: Mapping[str, object] = {name: record(name) for name in _RECORDS} | {
    name: Call(lambda *_: None) for name in _DROPPED
}


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor.

    Attributes:
        path: of its file.
        offset: in the file, in bytes.
        length: in bytes.
        begin: its first index in the tensor, for each axis.
    """

    path: Path
    offset: int
    length: int
    begin: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PiecedArray:
    """A tensor that was saved in pieces."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[_Piece, ...]

    def read(self) -> npt.NDArray[np.generic]:
        whole: npt.NDArray[np.generic] = np.full(self.shape, np.nan, np.dtype(self.dtype))
        for piece in self.pieces:
            part = read_saved_tensor(piece.path, self.name, piece.offset, piece.length)
            if (part.shape, part.dtype) != (piece.shape, self.dtype):
                raise CheckpointError(
                    f"{piece.path}: tensor {self.name} isn't what {self.path.name} says: save it again"
                )
            ends = zip(piece.begin, piece.shape, strict=True)
            whole[tuple(slice(begin, begin + count) for begin, count in ends)] = part.read()
        return whole


def pieces_of(folder: Path) -> Path | None:
    """The index in a folder, or in the only one of its folders that has one beside an optimizer's; None if there is none."""
    if _has_pieces(folder):
        return folder / INDEX
    places = [path for path in sorted(folder.iterdir()) if path.is_dir() and _has_pieces(path)]
    places = [path for path in places if not path.name.startswith(_OPTIMIZER)]
    if len(places) > 1:
        raise CheckpointError(f"{folder} holds {', '.join(path.name for path in places)}: name the one to export")
    return places[0] / INDEX if places else None


def _has_pieces(folder: Path) -> bool:
    return (folder / INDEX).is_file() and any(folder.glob(f"*{_PIECES}"))


def open_dcp(index: Path) -> SavedWeights:
    """The tensors of a checkpoint by name, without those of an optimizer.

    Args:
        index: the file `.metadata`; the others lie beside it.

    Raises:
        CheckpointError: a file is missing, damaged or refused, or a tensor isn't whole.
    """
    content = read_plain_pickle(index, _NAMES)
    try:
        places = dict(_places(index, content.fields["storage_data"]))
        arrays = {
            name: _array(index, name, tensor.fields, places)
            for name, tensor in content.fields["state_dict_metadata"].items()
            if tensor.name == "TensorStorageMetadata" and not name.startswith(_OPTIMIZER)
        }
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{index} is no index of torch.distributed.checkpoint ({one_line(error)}): save it again"
        ) from error
    # Each piece is saved once. A file that says otherwise could make tensors far larger than itself.
    files = {path for path, _, _ in places.values()}
    if sum(length for _, _, length in places.values()) > sum(path.stat().st_size for path in files):
        raise CheckpointError(f"{index.parent}: the pieces are truncated: fetch or save them again")
    return SavedWeights(index, arrays, files=tuple(sorted(files)))


def _places(
    index: Path, stored: dict[Record, Record]
) -> Iterator[tuple[tuple[str, tuple[int, ...]], tuple[Path, int, int]]]:
    """File, offset and length of each piece, by the tensor's name and the piece's first index."""
    for key, value in stored.items():
        name, place = key.fields["fqn"], value.fields
        if key.fields.get("offset") is None:  # no tensor
            continue
        file, begin = place["relative_path"], _numbers(key.fields["offset"])
        offset, length = _numbers((place["offset"], place["length"]))
        if place.get("transform_descriptors"):
            raise CheckpointError(f"{index}: the pieces were compressed: save them without transforms")
        yield (str(name), begin), (beside(index, file), offset, length)


def _array(
    index: Path,
    name: str,
    tensor: Mapping[str, Any],
    places: Mapping[tuple[str, tuple[int, ...]], tuple[Path, int, int]],
) -> PiecedArray:
    """A tensor, whose pieces are as many numbers as it has and lie inside it."""
    shape, dtype = _numbers(tensor["size"]), str(tensor["properties"].fields["state"][0])
    pieces = []
    for chunk in tensor["chunks"]:
        begin, size = _numbers(chunk.fields["offsets"]), _numbers(chunk.fields["sizes"])
        inside = zip(begin, size, shape, strict=True)
        if not all(first + count <= whole for first, count, whole in inside):
            raise ValueError(f"a piece of {name} lies outside it")
        path, offset, length = places[name, begin]
        if dtype in FLOATS and math.prod(size) * item_size(dtype) > length:
            raise ValueError(f"a piece of {name} is longer than its place")
        pieces.append(_Piece(path, offset, length, begin, size))
    if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
        raise CheckpointError(f"{index}: tensor {name} isn't whole: save the checkpoint again")
    return PiecedArray(index, name, shape, dtype, tuple(pieces))


def _numbers(value: Any) -> tuple[int, ...]:
    """A tuple of numbers from 0 on, not many and not large."""
    if not isinstance(value, tuple) or len(value) > _MOST_AXES:
        raise ValueError("a shape is no tuple of numbers")
    if not all(isinstance(number, int) and 0 <= number < 2**63 for number in value):
        raise ValueError("a shape has an entry that is no length")
    return value
