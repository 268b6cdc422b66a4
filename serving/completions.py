"""Completions: turns a validated request body into options and token ids that the engine can run."""

from collections.abc import Sequence
from typing import Any

from gpt2onnx.errors import MissingExtraError, OptionError, PromptError

from ..runtime.options import GenerationConfig, sampling_options
from .call import Call, Part, Prompt
from .options import given_options
from .protocol import CompletionRequest, DetokenizeRequest, Message, TokenizeRequest
from .responses import ApiError
from .service import Service

# OpenAI's defaults, unless the bundle's generation_config.json sets others.
_DEFAULTS = {"do_sample": True, "top_k": 0}
_DEFAULT_TOKENS = 16


def prepare(service: Service, body: CompletionRequest, kind: type[Call] = Call) -> Call:
    """Checks a request against model and limits. Long prompts take long, so it belongs into a thread.

    Raises:
        ApiError: the request can't be carried out.
    """
    wanted = body.n or 1
    made = body.best_of or wanted
    if made < wanted:
        raise ApiError(400, f"best_of {made} is less than n {wanted}", "best_of")
    if body.stream and made > wanted:
        raise ApiError(400, "best_of above n can't be streamed", "best_of")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options need stream", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(400, "prompt_logprobs can't be streamed", "prompt_logprobs")
    try:
        options = _options(service, body, wanted, made)
        prompts = [_prompt(service, prompt, options, body.truncate_prompt_tokens) for prompt in _prompts(body)]
        service.model.check_options(options, len(prompts[0].ids))
        if (body.prompt_logprobs or 0) > service.model.config.vocab_size:
            raise OptionError("prompt_logprobs is above the size of the vocabulary", "prompt_logprobs")
    except OptionError as error:
        raise ApiError(400, str(error), error.option) from error
    except PromptError as error:
        raise ApiError(400, str(error), "prompt", "context_length_exceeded" if error.too_long else None) from error
    except MissingExtraError as error:  # for structured output
        raise ApiError(400, str(error)) from error
    parts = _parts(service, options)
    _check_queue(service, len(prompts), len(parts))
    for prompt in prompts:
        _check_length(service, len(prompt.ids), options.max_new_tokens or 0)
    return kind(service, body, prompts, options, parts)


def _options(service: Service, body: CompletionRequest, wanted: int, made: int) -> GenerationConfig:
    given = given_options(body) | body.structure
    options = {name: value for name, value in _DEFAULTS.items() if service.bundled_options.get(name) is None}
    if ((body.num_beams or 1) > 1 or body.penalty_alpha) and body.do_sample is None and not sampling_options(given):
        options = {"do_sample": False}
    if body.use_beam_search:
        given |= {"num_beams": made, "do_sample": False}
    if body.seed is not None:
        given["seed"] = body.seed % 2**32
    longest = body.longest
    if longest is None:
        longest = min(_DEFAULT_TOKENS, service.limits.max_tokens or _DEFAULT_TOKENS)
    # The runtime makes at least one token; `Call` drops that of max_tokens 0.
    given["max_new_tokens"] = max(1, longest)
    if body.min_tokens is not None:
        given["min_new_tokens"] = body.min_tokens
    config = service.model.generation_config.merged(options | given)
    if body.ignore_eos:
        config = config.replaced(eos_token_id=None)
    if body.stop_token_ids:
        config = config.replaced(eos_token_id=(*config.eos_token_ids, *body.stop_token_ids))
    if config.num_beams > 1 and made > wanted:
        raise OptionError("best_of goes with sampling, not with num_beams", "best_of")
    if config.num_beams > 1 and made > config.num_beams:
        raise OptionError(f"n {made} is more than num_beams {config.num_beams} gives", "n")
    if made > wanted and config.logprobs is None:
        config = config.replaced(logprobs=0)  # they rank the continuations
    greedy = not config.do_sample and config.num_beams == 1  # one result, copied n times
    return config.replaced(num_return_sequences=1 if greedy else made)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The request's prompts; a list of numbers is one."""
    prompt = body.prompt
    if not prompt:
        return [""]
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [each for each in prompt if not isinstance(each, int)]


def _prompt(service: Service, prompt: str | list[int], options: GenerationConfig, kept: int | None) -> Prompt:
    """A prompt as text and token ids; of those, the last `kept`."""
    ids, cut = service.prompt_ids(prompt, options, kept)
    if isinstance(prompt, str) and options.truncate == "none" and not cut:
        # Half of a surrogate pair is no text, and no JSON that all clients read.
        return Prompt(prompt.encode("utf-8", "replace").decode("utf-8"), ids)
    return Prompt(service.model.tokenizer.decode(ids, skip_special_tokens=options.skip_special_tokens), ids)


