"""What a reader of weight files gives, and what it checks of every file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from gpt2onnx.errors import CheckpointError

from ..arrays import StoredArray

_LFS_POINTER = b"version https://git-lfs"  # first bytes; https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md


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
    try:
        found = file.is_file()
    except OSError:  # a name that is too long
        found = False
    if not found:
        raise CheckpointError(f"{file} is missing: fetch or save the checkpoint again")
    check_fetched(file)
    return file


def check_fetched(path: Path) -> None:
    """Raises CheckpointError for what Git leaves in a file's place until Git LFS fetches it. Other faults are the reader's to find."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return
    if pointer:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' in {path.parent}")
