"""Errors that clients get, as OpenAI writes them."""

from collections.abc import Mapping
from typing import Any

_KINDS = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("not_found_error", None),
    408: ("timeout_error", "body_timeout"),
    413: ("invalid_request_error", "body_too_large"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", None),
    503: ("server_error", "unavailable"),
    504: ("timeout_error", "timeout"),
}


class ApiError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: of HTTP.
        message: one line, for a person.
        param: the field that is wrong.
        code: for a program; by default the status's own.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind, default = _KINDS.get(status, ("invalid_request_error", None))
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code or default}
        }
