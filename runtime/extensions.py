"""Extension points: the caller's own functions in decoding, under transformers' names and with its shapes, in NumPy.

They see the sequences of one prompt, prompt included, and are called token by token, also where several tokens were computed
in one pass (speculative decoding). A processor must not change its arguments; an exception in one ends the request.
Semantics: transformers, src/transformers/generation/logits_process.py and stopping_criteria.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import OptionError

from .arrays import Logits, Tokens
from .text.structured import Constraint

# (input_ids int64 [rows, length], scores float32 [rows, vocab]) -> scores float32 [rows, vocab]
LogitsProcessor = Callable[[Tokens, Logits], Logits]
# (input_ids int64 [rows, length], scores float32 [rows, vocab]) -> whether all rows end, or bool [rows]
StoppingCriterion = Callable[[Tokens, Logits], "bool | npt.NDArray[np.bool_]"]
# (index of the prompt, input_ids int64 [length]) -> ids of the tokens that may come next
PrefixAllowedTokens = Callable[[int, Tokens], Sequence[int]]


@dataclass(frozen=True)
class Extensions:
    """The caller's functions for one request.

    Attributes:
        logits_processor: applied in order after the options' processors, before temperature and filters.
        stopping_criteria: end a sequence with the finish reason "stop".
        prefix_allowed_tokens_fn: forbids all tokens but the returned ones.
        index: of the prompt, for `prefix_allowed_tokens_fn`.
        constraint: of the options that ask for structured output.
    """

    logits_processor: Sequence[LogitsProcessor] = ()
    stopping_criteria: Sequence[StoppingCriterion] = ()
    prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None
    index: int = 0
    constraint: Constraint | None = None

    def process(self, tokens: Tokens, scores: Logits) -> Logits:
        """Scores [rows, vocab] after the processors, for tokens [rows, length].

        Raises:
            OptionError: a processor returns another shape, NaN or infinity.
        """
        for processor in self.logits_processor:
            shape, scores = scores.shape, np.asarray(processor(tokens, scores), np.float32)
            if scores.shape != shape:
                raise OptionError(f"a logits processor returned shape {list(scores.shape)}, not {list(shape)}")
            if not (scores < np.inf).all():
                raise OptionError(
                    "a logits processor returned NaN or infinity: only minus infinity, which forbids a token, is a score"
                )
        return scores

    def stops(self, tokens: Tokens, scores: Logits) -> npt.NDArray[np.bool_]:
        """Which rows some criterion ends, bool [rows]."""
        ended = np.zeros(len(tokens), bool)
        for criterion in self.stopping_criteria:
            ended |= np.asarray(criterion(tokens, scores), bool)
        return ended

    def forbid(self, tokens: Tokens, scores: Logits) -> None:
        """Sets the scores [vocab] of tokens that aren't allowed after tokens [length] to minus infinity.

        Raises:
            OptionError: no token is allowed.
        """
        assert self.prefix_allowed_tokens_fn is not None
        allowed = np.asarray(self.prefix_allowed_tokens_fn(self.index, tokens), np.int64)
        if not len(allowed):
            raise OptionError(f"prefix_allowed_tokens_fn allows no token after {tokens[-3:].tolist()}")
        kept = scores[allowed]
        scores[:] = -np.inf
        scores[allowed] = kept
