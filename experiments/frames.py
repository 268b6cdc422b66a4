"""Results as a table of pandas, for notebooks."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from gpt2onnx.errors import MissingExtraError

if TYPE_CHECKING:
    import pandas


class Tabular(Protocol):
    """What has rows: `Result`, and what `sweep`, `Model.evaluate` and `Model.next_token` return."""

    def rows(self) -> Iterable[dict[str, Any]]:
        """Rows by column."""
        ...


def to_pandas(results: Tabular | Iterable[Tabular]) -> "pandas.DataFrame":
    """A table of results.

    Args:
        results: one or more of what `Model.generate`, `sweep`, `Model.evaluate` or `Model.next_token` return. A row is a
            continuation, a run, a part of the text, or a candidate.

    Raises:
        MissingExtraError: pandas isn't installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise MissingExtraError("A table of results", "pandas", "energy") from error
    several = results if isinstance(results, Iterable) else [results]
    return pandas.DataFrame([row for result in several for row in result.rows()])
