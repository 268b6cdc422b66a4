"""A folder or file that appears whole or not at all.

It is written in a workspace, a hidden folder beside the target, and renamed into place at the end. The workspace holds

    .gpt2onnx-unfinished   the mark: nobody but a run of gpt2onnx makes this file
    new/                   the new folder, or the folder of the new file; its writer may put others beside it
    old/                   the previous target, while the new one takes its place

and is locked while its process lives. A later run beside it removes a workspace that carries the mark and isn't locked.
"""

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gpt2onnx.errors import OutputError

_MARK = ".gpt2onnx-unfinished"
# Each try but the last lost against another run of the same target, which takes seconds to write its own.
_MOST_TRIES = 20


@contextmanager
def replacing(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """An empty folder to write to. It becomes the target on success and is removed on failure.

    Args:
        target: the folder to make or replace; of a link, the folder that it leads to.
        check: raises if the target may not be replaced. Called right before the replacement.

    Raises:
        OutputError: a file or folder can't be written; the target is as it was.
    """
    place = Path(os.path.realpath(target))
    with _workspace(target, place) as workspace:
        if Path.cwd().is_relative_to(place):
            raise OutputError(f"{target} is the folder that you are in: choose another target")
        new = workspace / "new"
        yield new
        _flush(new, *new.rglob("*"))
        _put_in_place(new, place, workspace / "old" / place.name, check)
        _flush(place.parent)
        shutil.rmtree(workspace / "old", ignore_errors=True)  # only now is the new one safe from a power failure


@contextmanager
def replacing_file(target: Path, check: Callable[[], None]) -> Iterator[IO[bytes]]:
    """A file to write to. It becomes the target on success and is removed on failure. Otherwise like `replacing`."""
    place = Path(os.path.realpath(target))
    with _workspace(target, place) as workspace:
        path = workspace / "new" / place.name
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check()
        path.replace(place)
        _flush(place.parent)


@contextmanager
def _workspace(target: Path, place: Path) -> Iterator[Path]:
    """A locked and marked folder beside the target's real place, removed at the end."""
    folder = place.with_name(f".gpt2onnx-{secrets.token_hex(8)}")
    lock = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place.parent)
        folder.mkdir(0o700)
        lock = _lock(folder)
        (folder / _MARK).touch()  # after the lock, so that no other run finds the mark without it
        (folder / "new").mkdir()
        (folder / "old").mkdir()
        yield folder
    except shutil.Error as error:  # of several files; the first one's reason
        raise OutputError(f"can't write {target}: {error.args[0][0][-1]}") from error
    except OSError as error:
        raise OutputError(f"can't write {target}: {error.strerror or error}") from error
    finally:
        _remove(folder)
        _unlock(lock)


def _put_in_place(new: Path, place: Path, old: Path, check: Callable[[], None]) -> None:
    """Renames the target aside and the new folder into its place. Another run may do the same at any moment."""
    for tries_left in reversed(range(_MOST_TRIES)):
        try:
            occupied = place.exists() and any(place.iterdir())
            check()
            with suppress(FileNotFoundError):  # another run has just moved it
                if occupied:
                    place.rename(old)
                else:
                    place.rmdir()  # Windows renames onto no folder, not even an empty one
            new.rename(place)
        except OSError:
            if not tries_left or not place.exists():
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            return


def _flush(*paths: Path) -> None:
    """Writes files and folders to the disk, so that a power failure can't leave names without content."""
    if sys.platform == "win32":  # can't flush a folder
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    """Removes the workspaces of killed runs."""
    for mark in parent.glob(f"*/{_MARK}"):
        with suppress(OSError):  # another run was faster, or the folder isn't ours to remove
            lock = _lock(mark.parent)
            if lock is not None:
                _remove(mark.parent)
            _unlock(lock)


def _remove(workspace: Path) -> None:
    """Removes a workspace. A previous target in it returns to its place if nothing has taken that."""
    for old in list(workspace.glob("old/*")):
        place = workspace.parent / old.name
        if not place.exists():
            try:
                old.rename(place)
            except OSError:
                return  # the next run tries again
    # The mark goes last, so that the next run can continue a removal that was cut short.
    with suppress(OSError):
        for folder in (workspace / "new", workspace / "old", workspace):
            if folder.exists():
                shutil.rmtree(folder)


def _lock(folder: Path) -> int | None:
    """A descriptor that locks a folder until it is closed or the process ends.

    None if another process holds the lock, or the system has none: Windows, some network file systems.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        with suppress(OSError):  # of a disk that has failed
            os.close(lock)
