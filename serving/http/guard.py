"""Guard: checks host, API key, content type, size and speed of every HTTP request before the application sees it."""

import asyncio
import hmac
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...models import limits
from ...models.messages import shown
from ..metrics import Metrics
from ..responses import CLIENT_LEFT, ApiError

# The page loads its own files only, and no inline scripts or styles.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
_LONGEST_ID = 200  # letters
KEY_NEEDED = ("/v1", "/metrics", "/tokenize", "/detokenize")  # paths; the others tell nothing about users
_ABANDONED = {CLIENT_LEFT: "client", 504: "timeout"}


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Which requests are let in.

    Attributes:
        keys: API keys, any of which is accepted; empty: no key needed.
        only_local: refuse a Host header that isn't localhost or a loopback address (DNS rebinding: a web page makes the
            browser send requests to its own name, which it points to this machine).
        hosts: names that are let in besides.
    """

    keys: Sequence[bytes] = ()
    only_local: bool = True
    hosts: Sequence[str] = ()
    body_bytes: int = 2**20
    body_seconds: float = limits.BODY_SECONDS

    def accepts(self, key: bytes) -> bool:
        """Whether a key is one of the keys. All are compared in full, so that the time tells nothing about them."""
        matches = [hmac.compare_digest(key, each) for each in self.keys]
        return any(matches)


class Guard:
    """ASGI middleware that applies an admission.

    Args:
        metrics: counts the responses to completions by status.
    """

    def __init__(self, app: ASGIApp, admission: Admission, metrics: Metrics) -> None:
        self._app, self._admission, self._metrics = app, admission, metrics
        self._hosts = {host.lower() for host in admission.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        path = _routed(scope["path"], scope.get("root_path", ""))
        # The client's own, or a new one.
        request_id = Headers(scope=scope).get("x-request-id", "")[:_LONGEST_ID] or secrets.token_hex(8)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("x-request-id", request_id)
                if path in _COMPLETIONS:
                    self._count(message["status"])
            await send(message)

        try:
            self._check(scope["method"], path, Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, answer)
        else:
            await self._app(scope, self._limited(receive), answer)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        admission = self._admission
        host = headers.get("host", "").lower()
        if admission.only_local and not is_loopback(host) and not self._hosts & {host, host.rpartition(":")[0]}:
            raise ApiError(
                403,
                "call this server by the name localhost or 127.0.0.1, or start it with --allowed-host NAME or --api-key-file",
            )
        if admission.keys and path.startswith(KEY_NEEDED):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            key = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
            if not admission.accepts(key):
                message = "the API key is missing or wrong: send the header 'Authorization: Bearer KEY'"
                raise ApiError(401, message, headers={"www-authenticate": "Bearer"})
        # Browsers let any web page send other content types to this server without asking it first (CORS).
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            raise ApiError(415, "send JSON, with the header 'Content-Type: application/json'")
        if (coding := headers.get("content-encoding", "identity")) != "identity":
            raise ApiError(415, f"the body is coded as {shown(coding)}: send it as it is, without Content-Encoding")
        length = headers.get("content-length", "0")  # h11 lets only digits through
        if int(length) > admission.body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """A `receive` that raises ApiError if the body is too large or too slow, or the client leaves."""
        seconds = self._admission.body_seconds
        deadline = asyncio.get_running_loop().time() + seconds
        size, complete = 0, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:  # the next message is the client's leaving, which has no time limit
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                reason = f"the body wasn't complete after {seconds:g} seconds: send it faster"
                raise ApiError(408, reason, headers={"connection": "close"}) from error
            if message["type"] == "http.disconnect":
                raise ApiError(CLIENT_LEFT, "the client has closed the connection")
            size += len(message.get("body", b""))
            if size > self._admission.body_bytes:
                raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        return limited

    def _too_large(self) -> ApiError:
        limit = f"{self._admission.body_bytes:,}"
        return ApiError(
            413,
            f"the body is larger than {limit} bytes: send less, or raise --max-body",
            headers={"connection": "close"},
        )

    def _count(self, status: int) -> None:
        self._metrics.requests.labels(str(status)).inc()
        if status in _ABANDONED:
            self._metrics.abandoned.labels(_ABANDONED[status]).inc()


def _routed(path: str, root: str) -> str:
    """The path that the application routes by. uvicorn puts the root path before it, although the proxy has taken that away."""
    rest = path.removeprefix(root)
    return rest if rest.startswith("/") else path


def is_loopback(host: str) -> bool:
    """Whether a name or address, with or without a port, can be reached from this machine only."""
    for name in (host.lower(), host.lower().rpartition(":")[0]):
        if name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            if ipaddress.ip_address(name.strip("[]")).is_loopback:
                return True
        except ValueError:
            pass
    return False
