"""A folder that appears whole or not at all, and leaves nothing behind for good.

What is written goes to a hidden folder beside the target, which takes the target's place at the end.
It is locked while its process lives, so a later run for the same target can tell what a killed one left.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2onnx.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed runs stay there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """An empty folder to write to; it becomes the target if all goes well, and is removed if not.

    Args:
        target: the folder to make or replace.
        check: raises where the target may not be replaced; called once more before that happens.

    Raises:
        OutputError: something can't be written; the target is as it was.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
    except OSError as error:
        raise OutputError(f"can't write to {target.parent}: {error.strerror or error}") from error
    old = folder.with_suffix(".old")
    lock = _lock(folder)
    try:
        yield folder
        folder.chmod(0o755)
        check()
        if target.exists():
            target.rename(old)
        folder.rename(target)
    except OSError as error:
        raise OutputError(f"can't write {target}: {error.strerror or error}") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor whose closing, or the end of the process, frees the folder; None where another holds it."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(target: Path) -> None:
    """Removes what killed runs for this target left, and brings back a target that one had just moved away."""
    for folder in target.parent.glob(f".{_literal(target.name)}.*.new"):
        lock = _lock(folder)
        if lock is None:
            continue
        old = folder.with_suffix(".old")
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _literal(name: str) -> str:
    """The name as a pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
