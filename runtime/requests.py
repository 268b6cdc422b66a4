"""Requests to a model, and its results."""

import hashlib
import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypedDict, cast

from gpt2onnx.errors import Gpt2OnnxError, OptionError

from ..models.messages import shown
from .decoding.logprobs import TokenLogprobs
from .extensions import Extensions, LogitsProcessor, PrefixAllowedTokens, StoppingCriterion
from .jsontext import finite
from .options import GenerationConfig
from .text.batch_encoding import Ids

# A text, or the ids of its tokens.
Prompt = str | Sequence[int]


class GenerationOptions(TypedDict, total=False):
    """The generation options as keyword arguments; None switches one off."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    max_length: int | None
    min_length: int | None
    max_time: float | None
    do_sample: bool | None
    temperature: float | None
    top_h: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    renormalize_logits: bool | None
    guidance_scale: float | None
    negative_prompt: str | Sequence[int] | None
    penalty_alpha: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    sequence_bias: Sequence[tuple[Sequence[int], float]] | None
    logit_bias: Sequence[tuple[int, float]] | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    num_beams: int | None
    num_beam_groups: int | None
    diversity_penalty: float | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    num_return_sequences: int | None
    seed: int | Sequence[int] | None
    eos_token_id: int | Sequence[int] | None
    stop: str | Sequence[str] | None
    json_schema: dict[str, Any] | str | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    logprobs: int | None
    prompt_lookup: int | None
    skip_special_tokens: bool | None
    truncate: Literal["none", "left"] | None


class StreamOptions(GenerationOptions, total=False):
    """Keyword arguments of `Model.stream`: the generation options, and the caller's own functions as in transformers."""

    generation_config: GenerationConfig | None
    logits_processor: Sequence[LogitsProcessor] | None
    stopping_criteria: Sequence[StoppingCriterion] | None
    prefix_allowed_tokens_fn: PrefixAllowedTokens | None


class GenerateOptions(StreamOptions, total=False):
    """Keyword arguments of `Model.generate`: also the number of prompts that are decoded together, and what a tokenizer returns."""

    batch_size: int
    input_ids: Ids | None
    attention_mask: Ids | None


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: a text, or token ids.
        options: how to continue it.
        id: the caller's own; comes back with the result.
        error: why it can't be carried out, if that is known already; becomes its outcome.
        prompt_logprobs: also compute the log probability of each token of the prompt and of this many likeliest ones.
        extensions: the caller's own functions in decoding.
    """

    prompt: Prompt
    options: GenerationConfig
    id: Any = None
    error: Gpt2OnnxError | None = None
    prompt_logprobs: int | None = None
    extensions: Extensions = field(default_factory=Extensions)

    def sha256(self, model: str) -> str:
        """Hash of all that decides the result: model, prompt and options. 16 digits: a job has millions of requests at most.

        Args:
            model: the bundle's own hash.
        """
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        content = json.dumps([model, prompt, self.options.to_dict()], default=int)  # NumPy's numbers
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class GeneratedSequence:
    """One continuation.

    Attributes:
        text: of the new tokens, as a rule without special tokens, cut before a stop string.
        token_ids: the new tokens, an end token included.
        finish_reason: "stop" (end token, stop string or criterion), "length", "context" (the context window is full)
            or "time" (max_time); None if decoding was interrupted.
        logprobs: of each new token, if they were asked for.
        score: of a beam: its log probability divided by its length to the power of length_penalty.
        pieces: the text that each new token adds, if log probabilities were asked for; not cut before a stop string.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None
    score: float | None = None
    pieces: list[str] | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The continuation as JSON holds it."""
        content = asdict(self)
        del content["pieces"]
        return cast("dict[str, Any]", finite(content))

    def to_html(self) -> str:
        """The text as HTML: the less likely a token is, the darker, if log probabilities were asked for."""
        if self.pieces is None or self.logprobs is None:
            return html.escape(self.text)
        left, marks = len(self.text), list[str]()
        for piece, token in zip(self.pieces, self.logprobs, strict=True):
            likely, visible = math.exp(token.logprob), html.escape(piece[:left])
            left -= len(piece[:left])
            shade = f"background: rgba(224, 130, 32, {0.6 * (1 - likely):.2f})"
            marks.append(f'<span style="{shade}" title="{likely:.1%}">{visible}</span>' if visible else "")
        return "".join(marks)


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy of one run; a mean if it was repeated.

    Attributes:
        joules: of the whole machine, as far as `method` covers it.
        joules_per_token: `joules` by completion tokens; None if there are none.
        g_co2eq: grams of CO2 equivalents.
        g_co2eq_per_1000_tokens: the same by 1,000 completion tokens.
        watts: mean power.
        seconds: measured in all.
        runs: made in that time.
        method: how the power was found; an estimate says so.
        reliable: whether it was measured for long enough for the method, and no other run at the same time.
        country: whose electricity it is (ISO 3166-1 alpha-3); None for the world's average.
        g_co2eq_per_kwh: emitted there by a kilowatt hour.
        run_id: of the row in the CSV file.
    """

    joules: float
    joules_per_token: float | None
    g_co2eq: float
    g_co2eq_per_1000_tokens: float | None
    watts: float
    seconds: float
    runs: int
    method: str
    reliable: bool
    country: str | None
    g_co2eq_per_kwh: float
    run_id: str


