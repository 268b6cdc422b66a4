"""Connection: uvicorn's HTTP/1.1 protocol with two time limits that uvicorn lacks."""

import asyncio
from typing import Any, Literal

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedConnection(H11Protocol):
    """A connection that is cut if headers arrive, or responses are read, too slowly.

    Args:
        header_seconds: time for the headers of a request.
        write_seconds: time for the client to read a full write buffer.
        arguments: uvicorn's.
    """

    def __init__(self, *, header_seconds: float, write_seconds: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._seconds = {"headers": header_seconds, "write": write_seconds}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start("headers")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("headers")
        else:
            self._start("headers")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop("headers")  # from here on, uvicorn's keep-alive time counts

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("write")

    def resume_writing(self) -> None:
        self._stop("write")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("headers")
        self._stop("write")
        super().connection_lost(exc)

    def _start(self, limit: Literal["headers", "write"]) -> None:
        """Starts a time limit unless it runs: headers in parts get no more time than headers at once."""
        if limit not in self._timers:
            self._timers[limit] = self.loop.call_later(self._seconds[limit], self.transport.abort)

    def _stop(self, limit: Literal["headers", "write"]) -> None:
        if limit in self._timers:
            self._timers.pop(limit).cancel()
