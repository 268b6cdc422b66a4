"""Protocol: bodies of requests and responses, as OpenAI defines them. Unknown fields are refused."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field

from .options import Count, GenerationOptions, Sequences, Strict, TokenId

_MAX_PROMPTS = 1000


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="Add an event with the usage at the end.")


class CompletionRequest(GenerationOptions):  # type: ignore[misc, valid-type]
    """A request for completions. A field that is null counts as not given."""

    model: str | None = Field(None, description="Name of the model. Default: the served one.")
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=_MAX_PROMPTS)]
        | None
    ) = Field(
        None,
        description="A text, a list of texts, token ids, or a list of lists of them. Default: the end-of-text token.",
    )
    max_tokens: Count | None = Field(None, description="Most new tokens. Default 16.")
    n: Sequences | None = Field(None, description="Choices for each prompt.")
    best_of: Sequences | None = Field(
        None,
        description="Continuations to generate, of which the n with the highest mean log probability are returned; not with stream.",
    )
    echo: bool | None = Field(
        None, description="Begin each text with the prompt; with logprobs, also return those of its tokens."
    )
    stream: bool | None = Field(None, description="Return server-sent events with the text as it grows.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="Not supported: only 0.")
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="Not supported: only 0.")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(
        None, description="Not supported: only {}. See sequence_bias, bad_words_ids and suppress_tokens."
    )
    suffix: None = Field(None, description="Not supported: only null.")
    user: str | None = Field(None, description="Has no effect.")

    UNSUPPORTED: ClassVar = ("presence_penalty", "frequency_penalty", "logit_bias", "suffix")


class Logprobs(BaseModel):
    """Log probabilities as the network gave them, before temperature and filters."""

    tokens: list[str] = Field(description=r"A token that isn't whole characters is written as `bytes:\xe2\x80`.")
    token_logprobs: list[float | None] = Field(description="null for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None] = Field(description="The likeliest tokens and the chosen one.")
    text_offset: list[int] = Field(description="Start of each token in the choice's text, in characters.")


class Choice(BaseModel):
    """One continuation; `index` counts the choices of the first prompt, then of the second, and so on."""

    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int = Field(description="Of all continuations, including those that best_of leaves out.")
    total_tokens: int


class Completion(BaseModel):
    """Completions, or a part of them in a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None


class ServedModel(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    vocab_size: int
    dtype: str
    device: str


class ServedModels(BaseModel):
    """All served models: one."""

    object: Literal["list"]
    data: list[ServedModel]


class Health(BaseModel):
    """Whether requests are taken, and numbers of prompts."""

    status: Literal["ok", "stopping", "failed"]
    running: int
    waiting: int


class ErrorDetail(BaseModel):
    """Description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail
