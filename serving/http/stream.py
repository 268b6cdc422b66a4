"""Responses to a call: as a whole or as server-sent events. Both end early if the deadline passes or the client leaves."""

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..call import Call
from ..metrics import Metrics
from ..responses import CLIENT_LEFT, ApiError, JsonResponse, to_json

# Proxies cut connections that are silent for a minute or so.
_COMMENT_SECONDS = 15.0
_DONE = b"data: [DONE]\n\n"


async def whole(call: Call, request: Request) -> JsonResponse:
    """A call's completions, once it is done.

    Raises:
        ApiError: the call failed, its deadline has passed, or the client has left.
    """
    leaving = asyncio.ensure_future(_disconnect(request.receive))
    leaving.add_done_callback(lambda _: call.news.set())
    try:
        while not call.done:
            await _news(call, call.deadline)
            if leaving.done():
                raise ApiError(CLIENT_LEFT, "the client has closed the connection")
    except TimeoutError as error:
        raise call.timeout() from error
    finally:
        leaving.cancel()
    if (failure := call.failure()) is not None:
        raise failure
    choices = list(call.take())
    return JsonResponse(call.record(choices, call.usage))


class EventStream(StreamingResponse):
    """A call's completions as server-sent events.

    All new text goes into one event once the client has read the last one: a slow reader gets fewer, larger events.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call, metrics: Metrics) -> None:
        super().__init__(self._events(), headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._call, self._metrics = call, metrics
        self._complete = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)  # returns early if the client leaves
        finally:
            if not self._complete:
                self._metrics.abandoned.labels("client").inc()
            self._call.close()

    async def _events(self) -> AsyncIterator[bytes]:
        call, options = self._call, self._call.body.stream_options
        always = options is not None and options.continuous_usage_stats
        done = False
        while not done:
            try:
                await _news(call, min(call.deadline, time.monotonic() + _COMMENT_SECONDS))
            except TimeoutError:
                if time.monotonic() < call.deadline:
                    yield b": waiting\n\n"
                    continue
                self._metrics.abandoned.labels("timeout").inc()
                self._complete = True
                yield _event(call.timeout().body) + _DONE
                return
            done = call.done  # before `take`, which would otherwise miss the last pieces
            choices = list(call.take())
            usage = call.usage if always else None
            if choices:
                yield b"".join(_event(call.record([choice], usage)) for choice in choices)
        self._complete = True
        if (failure := call.failure()) is not None:
            yield _event(failure.body) + _DONE
            return
        if options is not None and options.include_usage:
            yield _event(call.record([], call.usage))
        yield _DONE


async def _news(call: Call, deadline: float) -> None:
    """Waits for news of a call; raises TimeoutError at the deadline, of `time.monotonic`."""
    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
        await call.news.wait()
    call.news.clear()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(record: object) -> bytes:
    return b"data: " + to_json(record) + b"\n\n"
