"""Locks of files between processes. Each ends when it is released, its file is closed, or its process ends."""

import errno
import sys
from typing import IO

# Windows locks bytes, not files, and bars others from reading them: one that no file has.
_BEYOND = 2**30


def lock(file: IO[bytes]) -> None:
    """Waits until no other process holds the file, and takes it; on Windows the position in the file changes.

    Raises:
        OSError: the file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        file.seek(_BEYOND)
        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            except OSError as error:
                if error.errno != errno.EDEADLK:  # which it raises after ten seconds of waiting
                    raise
            else:
                return
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: IO[bytes]) -> bool:
    """Takes the file unless another process holds it, or the file system has no locks; says whether no other holds it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            position = file.tell()
            file.seek(_BEYOND)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(position)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def unlock(file: IO[bytes]) -> None:
    """Lets others have the file."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(_BEYOND)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)
