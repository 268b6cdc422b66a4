"""Completions: turns a validated request body into options and token ids that the engine can run."""

from gpt2onnx.errors import OptionError, PromptError

from ..runtime.options import GenerationConfig, sampling_options
from .call import Call, Prompt
from .options import given_options
from .protocol import CompletionRequest
from .responses import ApiError
from .service import Service

# OpenAI's defaults, unless the bundle's generation_config.json sets others.
_DEFAULTS = {"do_sample": True, "top_k": 0}
_DEFAULT_TOKENS = 16


def prepare(service: Service, body: CompletionRequest) -> Call:
    """Checks a request against model and limits. Long prompts take long, so it belongs into a thread.

    Raises:
        ApiError: the request can't be carried out.
    """
    if body.model not in (None, service.name):
        raise unknown_model(service, body.model or "")
    wanted = body.n or 1
    made = body.best_of or wanted
    if made < wanted:
        raise ApiError(400, f"best_of {made} is less than n {wanted}", "best_of")
    if body.stream and made > wanted:
        raise ApiError(400, "best_of above n can't be streamed", "best_of")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options need stream", "stream_options")
    try:
        options = _options(service, body, wanted, made)
        prompts = [_prompt(service, prompt, options) for prompt in _prompts(body)]
        service.model.check_options(options, len(prompts[0].ids))
    except OptionError as error:
        raise ApiError(400, str(error), error.option) from error
    except PromptError as error:
        raise ApiError(400, str(error), "prompt", "context_length_exceeded" if error.too_long else None) from error
    rows = options.num_beams if options.num_beams > 1 else options.num_return_sequences
    param = "num_beams" if options.num_beams > 1 else "n" if body.best_of is None else "best_of"
    if options.strategy == "contrastive search":
        rows, param = options.top_k, "top_k"
    wanted_rows = f"{param}={rows}"
    if options.guidance_scale != 1:
        rows, wanted_rows = 2 * rows, f"{wanted_rows}, doubled by guidance_scale,"
    _check_room(service, rows, wanted_rows, param, len(prompts))
    for prompt in prompts:
        _check_length(service, len(prompt.ids), options.max_new_tokens or 0)
    return Call(service, body, prompts, options, rows)


def unknown_model(service: Service, name: str) -> ApiError:
    """The error for a model name that isn't the served one."""
    return ApiError(404, f"the model {name!r} isn't served, only {service.name!r}", "model", "model_not_found")


def _options(service: Service, body: CompletionRequest, wanted: int, made: int) -> GenerationConfig:
    given = given_options(body)
    options = {name: value for name, value in _DEFAULTS.items() if service.bundled_options.get(name) is None}
    if ((body.num_beams or 1) > 1 or body.penalty_alpha) and body.do_sample is None and not sampling_options(given):
        options = {"do_sample": False}
    if body.seed is not None:
        given["seed"] = body.seed % 2**32
    # The runtime makes at least one token; `Call` drops that of max_tokens 0.
    given["max_new_tokens"] = _DEFAULT_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    config = service.model.generation_config.merged(options | given)
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
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [each for each in prompt if not isinstance(each, int)]


def _prompt(service: Service, prompt: str | list[int], options: GenerationConfig) -> Prompt:
    """A prompt as text and token ids."""
    model = service.model
    ids = model.prompt_ids(prompt, options).tolist()
    if isinstance(prompt, str) and options.truncate == "none":
        return Prompt(prompt, ids)
    return Prompt(model.tokenizer.decode(ids, skip_special_tokens=options.skip_special_tokens), ids)


def _check_room(service: Service, rows: int, wanted: str, param: str, prompts: int) -> None:
    engine = service.engine
    if rows > engine.max_batch:
        message = f"{wanted} is above the server's limit of {engine.max_batch}: raise --max-batch"
        raise ApiError(400, message, param)
    if prompts > engine.max_queue:
        message = (
            f"{prompts} prompts are above the server's limit of {engine.max_queue}: send fewer, or raise --max-queue"
        )
        raise ApiError(400, message, "prompt")


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
        message = f"the prompt has {prompt} tokens, above the server's limit of {limits.prompt_tokens}: shorten it"
        raise ApiError(400, message, "prompt")
    if limits.max_tokens is not None and new > limits.max_tokens:
        raise ApiError(400, f"max_tokens={new} is above the server's limit of {limits.max_tokens}", "max_tokens")
