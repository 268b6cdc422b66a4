"""Chat completions: a conversation as the prompt of a completion, and its answer in OpenAI's form for chats."""

from collections.abc import Sequence
from typing import Any

from gpt2onnx.errors import PromptError

from .answer import Record
from .call import Call
from .completions import conversation, prepare
from .protocol import ChatRequest, CompletionRequest
from .responses import ApiError
from .service import Service


class ChatCall(Call):
    """A call whose choices are messages."""

    KIND = "chat.completion"
    ID = "chatcmpl"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._begun = set[int]()  # choices whose first part has been sent

    def record(self, choices: Sequence[Record], usage: Record | None) -> Record:
        """The response's body, or a stream event's: in a stream the messages come in parts, their role first."""
        streamed = bool(self.body.stream)
        made = [self._chunk(choice) if streamed else self._message(choice) for choice in choices]
        record = super().record(made, usage) | {"object": f"{self.KIND}.chunk" if streamed else self.KIND}
        if choices and "prompt_logprobs" in choices[0]:  # all choices have the same; vLLM puts them here
            record["prompt_logprobs"] = choices[0]["prompt_logprobs"]
        return record

    def _message(self, choice: Record) -> Record:
        return self._fields(choice) | {"message": {"role": "assistant", "content": choice["text"]}}

    def _chunk(self, choice: Record) -> Record:
        first = choice["index"] not in self._begun
        self._begun.add(choice["index"])
        role = {"role": "assistant"} if first else {}
        return self._fields(choice) | {"delta": role | ({"content": choice["text"]} if choice["text"] or first else {})}

    def _fields(self, choice: Record) -> Record:
        logprobs = choice["logprobs"]
        return {
            "index": choice["index"],
            "logprobs": None if logprobs is None else {"content": _tokens(logprobs)},
            "finish_reason": choice["finish_reason"],
        }


def prepare_chat(service: Service, body: ChatRequest) -> Call:
    """Renders the conversation, and prepares the completion of it. Belongs into a thread, as `prepare` does.

    Raises:
        ApiError: the request can't be carried out.
    """
    prompt = conversation(service, body.messages)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs need logprobs: true", "top_logprobs")
    fields = {name: getattr(body, name) for name in CompletionRequest.model_fields if name in ChatRequest.model_fields}
    fields["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
    named = body.max_tokens, body.max_completion_tokens, body.n_predict
    given = [each for each in named if each is not None]
    try:
        fields["max_tokens"] = given[0] if given else _longest(service, body, prompt)
    except PromptError as error:
        raise ApiError(400, str(error), "messages", "context_length_exceeded" if error.too_long else None) from error
    completion = CompletionRequest.model_construct(**fields | {"prompt": prompt})
    return prepare(service, completion, ChatCall)


def _longest(service: Service, body: ChatRequest, prompt: list[int]) -> int:
    options = service.model.generation_config
    if body.truncate is not None:
        options = options.replaced(truncate=body.truncate)
    return service.longest_answer(prompt, options, body.truncate_prompt_tokens)


def _tokens(logprobs: Record) -> list[dict[str, Any]]:
    """Log probabilities of a completion in the form for chats."""

    def one(token: str, logprob: float | None) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(_bytes(token))}

    return [
        one(token, logprob)
        | {"top_logprobs": [one(name, value) for name, value in sorted(top.items(), key=lambda each: -each[1])]}
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        )
    ]


def _bytes(token: str) -> bytes:
    written = token.removeprefix("bytes:")
    return token.encode() if written == token else bytes.fromhex(written.replace("\\x", ""))
