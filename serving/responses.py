"""Responses: JSON, and errors in OpenAI's form."""

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException, Response

from ..runtime.jsontext import to_line

# By status: OpenAI's type and default code of an error.
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
CLIENT_LEFT = 499  # nginx's status for a client that closed the connection; nobody reads it


def to_json(record: Any) -> bytes:
    """JSON without spaces; NaN and infinity become null."""
    return to_line(record, compact=True).encode("utf-8")


class JsonResponse(Response):
    """A response in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


class ApiError(HTTPException):
    """An error response.

    Args:
        message: one line for a person.
        param: field of the request that is wrong.
        code: for programs; None for the status's default.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        kind, default = _KINDS.get(status, ("invalid_request_error", None))
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code or default}
        }

    def response(self) -> JsonResponse:
        """The error as a response."""
        return JsonResponse(self.body, self.status_code, self.headers)
