"""A folder or file that appears whole or not at all, and leaves nothing behind for good.

What is written goes to a hidden folder beside the target. At the end both change places, in one step where the
system has one, so there is always a target. The hidden folder is locked while its process lives, so a later run
for the same target can tell what a killed one left.
"""

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gpt2onnx.errors import OutputError

_NO_LOCKS = -1
# For renameat2, from Linux's fcntl.h and fs.h.
_HERE, _EXCHANGE = -100, 2


@contextmanager
def replacing(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """An empty folder to write to; it becomes the target if all goes well, and is removed if not.

    Args:
        target: the folder to make or replace; where it is a link, what that leads to.
        check: raises where the target may not be replaced; called once more before that happens.

    Raises:
        OutputError: something can't be written; the target is as it was.
    """
    place = Path(os.path.realpath(target))
    with _beside(target, place) as folder:
        if Path.cwd().is_relative_to(place):
            raise OutputError(f"{target} is the folder that you are in: choose another target")
        yield folder
        folder.chmod(0o755)
        _flush(folder)
        # Windows gives a folder no name that another has, be that empty.
        replaces = place.exists() and (sys.platform == "win32" or any(place.iterdir()))
        check()
        if replaces:
            _exchange(folder, place)
        else:
            folder.rename(place)  # fails where another run was faster
        _flush(place.parent, deep=False)


@contextmanager
def replacing_file(target: Path, check: Callable[[], None]) -> Iterator[IO[bytes]]:
    """A file to write to; it becomes the target if all goes well, and is removed if not. As `replacing` otherwise."""
    place = Path(os.path.realpath(target))
    with _beside(target, place) as folder:
        path = folder / place.name
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check()
        path.replace(place)
        _flush(place.parent, deep=False)


@contextmanager
def _beside(target: Path, place: Path) -> Iterator[Path]:
    """A hidden folder beside the target's real place, locked, and removed at the end if it is still there."""
    folder, lock = _hidden(place), None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place)
        folder.mkdir(0o700)
        # Another run may have taken the folder for a leftover before it was locked.
        while (lock := _lock(folder)) is None:
            folder = _hidden(place)
            folder.mkdir(0o700)
        yield folder
    except OSError as error:
        raise OutputError(f"can't write {target}: {error.strerror or error}") from error
    finally:
        _remove(folder, place)
        _unlock(lock)


def _hidden(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")


def _exchange(folder: Path, target: Path) -> None:
    """Gives the folder the target's place, and the target the folder's."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform != "win32" else None
    if renameat2 is None or renameat2(_HERE, os.fsencode(folder), _HERE, os.fsencode(target), _EXCHANGE) != 0:
        # Not this system, or not this file system: for a moment there is no target.
        target.rename(_old(folder))
        folder.rename(target)


def _flush(folder: Path, *, deep: bool = True) -> None:
    """Has the system write a folder to the disk, so that a power failure can't leave the name without the content."""
    if sys.platform == "win32":  # which can't flush a folder
        return
    for path in [folder, *folder.rglob("*")] if deep else [folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A descriptor whose closing, or the end of the process, frees the folder; None where another holds or held it."""
    if sys.platform == "win32":  # which locks no folders: what killed runs leave stays there
        return _NO_LOCKS
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # some network file systems have no locks
        os.close(descriptor)
        return _NO_LOCKS
    if not folder.exists():
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None and lock != _NO_LOCKS:
        with suppress(OSError):  # that of a disk which has failed already
            os.close(lock)


def _remove_leftovers(target: Path) -> None:
    """Removes what killed runs for this target left, and brings back a target that one had just moved away."""
    pattern = f".{_literal(target.name)}.*"
    # One that was killed after its folder had taken the target's place left the old target alone.
    for old in target.parent.glob(f"{pattern}.old"):
        if target.exists() and not old.with_suffix(".new").exists():
            shutil.rmtree(old, ignore_errors=True)
    for folder in target.parent.glob(f"{pattern}.new"):
        lock = _lock(folder)
        if lock is not None and lock != _NO_LOCKS:
            _remove(folder, target)
        _unlock(lock)


def _remove(folder: Path, target: Path) -> None:
    """Removes a hidden folder and the old target, which comes back if there is no other."""
    old = _old(folder)
    if old.exists() and not target.exists():
        with suppress(OSError):
            old.rename(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    if not old.exists():
        shutil.rmtree(folder, ignore_errors=True)


def _old(folder: Path) -> Path:
    """Where the target goes for the moment in which the folder takes its place."""
    return folder.with_suffix(".old")


def _literal(name: str) -> str:
    """The name as a pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
