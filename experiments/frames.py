"""Results as a table of pandas, for notebooks."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gpt2onnx.errors import MissingExtraError

from ..runtime.requests import Result

if TYPE_CHECKING:
    import pandas


def to_pandas(results: Result | Iterable[Result]) -> "pandas.DataFrame":
    """A table of results, a row for each continuation.

    Args:
        results: from `generate`.

    Returns:
        Columns prompt, text, tokens (new ones), finish_reason, score, seed, seconds and tokens_per_second of the whole
        result, and joules where energy was measured.

    Raises:
        MissingExtraError: pandas isn't installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise MissingExtraError("A table of results", "pandas", "energy") from error
    rows = [row for result in ([results] if isinstance(results, Result) else results) for row in _rows(result)]
    return pandas.DataFrame(rows)


def _rows(result: Result) -> Iterable[dict[str, Any]]:
    tokens = result.usage["completion_tokens"]
    shared = {
        "seed": result.seed,
        "seconds": result.seconds,
        "tokens_per_second": tokens / result.seconds if result.seconds else None,
    }
    if result.energy is not None:
        shared["joules"] = result.energy.joules
    for sequence in result.sequences:
        yield {
            "prompt": result.prompt,
            "text": sequence.text,
            "tokens": len(sequence.token_ids),
            "finish_reason": sequence.finish_reason,
            "score": sequence.score,
            **shared,
        }