@dataclass(frozen=True)
class Result:
    """The continuations of one prompt.

    Attributes:
        prompt: its text.
        prompt_ids: its tokens, without those that `truncate` has dropped.
        sequences: its continuations, best first if they are ranked.
        seconds: from the start of the prompt's computation to the last token.
        seed: of its random draws; None without any.
        request_hash: of model, prompt and options.
        energy: of the run, if it was measured; see `track_energy`.
        prompt_logprobs: of each token of the prompt but the first, if they were asked for.
    """

    prompt: str
    prompt_ids: list[int]
    sequences: list[GeneratedSequence]
    seconds: float
    seed: int | None = None
    request_hash: str = ""
    energy: Energy | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None

    @property
    def text(self) -> str:
        """The first continuation's text."""
        return self.sequences[0].text

    @property
    def full_text(self) -> str:
        """The prompt with the first continuation."""
        return self.prompt + self.text

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """In a notebook: the prompt in grey, and the first continuation behind it."""
        prompt, text = html.escape(self.prompt), self.sequences[0].to_html()
        return f'<div style="white-space: pre-wrap"><span style="opacity: 0.55">{prompt}</span>{text}</div>'

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of all continuations."""
        return {
            "prompt_tokens": len(self.prompt_ids),
            "completion_tokens": sum(len(sequence.token_ids) for sequence in self.sequences),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each continuation; seconds, tokens_per_second and joules are of all of them together."""
        tokens = self.usage["completion_tokens"]
        shared = {
            "seed": self.seed,
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds if self.seconds else None,
        }
        if self.energy is not None:
            shared["joules"] = self.energy.joules
        return [
            {
                "prompt": self.prompt,
                "text": sequence.text,
                "tokens": len(sequence.token_ids),
                "finish_reason": sequence.finish_reason,
                "score": sequence.score,
                **shared,
            }
            for sequence in self.sequences
        ]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        return {
            "prompt": self.prompt,
            "prompt_ids": self.prompt_ids,
            "sequences": [sequence.to_dict() for sequence in self.sequences],
            "seed": self.seed,
            "request_hash": self.request_hash,
            "usage": self.usage,
            "seconds": round(self.seconds, 6),
            "energy": None if self.energy is None else asdict(self.energy),
        }


Outcome = Result | Gpt2OnnxError


def split_given(given: dict[str, Any], default: GenerationConfig) -> tuple[GenerationConfig, Extensions]:
    """Keyword arguments of `Model.stream` as options and the caller's own functions.

    Args:
        given: the arguments; what isn't among them comes from the `generation_config` given there, or else from the default.
        default: the bundle's own options.

    Raises:
        OptionError: an option is unknown, out of range, or options contradict each other.
    """
    config = given.pop("generation_config", None)
    if not isinstance(config, GenerationConfig | None):
        raise OptionError(f"generation_config must be a gpt2onnx.GenerationConfig, not {shown(config)}")
    extensions = Extensions(
        tuple(given.pop("logits_processor", None) or ()),
        tuple(given.pop("stopping_criteria", None) or ()),
        given.pop("prefix_allowed_tokens_fn", None),
    )
    return (default if config is None else config.ending_as(default)).merged(given), extensions


def split_seeds(given: dict[str, Any], prompts: int) -> Sequence[int] | None:
    """Takes a list of seeds out of given options, which keep the first one; None where `seed` is no list.

    Raises:
        OptionError: there isn't one for each prompt.
    """
    seeds = given.get("seed")
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        return None
    if len(seeds) != prompts:
        raise OptionError(f"seed has {len(seeds)} entries, but there are {prompts} prompts", "seed")
    given["seed"] = seeds[0] if seeds else None
    return seeds


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
        """The exponential of minus the mean log probability."""
        return math.exp(-self.mean_logprob)
