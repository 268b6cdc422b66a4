"""Answers that are sent as they grow, to clients that may be slow or gone."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping

from gpt2onnx.errors import MissingExtraError

try:
    from starlette.background import BackgroundTask
    from starlette.responses import Response
except ImportError as error:
    raise MissingExtraError("Serving", "fastapi", "serve") from error

from .call import Call
from .guard import Receive, Scope, Send
from .metrics import Metrics
from .sent import to_json

# A comment after so many seconds without news, so that nobody in between thinks that the connection is dead.
_COMMENT_AFTER = 15.0
# A reader that takes nothing for so long has left.
WRITE_SECONDS = 60.0


class Left(Exception):  # noqa: N818
    """The client has closed the connection."""


class Client:
    """Who waits for an answer; made by `watched`."""

    def __init__(self, receive: Receive, news: asyncio.Event) -> None:
        self._news = news
        self._leaving = asyncio.ensure_future(_disconnect(receive))
        self._leaving.add_done_callback(lambda _: news.set())

    async def wait(self, deadline: float) -> None:
        """Waits for news.

        Args:
            deadline: of `time.monotonic`.

        Raises:
            Left: the client has.
            TimeoutError: the deadline is over.
        """
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            await self._news.wait()
        self._news.clear()
        if self._leaving.done():
            raise Left

    async def close(self) -> None:
        """Ceases to look."""
        self._leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._leaving


@contextlib.asynccontextmanager
async def watched(receive: Receive, news: asyncio.Event) -> AsyncIterator[Client]:
    """Sets the event also when the client leaves."""
    client = Client(receive, news)
    try:
        yield client
    finally:
        await client.close()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A call's completions as server-sent events.

    What has come while the client was reading goes into one event, so a slow reader gets larger pieces, and what waits
    for it is never more than its own text.

    Args:
        call: submitted.
        deadline: of `time.monotonic`, when it has to be done.
        metrics: told why it was given up.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        call: Call,
        deadline: float,
        metrics: Metrics,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        background: BackgroundTask | None = None,
    ) -> None:
        self.status_code, self.background = status_code, background
        self.body = b""
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"} | dict(headers or {}))
        del self.headers["content-length"]
        self._call, self._deadline, self._metrics = call, deadline, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with watched(receive, self._call.news) as client:
                await self._send_all(client, send)
        except Left:
            self._metrics.abandoned.labels("client").inc()
        except TimeoutError:
            self._metrics.abandoned.labels("slow").inc()
            abort = scope.get("state", {}).get("abort")
            if abort is not None:
                abort()
        finally:
            self._call.close()

    async def _send_all(self, client: Client, send: Send) -> None:
        call = self._call

        async def write(data: bytes, *, last: bool = False) -> None:
            async with asyncio.timeout(WRITE_SECONDS):
                await send({"type": "http.response.body", "body": data, "more_body": not last})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        done = False
        while not done:
            try:
                await client.wait(min(self._deadline, time.monotonic() + _COMMENT_AFTER))
            except TimeoutError:
                if time.monotonic() < self._deadline:
                    await write(b": waiting\n\n")
                    continue
                self._metrics.abandoned.labels("timeout").inc()
                await write(_event(call.too_late().body), last=True)
                return
            done = call.done  # asked before the pieces are taken, so that none is left behind
            events = b"".join(_event(call.record([choice], None)) for choice in call.take())
            if events:
                await write(events)
        if (failure := call.failure()) is not None:
            await write(_event(failure.body), last=True)
            return
        options = call.body.stream_options
        tail = _event(call.record([], call.usage)) if options is not None and options.include_usage else b""
        await write(tail + b"data: [DONE]\n\n", last=True)


def _event(record: object) -> bytes:
    return b"data: " + to_json(record) + b"\n\n"
