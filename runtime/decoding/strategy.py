"""Strategies: the logits of a prompt's rows in, their next tokens out.

Knows neither text, cache nor ONNX Runtime. A strategy carries on one sequence a row; after each forward pass `advance`
lengthens them and says which row of the last pass each row of the next one continues.
"""

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gpt2onnx.errors import OptionError

from ..arrays import Logits, Tokens
from ..extensions import Extensions
from ..options import GenerationConfig
from .filters import warpers
from .logprobs import TokenLogprobs
from .processors import guided, process, processors
from .torch_random import Generator, log_softmax

# Whether a sequence ends with the tokens it has now, end tokens and lengths aside.
Stop = Callable[[Tokens], bool]
# Takes the logits [positions, vocab] after the next tokens of a prompt, or hidden states [positions, width] of these tokens; the
# array is overwritten later.
Reader = Callable[[Logits], None]


@dataclass
class Continuation:
    """One continuation of a prompt.

    Attributes:
        tokens: prompt and new tokens, int64 [length].
        finish_reason: "stop" (end token, stop string or criterion), "length", "context" or "time"; None while it
            goes on.
        logprobs: of each new token, if they were asked for.
        score: of a beam: its log probability divided by its length to the power of length_penalty.
    """

    tokens: Tokens
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    score: float | None = None


class Strategy(Protocol):
    """How one prompt is continued."""

    prompt: Tokens
    prompts: list[Tokens]
    """What its rows begin with, in equal parts: the prompt, and with guidance the negative prompt."""
    seed: int | None
    """Of its random draws; None without any."""
    positions: int
    """Most positions that a row comes to need in the cache."""
    reader: Reader | None
    """Takes the logits of the whole prompt; None: nobody wants them."""
    hidden_reader: Reader | None
    """Takes the hidden states of the whole prompt, then those of the rows before each `advance`; None: nobody wants them."""

    @property
    def error(self) -> OptionError | None:
        """Why it can't go on; None: it can, or has ended."""
        ...

    @property
    def rows(self) -> int:
        """Sequences in the next forward pass; the first passes are over the prompts, each once for all of its sequences."""
        ...

    @property
    def done(self) -> bool: ...

    @property
    def seconds(self) -> float:
        """Since `begin`; 0 before."""
        ...

    def begin(self) -> None:
        """Starts the clock: the computation of its prompt begins."""
        ...

    def tokens(self, row: int) -> Tokens:
        """The row's sequence; its last token is the one that the next forward pass computes."""
        ...

    def draft(self) -> Tokens:
        """Likely next tokens, taken from the text so far, to be verified in one forward pass; none if it has none."""
        ...

    def fork(self) -> "Strategy | None":
        """A copy that a faster network may carry on to draft the next tokens; None if it can't use drafts now.

        It draws the random numbers that this one will draw, and calls none of the caller's functions.
        """
        ...

    def advance(self, logits: Logits) -> list[int]:
        """Lengthens the sequences, given the logits [rows, vocab] after each row's last token.

        Returns:
            For each row of the next pass, the row of this pass that it continues.

        Raises:
            OptionError: options together leave no token.
        """
        ...

    def cancel(self, error: OptionError | None = None) -> None:
        """Ends it where it is: it is done, and its rows are free. An error says why it can't go on."""
        ...

    def continuations(self) -> list[Continuation]:
        """The results so far, best first if they are ranked."""
        ...


def advance(strategy: Strategy, logits: Logits) -> list[int]:
    """As `strategy.advance`, but an error ends this strategy alone."""
    try:
        return strategy.advance(logits)
    except OptionError as error:
        strategy.cancel(error)
        return []


