"""What native libraries do in place of raising an exception: print on standard error, panic."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from ...models.messages import one_line

_one_at_a_time = threading.Lock()


def is_panic(error: BaseException | None) -> bool:
    """Whether it comes from a library in Rust that gave up: no Exception, and of a type that can't be imported."""
    return type(error).__name__ == "PanicException"


@contextmanager
def raising(error: Callable[[str], Exception], *, silently: bool = True) -> Iterator[None]:
    """Turns whatever a library raises, panics among it, into an error.

    Args:
        error: makes it of the library's reason, in one line.
        silently: drop the trace that a panic prints, and what other threads print meanwhile.
    """
    try:
        with silenced_stderr() if silently else nullcontext():
            yield
    except BaseException as reason:
        if not (isinstance(reason, Exception) or is_panic(reason)):
            raise
        raise error(one_line(reason)) from reason


@contextmanager
def silenced_stderr() -> Iterator[None]:
    """Discards standard error, of all threads. Log handlers are locked meanwhile."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        with _stderr_to(nowhere):
            yield
    finally:
        os.close(nowhere)


@contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """Captures standard error of native code. Yields a function that returns it afterwards."""
    import tempfile  # slow to import, and rarely needed

    content = ""
    with tempfile.TemporaryFile() as file:
        try:
            with _stderr_to(file.fileno()):
                yield lambda: content
        finally:
            file.seek(0)
            content = file.read().decode("utf-8", "replace")


@contextmanager
def _stderr_to(descriptor: int) -> Iterator[None]:
    with ExitStack() as held:
        held.enter_context(_one_at_a_time)  # of two, the first to end would give back what the second took away
        for handler in logging.getLogger().handlers:
            handler.acquire()
            held.callback(handler.release)
        try:
            saved = os.dup(2)
        except OSError:  # closed
            yield
            return
        os.dup2(descriptor, 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
