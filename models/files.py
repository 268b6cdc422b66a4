"""Files below a folder, and their hashes."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

# Bytes read at a time: progress moves often, and calls cost nothing beside the hash.
_PIECE = 2**20


def files_in(folder: Path) -> list[Path]:
    """All files and links below a folder. Links aren't followed.

    Raises:
        OSError: a folder can't be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for place, folders, files in os.walk(folder, onerror=fail):
        found += [Path(place) / name for name in files]
        found += [path for name in folders if (path := Path(place) / name).is_symlink()]
    return found


def sha256_of(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file, in hexadecimal.

    Args:
        path: of the file.
        advance: called with the bytes of each piece that has been read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            if advance is not None:
                advance(len(piece))
    return digest.hexdigest()
