"""The interface's shapes: OpenAI's completions, and our own options as further fields. What isn't in here is refused."""

from typing import Annotated, Literal

from gpt2onnx.errors import MissingExtraError

try:
    from pydantic import BaseModel, ConfigDict, Field
except ImportError as error:
    raise MissingExtraError("Serving", "fastapi", "serve") from error

from ..runtime.options import MOST_SEQUENCES

_MOST_STRINGS, _LONGEST_STRING = 16, 1000
_MOST_IDS = 1000
MOST_LOGPROBS = 100
MOST_PROMPTS = 1000

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Words = Annotated[list[TokenId], Field(min_length=1, max_length=_MOST_IDS)]
StopString = Annotated[str, Field(min_length=1, max_length=_LONGEST_STRING)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=1e-30, le=1e30)]
# JSON has no tuples, only lists.
Bias = Annotated[tuple[Words, Annotated[float, Field(ge=-1e30, le=1e30)]], Field(strict=False)]
Decay = Annotated[tuple[Count, Annotated[float, Field(gt=0, le=1e30)]], Field(strict=False)]


class _Strict(BaseModel):
    """No other fields, no text for a number, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream holds beside the text."""

    include_usage: bool | None = Field(None, description="One more event at the end, with the usage.")


class CompletionRequest(_Strict):
    """A request for completions. A field that is null counts as not given."""

    model: str | None = Field(None, description="The model's name; may be left out, as there is only one.")
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
        | None
    ) = Field(
        None,
        description="A text, a list of texts, token ids, or a list of lists of them. Empty or not given: the end-of-text token.",
    )
    max_tokens: Count | None = Field(None, description="At most so many new tokens; 16 where not given.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Divides the logits before sampling; 1 where not given, 0 for the likeliest token each time."
    )
    top_p: Probability | None = Field(
        None, description="Sample among the likeliest tokens whose probabilities add up to p."
    )
    n: Annotated[int, Field(ge=1, le=MOST_SEQUENCES)] | None = Field(None, description="Choices for each prompt.")
    best_of: Annotated[int, Field(ge=1, le=MOST_SEQUENCES)] | None = Field(
        None, description="Make so many, and return the n with the highest mean log probability; not with stream."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=_MOST_STRINGS)] | None = Field(
        None, description="String or strings that end a text, which is cut before them."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="Of the random draws, modulo 2**32; fresh ones where not given."
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = Field(
        None, description="Also the log probability of each token, and of so many likeliest ones in its place."
    )
    echo: bool | None = Field(None, description="The prompt before the text; with logprobs also those of its tokens.")
    stream: bool | None = Field(None, description="Server-sent events with the text as it grows.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="Not supported: only 0.")
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="Not supported: only 0.")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(
        None, description="Not supported: only {}. See sequence_bias, bad_words_ids and suppress_tokens."
    )
    suffix: None = Field(None, description="Not supported: only null.")
    user: str | None = Field(None, description="Has no effect.")

    do_sample: bool | None = Field(None, description="Draw the next token instead of taking the likeliest.")
    top_h: Share | None = Field(
        None,
        description="Sample among the likeliest of 100 tokens whose terms of the entropy add up to this share of it.",
    )
    top_k: Count | None = Field(None, description="Sample among the k likeliest tokens; 0 for all.")
    min_p: Probability | None = Field(
        None, description="Sample among tokens at least p times as likely as the likeliest."
    )
    typical_p: Share | None = Field(
        None, description="Sample among the most typical tokens whose probabilities add up to p."
    )
    epsilon_cutoff: Probability | None = Field(
        None, description="Sample among tokens of at least this probability; 0 for all."
    )
    eta_cutoff: Probability | None = Field(
        None,
        description="Sample among tokens of at least this probability, or of less where many are likely; 0 for all.",
    )
    renormalize_logits: bool | None = Field(
        None, description="Make log probabilities of what filters leave, so that beams' scores are such."
    )
    repetition_penalty: Penalty | None = Field(None, description="Above 1 makes tokens seen before less likely.")
    encoder_repetition_penalty: Penalty | None = Field(
        None, description="Above 1 makes the prompt's tokens more likely."
    )
    no_repeat_ngram_size: Count | None = Field(None, description="Write no n-gram of this size twice.")
    encoder_no_repeat_ngram_size: Count | None = Field(
        None, description="Write no n-gram of this size in the prompt again."
    )
    sequence_bias: Annotated[list[Bias], Field(min_length=1, max_length=_MOST_IDS)] | None = Field(
        None, description="Added to a token's logit where it completes a token sequence, such as [[[5, 7], -2.5]]."
    )
    bad_words_ids: Annotated[list[Words], Field(min_length=1, max_length=_MOST_IDS)] | None = Field(
        None, description="Token sequences that are never completed."
    )
    suppress_tokens: Annotated[list[TokenId], Field(max_length=_MOST_IDS)] | None = Field(
        None, description="Tokens that are never chosen."
    )
    begin_suppress_tokens: Annotated[list[TokenId], Field(max_length=_MOST_IDS)] | None = Field(
        None, description="Tokens that are never chosen first."
    )
    forced_bos_token_id: TokenId | None = Field(None, description="First new token after a prompt of one token.")
    forced_eos_token_id: TokenId | Annotated[list[TokenId], Field(max_length=_MOST_IDS)] | None = Field(
        None, description="Token or tokens of which one comes last where the length ends a text."
    )
    exponential_decay_length_penalty: Decay | None = Field(
        None,
        description="So many new tokens, after which each makes end tokens likelier by a factor, such as [50, 1.05].",
    )
    num_beams: Annotated[int, Field(ge=1, le=MOST_SEQUENCES)] | None = Field(
        None, description="Width of the beam search."
    )
    length_penalty: Annotated[float, Field(ge=-1e30, le=1e30)] | None = Field(
        None, description="Exponent of the length that divides a beam's score."
    )
    early_stopping: bool | Literal["never"] | None = Field(None, description="When a beam search ends.")
    min_new_tokens: Count | None = Field(None, description="No end token before so many new tokens.")
    min_length: Count | None = Field(None, description="No end token before so many tokens, prompt included.")
    eos_token_id: (
        Annotated[int, Field(ge=-1, lt=2**31)] | Annotated[list[TokenId], Field(max_length=_MOST_IDS)] | None
    ) = Field(None, description="Token or tokens that end a text; -1 for none.")
    prompt_lookup: Annotated[int, Field(ge=0, le=_MOST_IDS)] | None = Field(
        None,
        description="Most tokens of a draft copied from earlier text and verified in one pass, while nothing else runs.",
    )


class Logprobs(BaseModel):
    """Log probabilities as the network gave them, before temperature and filters."""

    tokens: list[str] = Field(description=r"A token that is no whole character is written as `bytes:\xe2\x80`.")
    token_logprobs: list[float | None] = Field(description="None for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None] = Field(description="The likeliest tokens, and the chosen one.")
    text_offset: list[int] = Field(description="Where each token begins in the choice's text, in characters.")


class Choice(BaseModel):
    """One continuation; `index` counts through the prompts, and through the choices of each."""

    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Energy(BaseModel):
    """The request's share of what the machine took while it was in the batch."""

    joules: float
    joules_per_token: float | None
    watts: float = Field(description="Of the whole machine, in the last seconds.")
    method: str
    reliable: bool = Field(description="Whether it lasted for so long that the method can tell.")


class Usage(BaseModel):
    """Tokens, and energy where it is measured."""

    prompt_tokens: int
    completion_tokens: int = Field(description="Of all continuations, also of those that best_of has left out.")
    total_tokens: int
    energy: Energy | None


class Completion(BaseModel):
    """Completions, or with `stream` a part of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None


class ServedModel(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    vocab_size: int
    dtype: str
    device: str
    energy: bool = Field(description="Whether energy is measured.")


class ServedModels(BaseModel):
    """All models, of which there is one."""

    object: Literal["list"]
    data: list[ServedModel]


class Health(BaseModel):
    """Whether requests are taken, and how many there are."""

    status: Literal["ok", "stopping", "failed"]
    running: int
    waiting: int


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error, as OpenAI writes it."""

    error: ErrorDetail
