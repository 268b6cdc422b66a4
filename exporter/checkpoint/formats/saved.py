"""What a reader of weight files gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from gpt2onnx.errors import CheckpointError

from ..arrays import StoredArray


@dataclass(frozen=True)
class SavedWeights:
    """The content of a checkpoint's weight files.

    Attributes:
        path: the file, or the index of several.
        arrays: by their names in the files.
        files: others that the arrays lie in.
        settings: whatever else was saved in the same file.
        tokenizer_files: a tokenizer in the same file, as the files that other checkpoints have: name and content.
    """

    path: Path
    arrays: Mapping[str, StoredArray]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_files: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def beside(path: Path, name: str) -> Path:
    """The file of a name, in the folder of the file that names it.

    Raises:
        CheckpointError: it lies elsewhere, or is missing.
    """
    if PurePath(name).name != name or name in ("", ".", "..") or "\\" in name:
        raise CheckpointError(f"{path} names a file outside its folder: {name}")
    file = path.with_name(name)
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: fetch or save the checkpoint again")
    return file
