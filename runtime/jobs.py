"""Jobs: one JSON request a line in, one JSON result a line out, in the same order.

A request is {"id": …, "prompt": "…"} or {"id": …, "prompt_ids": […]} plus generation options. A line
that can't be carried out becomes {"id": …, "error": "…"} and stops nothing.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from gpt2onnx.errors import Gpt2OnnxError, OptionError, PromptError

from ..models.messages import one_line, shown
from .model import BATCH_SIZE, Model
from .options import GenerationConfig
from .requests import Request

Record = dict[str, Any]


def run(
    model: Model, lines: Iterable[str | PromptError], options: GenerationConfig, batch_size: int = BATCH_SIZE
) -> Iterator[Record]:
    """Carries out request lines, up to `batch_size` at once.

    Args:
        lines: one JSON object each, or why it can't be read; taken when there is room for them.
        options: hold unless a line says otherwise.
        batch_size: requests that are decoded together. In fp32 no result depends on it; kernels of lower precision round
            one row in another way than several, which may decide a near tie.

    Yields:
        A record for each line, in the order of the lines.

    Raises:
        OptionError: batch_size is below 1.
        BackendError: ONNX Runtime failed.
    """
    # Requests that ended before an earlier one wait here; there can't be more than the batch
    # finishes while its longest sequence lasts.
    finished: dict[int, Record] = {}
    due = 0

    def requests() -> Iterator[Request]:
        for index, line in enumerate(lines):
            try:
                request = parse(line, options)
            except (PromptError, OptionError) as error:
                request = Request("", options, error=error)
            yield replace(request, id=(index, identity(line)))

    for request, outcome in model.complete(requests(), batch_size):
        index, name = request.id
        fields = {"error": str(outcome)} if isinstance(outcome, Gpt2OnnxError) else outcome.to_dict()
        finished[index] = {"id": name} | fields
        while due in finished:
            yield finished.pop(due)
            due += 1


def parse(line: str | PromptError, options: GenerationConfig) -> Request:
    """A request line.

    Raises:
        PromptError: the line can't be read, is no JSON object, or has not exactly one of prompt and prompt_ids.
        OptionError: an option is unknown, out of range, or contradicts another.
    """
    if isinstance(line, PromptError):
        raise line
    try:
        content = _load(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"the line {shown(line)} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise PromptError(
            f'the line {shown(line)} is not a JSON object such as {{"id": 1, "prompt": "Once upon a time"}}'
        )
    prompt, ids = content.get("prompt"), content.get("prompt_ids")
    if (prompt is None) == (ids is None):
        raise PromptError("the request needs a prompt or prompt_ids, and not both")
    if not isinstance(prompt, str | None):
        raise PromptError("prompt must be a text")
    if not isinstance(ids, list | None):
        raise PromptError("prompt_ids must be a list of token ids")
    given = {name: value for name, value in content.items() if name not in ("id", "prompt", "prompt_ids")}
    return Request(content["prompt"] if ids is None else ids, options.merged(given))


def identity(line: str | PromptError) -> Any:
    """The id of a request line; None where it has none."""
    content = None
    if not isinstance(line, PromptError):
        with suppress(ValueError, RecursionError):
            # An option may be NaN or infinite.
            content = json.loads(line, parse_constant=lambda name: None, parse_float=_float_or_none)
    return content.get("id") if isinstance(content, dict) else None


def key(identity: Any, request_hash: str) -> str:
    """Key that a result shares with its request."""
    return f"{request_hash} {json.dumps(identity, sort_keys=True)}"


def load(line: str | bytes) -> Any:
    """JSON of a line, in UTF-8 if it is bytes; None where it is none."""
    try:
        return _load(line)
    except (ValueError, RecursionError):
        return None


def _load(line: str | bytes) -> Any:
    return json.loads(line, parse_constant=_no_number, parse_float=_finite_float)


def _float_or_none(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _finite_float(text: str) -> float:
    number = _float_or_none(text)
    return _no_number(text) if number is None else number


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
