"""Protocol: bodies of requests and responses, as OpenAI defines them. Unknown fields are refused."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from ..runtime.option_table import LARGEST
from .options import MAX_LOGPROBS, WHOLE, Count, GenerationOptions, Sequences, Strict, TokenId

_MAX_PROMPTS = 1000
_DIGITS = 10  # of a token id
_ANY_OBJECT = {"type": "object"}


def _token_key(key: str) -> str:
    if not key.isdecimal() or len(key) > _DIGITS or int(key) >= 2**31:
        raise PydanticCustomError("token_key", 'keys are token ids, as in {"50256": -100}')
    return key


_TokenKey = Annotated[str, AfterValidator(_token_key)]
_Bias = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="Add an event with the usage at the end.")
    continuous_usage_stats: bool | None = Field(None, description="Add the usage so far to every event; as vLLM.")
    include_obfuscation: bool | None = Field(None, description="Has no effect.")


class NamedSchema(Strict):
    """A JSON schema, with what OpenAI's clients say about it."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = Field(None, description="Has no effect: the schema is always kept to.")


class ResponseFormat(Strict):
    """The form of an answer: any text, any object of JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = Field(None, description="With type json_schema, and only then.")

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("schema", "type 'json_schema' goes with the field json_schema, and no other does")
        return self


class StructuredOutputs(Strict):
    """The form of an answer, as vLLM has it; one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema.")
    json_object: bool | None = Field(None, description="Any object of JSON.")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class _Request(GenerationOptions):  # type: ignore[misc, valid-type]
    """What requests for completions and for chats share. A field that is null counts as not given."""

    model: str | None = Field(None, description="Name of the model. Default: the served one.")
    n: Sequences | None = Field(None, description="Choices for each prompt.")
    stream: bool | None = Field(None, description="Return server-sent events with the text as it grows.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    # As vLLM and llama.cpp have them.
    n_predict: Count | None = Field(None, description="max_tokens by llama.cpp's name.")
    min_tokens: Count | None = Field(
        None, description="No end before as many new tokens; min_new_tokens by vLLM's name."
    )
    ignore_eos: bool | None = Field(None, description="Go on after the end token.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1000)] | None = Field(
        None, description="Tokens that end the text, besides the end token."
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = Field(
        None, description="Keep the prompt's last tokens only, as many as these."
    )
    include_stop_str_in_output: bool | None = Field(
        None, description="End a text behind its stop string, not before it."
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = Field(
        None,
        description="Return log probabilities of the prompt's tokens and of as many likeliest ones in the place of each; not with stream.",
    )
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Name tokens in log probabilities by their ids: token_id:5."
    )
    use_beam_search: bool | None = Field(None, description="Beam search with n beams, all of which are returned.")
    logit_bias: Annotated[dict[_TokenKey, _Bias], Field(max_length=1000)] | None = Field(
        None, description="Added to the logits of tokens, by their ids."
    )
    response_format: ResponseFormat | None = Field(None, description="The form of the answer.")
    structured_outputs: StructuredOutputs | None = Field(None, description="The form of the answer; as vLLM.")
    user: str | None = Field(None, description="Has no effect.")
    store: bool | None = Field(None, description="Has no effect.")
    metadata: dict[str, str] | None = Field(None, description="Has no effect.")
    service_tier: str | None = Field(None, description="Has no effect.")
    prompt_cache_key: str | None = Field(None, description="Has no effect.")
    safety_identifier: str | None = Field(None, description="Has no effect.")
    cache_prompt: bool | None = Field(None, description="Has no effect: prompts share what they have in common anyway.")

    UNSUPPORTED: ClassVar = ("suffix", "tools")

    @property
    def structure(self) -> dict[str, Any]:
        """The generation options that response_format and structured_outputs stand for."""
        found: dict[str, Any] = {}
        asked_format = self.response_format
        if asked_format is not None and asked_format.json_schema is not None:
            found["json_schema"] = asked_format.json_schema.schema_
        elif asked_format is not None and asked_format.type == "json_object":
            found["json_schema"] = _ANY_OBJECT
        if self.structured_outputs is not None:
            asked = self.structured_outputs.model_dump(exclude_none=True)
            renamed = {"json_": "json_schema", "json_object": "json_schema"}
            found |= {renamed.get(name, name): value for name, value in asked.items() if value is not False}
            found = {name: _ANY_OBJECT if value is True else value for name, value in found.items()}
        return found


class CompletionRequest(_Request):
    """A request for completions. A field that is null counts as not given."""

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
    max_tokens: Count | None = Field(
        None, description="Most new tokens. Default: 16, or the server's limit if that is less."
    )
    best_of: Sequences | None = Field(
        None,
        description="Continuations to generate, of which the n with the highest mean log probability are returned; not with stream.",
    )
    echo: bool | None = Field(
        None, description="Begin each text with the prompt; with logprobs, also return those of its tokens."
    )
    suffix: Literal[""] | None = Field(None, description='Not supported: only null or "".')

    @property
    def longest(self) -> int | None:
        """Most new tokens, by any of their names."""
        return self.n_predict if self.max_tokens is None else self.max_tokens


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a conversation."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """The message as templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatRequest(_Request):
    """A request for a chat completion. A field that is null counts as not given."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MAX_PROMPTS)] = Field(
        description="The conversation so far, texts only; the model's chat template makes a prompt of it."
    )
    max_tokens: Count | None = Field(None, description="Most new tokens. Default: what the context window leaves.")
    max_completion_tokens: Count | None = Field(None, description="max_tokens by its newer name.")
    logprobs: bool | None = Field(None, description="Return log probabilities of the answer's tokens.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = Field(
        None, description="Likeliest tokens to return for each; needs logprobs."
    )
    tools: Annotated[list[dict[str, Any]], Field(max_length=0)] | None = Field(
        None, description="Not supported: only []."
    )
    tool_choice: Literal["none", "auto"] | None = Field(None, description="Has no effect.")
    parallel_tool_calls: bool | None = Field(None, description="Has no effect.")


class TokenizeRequest(Strict):
    """A request for the tokens of a text."""

    model: str | None = Field(None, description="Name of the model. Default: the served one.")
    prompt: str | None = Field(None, description="A text.")
    messages: Annotated[list[Message], Field(min_length=1)] | None = Field(
        None, description="A conversation, in its place."
    )
    add_special_tokens: bool = Field(True, description="With tokens that the tokenizer puts around a text.")
    return_token_strs: bool | None = Field(None, description="Also return how the vocabulary writes each token.")


class DetokenizeRequest(Strict):
    """A request for the text of tokens."""

    model: str | None = Field(None, description="Name of the model. Default: the served one.")
    tokens: list[TokenId] = Field(description="Token ids.")


class Logprobs(BaseModel):
    """Log probabilities as the network gave them, before temperature and filters."""

    tokens: list[str] = Field(description=r"A token that isn't whole characters is written as `bytes:\xe2\x80`.")
    token_logprobs: list[float | None] = Field(description="null for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None] = Field(description="The likeliest tokens and the chosen one.")
    text_offset: list[int] = Field(description="Start of each token in the choice's text, in characters.")


class PromptToken(BaseModel):
    """A token in a place of the prompt, as vLLM describes it."""

    logprob: float
    rank: int = Field(description="1 for the likeliest token in this place.")
    decoded_token: str


# An entry for each token, by token ids; null for the first one.
PromptLogprobs = list[dict[str, PromptToken] | None] | None


class Choice(BaseModel):
    """One continuation; `index` counts the choices of the first prompt, then of the second, and so on."""

    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: PromptLogprobs = Field(None, description="In requests with prompt_logprobs.")


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


class ChatMessage(BaseModel):
    """A message of the model, or a part of it in a stream."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One answer; in a stream, `delta` in place of `message`."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(BaseModel):
    """Answers in a conversation. A stream's events have `delta` in place of `message`."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None
    prompt_logprobs: PromptLogprobs = Field(None, description="In requests with prompt_logprobs.")


class Tokens(BaseModel):
    """Tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(BaseModel):
    """Text of tokens."""

    prompt: str


class ServerVersion(BaseModel):
    """Version of the server."""

    version: str


class ServedModel(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    max_model_len: int
    vocab_size: int
    dtype: str
    device: str | None = Field(description="None while the model isn't loaded.")


class ServedModels(BaseModel):
    """All served models, by each of their names."""

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
