"""Results as JSON in one line."""

import json
import math
from typing import Any


def to_line(record: Any, *, compact: bool = False, ascii_only: bool = False) -> str:
    """JSON in one line; NaN and infinities become null.

    Args:
        compact: without a space anywhere.
        ascii_only: write other letters as escapes.
    """
    separators = (",", ":") if compact else None
    try:
        text = json.dumps(record, ensure_ascii=ascii_only, allow_nan=False, separators=separators)
    except ValueError:  # rare, so only such records are copied
        record = finite(record)
        text = json.dumps(record, ensure_ascii=ascii_only, allow_nan=False, separators=separators)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        text = json.dumps(record, allow_nan=False, separators=separators)
    return text


def finite(value: Any) -> Any:
    """A value as JSON can hold it: NaN and infinities become null."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
