"""Ray: joined or started, quiet, and left at the end."""

import gc
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray

from gpt2onnx.errors import BackendError, OptionError

from ..runtime.host import resources

# Only requests and results of the parts under way are in it, and a local cluster's workers read the bundle's folder.
_LOCAL_STORE = 256 << 20  # bytes
_PATIENCE = 10  # seconds until a cluster's head takes a connection


def check(address: str | None) -> None:
    """Refuses an address that a job can't be started from; raises OptionError."""
    if address is not None and "://" in address:
        raise OptionError(
            f"the address {address} is of Ray Client, which has no machine of the cluster to itself:"
            " start the command on one of them (ray job submit), with --address auto"
        )


@contextmanager
def joined(address: str | None, cores: int, *, verbose: bool) -> Iterator[None]:
    """A cluster that this process has joined: the one at an address, or one of its own on this machine.

    One that the process has joined before stays joined.

    Args:
        address: host:port of the cluster's head, or "auto" for the one that runs on this machine.
        cores: that workers are to have, in a cluster of its own; there are as many as this process may use in any case.
        verbose: let Ray and the workers log.

    Raises:
        BackendError: there is no such cluster, or none can be started.
    """
    if ray.is_initialized():
        yield
        # Ray's datasets refer to themselves: the job's bundle would stay in the store until Python came to collect it.
        gc.collect()
        return
    if address is not None and address != "auto":
        _reach(address)
    own: dict[str, Any] = {
        "num_cpus": max(cores, resources.cores().usable),
        "include_dashboard": False,
        "object_store_memory": _LOCAL_STORE,
    }
    level = logging.INFO if verbose else logging.CRITICAL
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        for handler in logging.getLogger("ray.data").handlers:
            if isinstance(handler, logging.StreamHandler):  # the others write to files
                handler.setLevel(level)
    try:
        with nullcontext() if verbose else _silent():
            ray.init(address=address or "local", log_to_driver=verbose, logging_level=level, **({} if address else own))
    except Exception as error:  # Ray has no class of its own for what goes wrong here
        action = f"can't join the Ray cluster at {address}" if address else "can't start Ray on this machine"
        raise BackendError(f"{action}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Fails at once where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, ValueError) as error:
        raise BackendError(f"can't join the Ray cluster at {address}: {error}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Standard error without what Ray's native part says of its own settings, which nothing else keeps it from."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
