"""Sessions in forked processes: os.fork copies no threads, so a child can neither run nor destroy what waits for them."""

import ctypes
import os
import weakref
from typing import Any

from gpt2onnx.errors import BackendError

# Sessions with threads of their own. Those with none work in a child, too.
_threaded: weakref.WeakSet[Any] = weakref.WeakSet()
# In a child: the sessions that it has from its parent.
_inherited: set[Any] = set()


def watch(session: object) -> None:
    """Remembers a session that has threads."""
    _threaded.add(session)


def check(session: object) -> None:
    """Raises BackendError if a session is from before a fork."""
    if _inherited and session in _inherited:
        raise BackendError(
            "this process was forked after the model was loaded, and ONNX Runtime's threads weren't: load the model in each"
            " process (with gunicorn not in --preload, with multiprocessing by the start method spawn), or with threads=1"
        )


def _keep_all() -> None:
    for session in _threaded:
        _inherited.add(session)
        # One reference that nobody gives back, so that it isn't destroyed when the interpreter ends either.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
    _threaded.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_keep_all)
