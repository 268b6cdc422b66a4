"""How runs of a model are watched from outside: what `runtime.energy` plugs in, and `generator` and `jobs` call.

Knows neither energy nor files.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .model import Model
    from .options import GenerationConfig
    from .requests import Result


class Run(AbstractContextManager["Run"], Protocol):
    """One run under watch. Left by an exception before it has ended, it counts for nothing."""

    def end(self, results: "list[Result]", again: Callable[[], object] | None = None) -> "list[Result]":
        """Ends it.

        Args:
            results: of the run, complete or as far as they came.
            again: makes the whole run once more; None where that is impossible or not wanted.

        Returns:
            The results, with what was found out about them.
        """
        ...

    def end_job(self, *, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Ends a run whose results nobody keeps, if it hasn't ended yet."""
        ...


class Observer(Protocol):
    """Watches all runs that are made while it is set."""

    def repeatable(self, options: "GenerationConfig") -> "GenerationConfig":
        """The same options, but made once more they give the same tokens."""
        ...

    def begin(
        self,
        model: "Model",
        options: "GenerationConfig",
        *,
        strategy: str | None = None,
        close: Callable[[], None] | None = None,
    ) -> Run:
        """Begins a run.

        Args:
            model: runs.
            options: its strategy.
            strategy: a name for it; by default what the options amount to.
            close: ends the run where the caller has left it.
        """
        ...


OBSERVER: ContextVar[Observer | None] = ContextVar("OBSERVER", default=None)
