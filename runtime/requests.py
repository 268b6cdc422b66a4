"""What is asked of a model, and what it answers."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gpt2onnx.errors import Gpt2OnnxError

from .decoding.strategy import TokenLogprobs
from .jsontext import finite
from .options import GenerationConfig

if TYPE_CHECKING:
    from ..experiments.energy.tracker import Energy

# A text, or the ids of its tokens.
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: a text, or token ids.
        options: how to continue it.
        id: the caller's own; comes back with the result.
        error: why it can't be carried out, where that is known already; becomes its outcome.
        prompt_logprobs: also find out the log probability of each token of the prompt and of so many likeliest ones.
    """

    prompt: Prompt
    options: GenerationConfig
    id: Any = None
    error: Gpt2OnnxError | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class GeneratedSequence:
    """One continuation.

    Attributes:
        text: of the new tokens, without special tokens, cut before a stop string.
        token_ids: the new tokens, an end token included.
        finish_reason: "stop" (end token or stop string), "length", or "context" (the window is full);
            None where decoding was interrupted.
        logprobs: of each new token, where they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None


@dataclass(frozen=True)
class Result:
    """What became of one prompt.

    Attributes:
        prompt: its text.
        prompt_ids: its tokens.
        sequences: its continuations, best first where they are ranked.
        seconds: from joining the batch to the last token.
        energy: what it took, where that was measured; see `track_energy`.
        prompt_logprobs: of each token of the prompt but the first, where they were asked for.
    """

    prompt: str
    prompt_ids: list[int]
    sequences: list[GeneratedSequence]
    seconds: float
    energy: "Energy | None" = None
    prompt_logprobs: list[TokenLogprobs] | None = None

    @property
    def text(self) -> str:
        """The first continuation's text."""
        return self.sequences[0].text

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of all continuations."""
        return {
            "prompt_tokens": len(self.prompt_ids),
            "completion_tokens": sum(len(sequence.token_ids) for sequence in self.sequences),
        }

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        return {
            "prompt": self.prompt,
            "prompt_ids": self.prompt_ids,
            "sequences": [finite(asdict(sequence)) for sequence in self.sequences],
            "usage": self.usage,
            "seconds": round(self.seconds, 6),
            "energy": None if self.energy is None else asdict(self.energy),
        }


Outcome = Result | Gpt2OnnxError


@dataclass(frozen=True)
class Score:
    """How likely the model finds a text.

    Attributes:
        token_ids: its tokens.
        logprobs: natural log probability of each token given those before it; without a prompt, of all but the first.
    """

    token_ids: list[int]
    logprobs: list[float]

    @property
    def mean_logprob(self) -> float:
        """In nats per token."""
        return math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.mean_logprob)
