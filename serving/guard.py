"""What is done with every request before the application sees it: whose it is, how large, and how slow."""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from .api_error import ApiError
from .metrics import Metrics
from .sent import to_json

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Nothing from elsewhere, and nothing inline.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_COMPLETIONS = "/v1/completions"
# These say nothing about anybody, and are what load balancers and people look at first.
_PUBLIC = ("/v1", "/metrics")


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Who may send what.

    Attributes:
        keys: any of them opens the interface; none where it is open to all.
        only_local: refuse requests that were sent to another name than this machine's own: web pages can
            let a browser do that (DNS rebinding).
        body_bytes: of a request.
        body_seconds: until it has to be there.
    """

    keys: Sequence[bytes] = ()
    only_local: bool = True
    body_bytes: int = 2**20
    body_seconds: float = 30.0


class Guard:
    """Refuses what the admission doesn't allow, and hands the rest on with its body read.

    Args:
        app: the application.
        admission: who may send what.
        metrics: told how completions were answered.
    """

    def __init__(self, app: App, admission: Admission, metrics: Metrics) -> None:
        self._app, self._admission, self._metrics = app, admission, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answered = False

        async def answer(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                given = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.encode(), value.encode())
                        for name, value in _HEADERS.items()
                        if name.encode() not in given
                    ),
                ]
                if scope["path"] == _COMPLETIONS:
                    self._metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(scope["path"], headers)
            body = await self._body(headers, receive) if scope["method"] in ("POST", "PUT", "PATCH") else b""
        except ApiError as error:
            await _refuse(error, answer)
            return
        if body is None:  # the client has left
            self._metrics.abandoned.labels("client").inc()
            return
        await self._app(scope, _replay(body, receive), answer)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        if self._admission.only_local and not _is_local(headers.get("host", "")):
            raise ApiError(403, "requests to this server have to name it localhost or 127.0.0.1")
        if self._admission.keys and path.startswith(_PUBLIC):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            key = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
            # All are compared, so that the time doesn't tell which one it is like.
            if not max([hmac.compare_digest(key, one) for one in self._admission.keys]):
                message = "the API key is missing or wrong: send the header 'Authorization: Bearer KEY'"
                raise ApiError(401, message, headers={"www-authenticate": "Bearer"})
        if path == _COMPLETIONS and headers.get("content-length", "") != "0":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            # What a web page may send without being asked isn't JSON.
            if ("content-length" in headers or "transfer-encoding" in headers) and kind != "application/json":
                raise ApiError(415, "send JSON, with the header 'Content-Type: application/json'")

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        most = self._admission.body_bytes
        too_large = ApiError(413, f"the request is larger than {most:,} bytes", headers={"connection": "close"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise too_large
        parts, size = [], 0
        deadline = time.monotonic() + self._admission.body_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.001, deadline - time.monotonic()))
            except TimeoutError as error:
                reason = f"the request wasn't there after {self._admission.body_seconds:g} seconds"
                raise ApiError(408, reason, headers={"connection": "close"}) from error
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                raise too_large
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


async def _refuse(error: ApiError, send: Send) -> None:
    body = to_json(error.body)
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, for this machine only."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_local(host: str) -> bool:
    """The same, of a Host header, which may have a port."""
    name, _, port = host.rpartition(":")
    return is_loopback((name if port.isdecimal() and name else host).lower())