class Limits:
    """When a sequence ends: an end token, a stop string, its length, the context window, or the time.

    Args:
        prompt: int64 [length].
        options: end tokens, lengths and time.
        context: positions of the network.
        stop: a further reason to end a sequence.

    Attributes:
        max_length: most tokens of a sequence, prompt included.
    """

    def __init__(self, prompt: Tokens, options: GenerationConfig, context: int, stop: Stop | None) -> None:
        wanted = len(prompt) + options.new_tokens(len(prompt))
        # The last token needs no position of its own: it is chosen from the logits of the one before.
        self.max_length = min(wanted, context + 1)
        self._full_reason = "length" if wanted <= context + 1 else "context"
        self._ends = frozenset(options.eos_token_ids)
        self._stop = stop
        self._max_time = math.inf if options.max_time is None else options.max_time
        self._began: float | None = None

    def begin(self) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since `begin`; 0 before."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def reason(self, tokens: Tokens) -> str | None:
        """The finish reason of a sequence; None: it goes on."""
        if int(tokens[-1]) in self._ends or (self._stop is not None and self._stop(tokens)):
            return "stop"
        if len(tokens) >= self.max_length:
            return self._full_reason
        return "time" if self.seconds > self._max_time else None


class Scores:
    """Scores: logits after guidance and the processors of the options, then the caller's, then renormalisation.

    Args:
        options: which processors.
        prompt: int64 [length].
        extensions: the caller's functions.
    """

    def __init__(self, options: GenerationConfig, prompt: Tokens, extensions: Extensions) -> None:
        allowed = None if extensions.prefix_allowed_tokens_fn is None else extensions.forbid
        self._processors = processors(options, prompt, allowed)
        if extensions.constraint is not None:
            self._processors.append(extensions.constraint)
        self._guidance_scale = options.guidance_scale
        self._extensions = extensions
        self._renormalizes = options.renormalize_logits and not options.do_sample  # sampling does so behind its filters

    def __call__(self, tokens: list[Tokens], logits: Logits, negative: Logits | None = None) -> Logits:
        """Scores [rows, vocab] of logits [rows, vocab] after the rows' tokens, each int64 [length].

        With guidance, `negative` are the logits [rows, vocab] of the rows of the negative prompt.
        """
        if negative is not None:
            logits = guided(logits, negative, self._guidance_scale)
        scores = logits
        if self._processors:
            rows = [process(self._processors, sequence, row) for sequence, row in zip(tokens, logits, strict=True)]
            scores = rows[0][None] if len(rows) == 1 else np.stack(rows)
        if self._extensions.logits_processor:
            scores = self._extensions.process(np.stack(tokens), scores)
        if self._renormalizes:
            scores = np.stack([row if row.max() == -np.inf else log_softmax(row) for row in scores])
        return scores


class Decoding:
    """The common part of strategies: a prompt, its limits, processors, filters and random stream.

    Args:
        prompt: int64 [length].
        options: the generation options.
        context: positions of the network.
        stop: a further reason to end a sequence.
        extensions: the caller's functions.
    """

    def __init__(
        self, prompt: Tokens, options: GenerationConfig, context: int, stop: Stop | None, extensions: Extensions
    ) -> None:
        self.prompt, self.prompts = prompt, [prompt]
        self.reader: Reader | None = None
        self.hidden_reader: Reader | None = None
        self.done = False
        self.error: OptionError | None = None
        self._options, self._extensions = options, extensions
        self._limits = Limits(prompt, options, context, stop)
        self._score = Scores(options, prompt, extensions)
        self._warpers = warpers(options)
        self.seed = new_seed(options)
        self._generator = None if self.seed is None else Generator(self.seed)

    @property
    def seconds(self) -> float:
        return self._limits.seconds

    def begin(self) -> None:
        self._limits.begin()

    def draft(self) -> Tokens:
        return self.prompt[:0]

    def fork(self) -> Strategy | None:
        return None

    def cancel(self, error: OptionError | None = None) -> None:
        self.done, self.error = True, error


def new_seed(options: GenerationConfig) -> int | None:
    """The options' seed, or a fresh one; None without sampling."""
    if not options.do_sample:
        return None
    return secrets.randbits(32) if options.seed is None else options.seed


def seeded(options: GenerationConfig) -> GenerationConfig:
    """The options; if they sample, with a seed, so that each run gives the same tokens."""
    return options.replaced(seed=new_seed(options)) if options.do_sample else options
