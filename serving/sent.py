"""JSON as it is sent."""

from typing import Any

from ..runtime.jsontext import finite, to_line


def to_json(record: Any) -> bytes:
    """JSON without spaces; what isn't a number becomes null."""
    try:
        text = to_line(record, compact=True)
    except ValueError:  # few records hold such a number, so they aren't all looked through
        text = to_line(finite(record), compact=True)
    return text.encode("utf-8")
