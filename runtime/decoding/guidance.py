"""Classifier-free guidance: each sequence has a second one, whose prompt is the negative prompt.

Source: Sanchez et al. 2023, "Stay on topic with Classifier-Free Guidance".
"""

import numpy as np

from gpt2onnx.errors import OptionError

from ..arrays import Logits, Tokens
from .beam_search import BeamSearch
from .sampling import Sampling
from .strategy import Continuation, Reader


class Guided:
    """A strategy with guidance: rows of the negative prompt follow its own rows, and get the same tokens.

    Args:
        strategy: chooses the tokens.
        negative: negative prompt, int64 [length].
    """

    def __init__(self, strategy: Sampling | BeamSearch, negative: Tokens) -> None:
        self._strategy = strategy
        self._negative = [negative] * strategy.rows
        self.prompt, self.seed = strategy.prompt, strategy.seed
        self.prompts = [strategy.prompt, negative]
        self.positions = strategy.positions + max(0, len(negative) - len(strategy.prompt))
        self.reader: Reader | None = None
        self.hidden_reader: Reader | None = None

    @property
    def rows(self) -> int:
        return 2 * self._strategy.rows

    @property
    def done(self) -> bool:
        return self._strategy.done

    @property
    def seconds(self) -> float:
        return self._strategy.seconds

    def begin(self) -> None:
        self._strategy.begin()

    @property
    def error(self) -> OptionError | None:
        return self._strategy.error

    def tokens(self, row: int) -> Tokens:
        own = self._strategy.rows
        return self._strategy.tokens(row) if row < own else self._negative[row - own]

    def draft(self) -> Tokens:
        return self.prompt[:0]

    def fork(self) -> None:
        return None

    def advance(self, logits: Logits) -> list[int]:
        own = self._strategy.rows
        sources = self._strategy.advance(logits[:own], logits[own:])
        # As in transformers, each row of the negative prompt goes on with the last tokens of its beam's place, whichever beam
        # comes to stand there.
        negative = list(range(own)) if isinstance(self._strategy, BeamSearch) else sources
        self._negative = [
            np.append(self._negative[source], self._strategy.tokens(row)[-1]) for row, source in enumerate(negative)
        ]
        return sources + [own + source for source in negative]

    def cancel(self, error: OptionError | None = None) -> None:
        self._strategy.cancel(error)

    def continuations(self) -> list[Continuation]:
        return self._strategy.continuations()
