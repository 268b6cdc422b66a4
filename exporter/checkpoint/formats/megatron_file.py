"""Megatron-LM's checkpoints: a folder for each step, in it one for each part of a tensor-parallel network, in that PyTorch's file.

`latest_checkpointed_iteration.txt` names the step: `release`, or a number. Matrices are split by their outputs or by their
inputs; what isn't split is the same in all parts.
https://github.com/NVIDIA/Megatron-LM/blob/v2.4/megatron/checkpointing.py
https://github.com/NVIDIA/Megatron-LM/blob/v2.4/megatron/mpu/layers.py
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError

from ....models.messages import shown
from ..arrays import DerivedArray, StoredArray, StridedArray
from .saved import SavedWeights, check_fetched
from .torch_file import read_checkpoint_file

PARTS = ("model_optim_rng.pt", "model_rng.pt")  # the second, where each device keeps its own optimizer
_LATEST = "latest_checkpointed_iteration.txt"
_LONGEST = 1024  # letters, of a tensor's name
_NUMBER = re.compile(rb"\s*(\d{1,12})\s*")
_STEP, _PART = re.compile(r"release|iter_\d{7,}"), re.compile(r"mp_rank_(\d{2,})")
_LEVELS = 6  # model, language_model, embedding, word_embeddings, weight
# Tensors split by their first axis, the outputs, or by their second, the inputs.
_SPLIT = re.compile(
    r".*(?:(word_embeddings\.weight|output_layer\.weight|\.query_key_value\.\w+|\.dense_h_to_4h\.\w+)"
    r"|\.dense\.weight|\.dense_4h_to_h\.weight)"
)


@dataclass(frozen=True)
class JoinedArray(DerivedArray):
    """An array of which each part of the network holds a piece; what is stored is the first one."""

    others: tuple[StoredArray, ...]
    axis: int

    def read(self) -> npt.NDArray[np.generic]:
        return np.concatenate([piece.read() for piece in (self.stored, *self.others)], axis=self.axis)


def megatron_in(folder: Path) -> Path | None:
    """The first part's file in a folder, or in the step that it names; None if the folder isn't Megatron-LM's.

    Raises:
        CheckpointError: it holds several steps and names none, or the network is split by layers, too (pipeline parallel).
    """
    if (folder / _LATEST).is_file():
        with (folder / _LATEST).open("rb") as file:
            number = _NUMBER.fullmatch(file.read(_LONGEST))
        steps = [folder / (f"iter_{int(number[1]):07d}" if number else "release")]
    else:
        steps = [path for path in sorted(folder.iterdir()) if _STEP.fullmatch(path.name) and _parts_of(path)]
    if len(steps) > 1:
        raise CheckpointError(f"{folder} holds {', '.join(path.name for path in steps)}: name the one to export")
    for place in (*steps, folder):
        if parts := _parts_of(place):
            return parts[0]
    return None


def _parts_of(folder: Path) -> list[Path]:
    """The files of the parts, in their order; the one of a part's own folder."""
    own = [folder / name for name in PARTS if (folder / name).is_file()]
    if own or not folder.is_dir():
        return own[:1]
    ranks = sorted((path.name, path) for path in folder.glob("mp_rank_*") if path.is_dir())
    if any(not _PART.fullmatch(name) for name, _ in ranks):
        raise CheckpointError(
            f"{folder} is pipeline parallel ({ranks[-1][0]}): join the parts with Megatron-LM's tools/checkpoint, and export that"
        )
    return [file for _, path in ranks for file in _parts_of(path)]


def open_megatron(path: Path) -> SavedWeights:
    """The arrays of all parts, joined, and the settings of the training.

    Args:
        path: the first part's file; the others lie in the folders beside its own.

    Raises:
        CheckpointError: a file is missing, damaged or refused, or the parts don't fit together.
    """
    paths = _parts_of(path.parent.parent) if _PART.fullmatch(path.parent.name) else [path]
    parts, settings = [], list[Mapping[str, Any]]()
    for part in paths:
        check_fetched(part)
        content = read_checkpoint_file(part, _LEVELS)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise CheckpointError(f"{part} has no network of Megatron-LM: fetch or save it again")
        parts.append(dict(_flat(content["model"], "", _LEVELS, set())))
        settings.append({name: content.get(name) for name in ("args", "checkpoint_version")})
    told = settings[0]["args"] if isinstance(settings[0]["args"], dict) else {}
    count = told.get("tensor_model_parallel_size", told.get("model_parallel_size", len(paths)))
    if count != len(paths):
        raise CheckpointError(f"{path.parent.parent} has {len(paths)} of {shown(count)} parts: fetch or save it again")
    arrays = {name: _joined(path, name, [part.get(name) for part in parts]) for name in parts[0]}
    return SavedWeights(path, arrays, {**settings[0], "args": told, "parts": len(paths)}, files=tuple(paths))


def _flat(content: Mapping[Any, Any], prefix: str, levels: int, seen: set[int]) -> Iterator[tuple[str, StoredArray]]:
    """The arrays of mappings in mappings, each mapping once, by the names on the way joined with dots."""
    for name, value in content.items():
        if not isinstance(name, str) or len(prefix) + len(name) > _LONGEST:
            continue
        if isinstance(value, StridedArray):
            yield prefix + name, value
        elif isinstance(value, dict) and levels and id(value) not in seen:
            seen.add(id(value))
            yield from _flat(value, f"{prefix}{name}.", levels - 1, seen)


def _joined(path: Path, name: str, pieces: list[StoredArray | None]) -> StoredArray:
    """The whole array; of one that isn't split, the first part's."""
    whole = [piece for piece in pieces if piece is not None]
    split = _SPLIT.fullmatch(name)
    if len(whole) == 1 or not split:
        return whole[0]
    axis = 0 if split[1] else 1
    shapes = {piece.shape for piece in whole}
    (shape,) = shapes if len(shapes) == 1 else [()]
    if len(whole) < len(pieces) or len(shape) <= axis:
        raise CheckpointError(f"{path.parent.parent}: the parts don't fit together at {name}: fetch or save them again")
    joined = (*shape[:axis], shape[axis] * len(whole), *shape[axis + 1 :])
    return JoinedArray(whole[0], joined, tuple(whole[1:]), axis)
