"""Connections: how long each may take, how many there are, and how much the log says about them."""

import asyncio
import logging
import sys
import time
from typing import Any, Literal

from uvicorn.protocols.http.h11_impl import H11Protocol

from ...models import limits

# Their lines and traces tell of single connections, whose number clients choose.
_LOGGERS = ("asyncio", "uvicorn.error")


def most() -> int:
    """How many connections there may be: half the descriptors of this process, so that they never run out."""
    if sys.platform == "win32":
        return limits.CONNECTIONS
    import resource

    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limits.CONNECTIONS if descriptors == resource.RLIM_INFINITY else min(limits.CONNECTIONS, descriptors // 2)


class OncePerSecond(logging.Filter):
    """Lets each kind of warning through once a second at most, and none on requests that the server's end cuts off."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is logged."""
        if record.levelno < logging.WARNING:
            return True
        if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
            return False
        kind = str(record.msg).partition("\n")[0]
        if "out of system resource" in kind:  # asyncio's, with a trace
            record.msg, record.args, record.exc_info = f"{kind}: raise the limit of open files (ulimit -n)", (), None
        now = time.monotonic()
        if now < self._last.get(kind, -1.0) + 1:
            return False
        self._last[kind] = now
        return True

    def install(self) -> None:
        """Filters what uvicorn and asyncio log."""
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self)


class Waiting:
    """The connections whose clients the server waits for: to send a request, or to read an answer.

    The first of them is cut off where there are too many connections, or bodies that arrive take too much memory. So
    connections that are kept open without a request get in nobody's way.

    Args:
        connections: most connections, of any kind.
        body_bytes: most bytes of bodies that haven't arrived as a whole.
    """

    def __init__(self, connections: int, body_bytes: int) -> None:
        self._most, self._most_bytes = connections, body_bytes
        self._bytes: dict[TimedConnection, int] = {}  # received of a body; longest waiting first
        self._total = 0

    def add(self, connection: "TimedConnection", received: int = 0) -> None:
        """Waits for a connection's client; `received` bytes of a body have come since the last call."""
        self._bytes[connection] = self._bytes.get(connection, 0) + received
        self._total += received
        while self._total > self._most_bytes:
            self._cut(next(each for each, size in self._bytes.items() if size))

    def remove(self, connection: "TimedConnection") -> None:
        """No longer waits for it."""
        self._total -= self._bytes.pop(connection, 0)

    def make_room(self, newest: "TimedConnection", connections: int) -> None:
        """Cuts a connection off if there are too many: the one that waits longest, or the newest where none does."""
        if connections > self._most:
            self._cut(next(iter(self._bytes), newest))

    def cut_bodies(self) -> None:
        """Cuts off those that send a body: no answer will come to it."""
        for connection in [each for each, size in self._bytes.items() if size]:
            self._cut(connection)

    def _cut(self, connection: "TimedConnection") -> None:
        self.remove(connection)
        connection.transport.abort()


class TimedConnection(H11Protocol):
    """uvicorn's connection with limits that uvicorn lacks: it is cut if headers arrive, or responses are read, too slowly.

    Args:
        header_seconds: time for the headers of a request.
        write_seconds: time for the client to read a full write buffer.
        waiting: the connections of the same server that wait for their clients.
    """

    def __init__(self, *, header_seconds: float, write_seconds: float, waiting: Waiting, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._seconds = {"headers": header_seconds, "write": write_seconds}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._waiting = waiting

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting.make_room(self, len(self.connections))
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_request()
            return
        self._stop("headers")
        if self.cycle.more_body:
            self._waiting.add(self, len(data))
        else:
            self._waiting.remove(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop("headers")  # from here on, uvicorn's keep-alive time counts
        self._waiting.remove(self)
        if not self.transport.is_closing():
            self._waiting.add(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("write")
        self._waiting.add(self)

    def resume_writing(self) -> None:
        self._stop("write")
        self._waiting.remove(self)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("headers")
        self._stop("write")
        super().connection_lost(exc)
        self._waiting.remove(self)

    def _wait_for_request(self) -> None:
        if not self.transport.is_closing():
            self._start("headers")
            self._waiting.add(self)

    def _start(self, limit: Literal["headers", "write"]) -> None:
        """Starts a time limit unless it runs: headers in parts get no more time than headers at once."""
        if limit not in self._timers:
            self._timers[limit] = self.loop.call_later(self._seconds[limit], self.transport.abort)

    def _stop(self, limit: Literal["headers", "write"]) -> None:
        if limit in self._timers:
            self._timers.pop(limit).cancel()
