"""Ray cluster: joined or started, quiet, and left at the end."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray

from gpt2onnx.errors import BackendError, OptionError

from ..runtime.host import resources
from ..runtime.host.native import silenced_stderr

_OBJECT_STORE = 256 << 20  # bytes of a local cluster's: parts in flight only, since workers open the bundle's folder
_CONNECT_SECONDS = 10


def check(address: str | None) -> None:
    """Raises OptionError for an address that a job can't be started from."""
    if address is not None and "://" in address:
        raise OptionError(
            f"{address} is an address of Ray Client, which runs on no machine of the cluster:"
            " start the command on one of them (ray job submit), with --address auto"
        )


@contextmanager
def joined(address: str | None, cores: int, *, verbose: bool) -> Iterator[None]:
    """Joins a cluster, or starts one on this machine, and leaves it. One that this process is in already stays joined.

    Args:
        address: host:port of the cluster's head; "auto": the cluster that runs on this machine; None: a new one.
        cores: of a new cluster, at least; by default those that this process may use.
        verbose: let Ray and the workers log.

    Raises:
        BackendError: there is no such cluster, or none can be started.
    """
    if ray.is_initialized():
        yield
        return
    if address is not None and address != "auto":
        _reach(address)
    settings: dict[str, Any] = {"address": address or "local"}
    if address is None:
        settings |= {
            "num_cpus": max(cores, resources.cores().usable),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
        }
    level = logging.INFO if verbose else logging.CRITICAL
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        # Ray's native part reports its settings on standard error; no option prevents that.
        with nullcontext() if verbose else silenced_stderr():
            ray.init(log_to_driver=verbose, logging_level=level, **settings)
    except Exception as error:  # Ray raises errors of many classes here
        action = f"can't join the Ray cluster at {address}" if address else "can't start Ray on this machine"
        raise BackendError(f"{action}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Fails at once if nothing listens; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise BackendError(f"can't join the Ray cluster at {address}: {error}") from error
