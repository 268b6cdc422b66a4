"""Text that grows while it is generated."""

from collections.abc import Generator, Iterable, Iterator

from .generation import Generation
from .requests import Request, Result
from .text.text_stream import TextStream


class Stream(Iterator[str]):
    """Pieces of a text that is being generated; made by `Model.stream`.

    Decoding goes on only while pieces are asked for. Left early, it keeps the text so far.

    Args:
        generation: the request under way.
        steps: decodes it; gives something after each step.
        text: its text.
    """

    def __init__(self, generation: Generation, steps: Iterable[object], text: TextStream) -> None:
        self._generation = generation
        self._pieces = _pieces(generation, steps, text)
        self._result: Result | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            self._result = self.result
            raise

    def close(self) -> None:
        """Ends it where it is."""
        self._pieces.close()
        self._result = self.result

    @property
    def request(self) -> Request:
        """The request."""
        return self._generation.request

    @property
    def result(self) -> Result:
        """The result so far."""
        return self._result or self._generation.result()


def _pieces(generation: Generation, steps: Iterable[object], text: TextStream) -> Generator[str]:
    sent = len(generation.strategy.prompt)
    for _ in steps:
        tokens = generation.continuations()[0].tokens
        for token in tokens[sent:].tolist():
            if piece := text.push(token):
                yield piece
        sent = len(tokens)
    if generation.error is not None:
        raise generation.error
    if piece := text.finish():
        yield piece