def _parts(service: Service, options: GenerationConfig) -> list[Part]:
    """The continuations of a prompt in parts that fit into the batch. Beams can't be parted.

    The first part draws with the request's seed, the next one with the number after it, and so on.

    Raises:
        ApiError: what can't be parted doesn't fit.
    """
    most, doubled = service.engine.max_batch, 2 if options.guidance_scale != 1 else 1
    together, param = 1, "guidance_scale"
    if options.num_beams > 1:
        together, param = options.num_beams, "num_beams"
    elif options.strategy == "contrastive search":
        together, param = options.top_k, "top_k"
    rows = together * doubled
    if rows > most:
        message = f"{param} needs {rows} sequences at once, above the server's limit of {most}: raise --max-batch"
        raise ApiError(400, message, param)
    choices, size = options.num_return_sequences, most // doubled
    if together > 1 or choices <= size:
        return [Part(options, max(rows, choices * doubled))]
    parts: list[Part] = []
    for begin in range(0, choices, size):
        count = min(size, choices - begin)
        seed = None if options.seed is None else (options.seed + len(parts)) % 2**32
        parts.append(Part(options.replaced(num_return_sequences=count, seed=seed), count * doubled))
    return parts


def _check_queue(service: Service, prompts: int, parts: int) -> None:
    most = service.engine.max_queue
    if prompts * parts > most:
        wanted = f"{prompts} prompts" if parts == 1 else f"{prompts * parts} parts, {parts} for each prompt,"
        message = f"{wanted} are above the server's limit of {most}: ask for less, or raise --max-queue"
        raise ApiError(400, message, "prompt" if parts == 1 else "n")


def _check_length(service: Service, prompt: int, new: int) -> None:
    context, limits = service.model.config.n_positions, service.limits
    if prompt + new > context + 1:  # the last token needs no position
        raise ApiError(
            400,
            f"the prompt has {prompt} tokens and max_tokens asks for {new} more, but the model's context window has"
            f" {context}: shorten the prompt or lower max_tokens",
            "prompt" if prompt > context else "max_tokens",
            "context_length_exceeded",
        )
    if limits.prompt_tokens is not None and prompt > limits.prompt_tokens:
        message = (
            f"the prompt has {prompt} tokens, above the server's limit of {limits.prompt_tokens}: shorten it, or raise"
            " --max-prompt-tokens"
        )
        raise ApiError(400, message, "prompt")
    if limits.max_tokens is not None and new > limits.max_tokens:
        message = (
            f"max_tokens={new} is above the server's limit of {limits.max_tokens}: lower it, or raise --max-tokens"
        )
        raise ApiError(400, message, "max_tokens")


def tokens_of(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    """The tokens of a text or a conversation, as vLLM gives them.

    Raises:
        ApiError: neither or both are given, or it can't be read.
    """
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give a prompt or messages, and not both", "prompt")
    tokenizer = service.model.tokenizer
    try:
        if body.messages is None:
            ids = tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        else:
            ids = conversation(service, body.messages)
    except PromptError as error:
        raise ApiError(400, str(error), "prompt" if body.messages is None else "messages") from error
    return {
        "count": len(ids),
        "max_model_len": service.model.config.n_positions,
        "tokens": ids,
        "token_strs": tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None,
    }


def text_of(service: Service, body: DetokenizeRequest) -> dict[str, str]:
    """The text of tokens, as vLLM gives it.

    Raises:
        ApiError: one isn't in the vocabulary.
    """
    last, largest = service.model.config.vocab_size - 1, max(body.tokens, default=0)
    if largest > last:
        raise ApiError(400, f"{largest} is no token id: they are whole numbers from 0 to {last}", "tokens")
    return {"prompt": service.model.tokenizer.decode(body.tokens)}


def conversation(service: Service, messages: Sequence[Message]) -> list[int]:
    """The token ids of a conversation. Its template writes special tokens itself, so the tokenizer adds none.

    Raises:
        ApiError: the model has no chat template, or it refuses the messages.
    """
    if service.chat_template is None:
        raise ApiError(
            400,
            "the model has no chat template: start the server with --chat-template FILE, or --chat-template turns for"
            " models that were trained on turns with an end token, such as DialoGPT; or use /v1/completions",
            "messages",
        )
    try:
        text = service.chat_template.render([message.plain() for message in messages])
        return service.model.tokenizer.encode(text, add_special_tokens=False)
    except PromptError as error:
        raise ApiError(400, str(error), "messages") from error
