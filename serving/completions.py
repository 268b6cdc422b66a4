"""From a request for completions to prompts that can be decoded: what it may ask for, and what holds where it says nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from gpt2onnx.errors import Gpt2OnnxError, OptionError, PromptError

from ..models.bundle import GENERATION_CONFIG
from ..models.config import read_json
from ..runtime.model import Model
from ..runtime.options import SAMPLING_OPTIONS, GenerationConfig
from .answer import Record
from .api_error import ApiError
from .call import Call, Prompt
from .engine import Engine
from .power import Power
from .protocol import CompletionRequest

# OpenAI's defaults, where the bundle's generation_config.json says nothing else.
_DEFAULTS: Record = {"do_sample": True, "top_k": 0}
_DEFAULT_TOKENS = 16
# Fields with the name and meaning of the runtime's own options.
_OPTIONS = (
    "temperature", "top_p", "stop", "logprobs", "top_h", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "renormalize_logits", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "sequence_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "num_beams", "length_penalty",
    "early_stopping", "min_new_tokens", "min_length", "eos_token_id", "prompt_lookup",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for.

    Attributes:
        prompt_tokens: of each prompt; None for what the context window holds.
        max_tokens: of each choice; None for what the context window holds.
        seconds: until it has to be done.
    """

    prompt_tokens: int | None = None
    max_tokens: int | None = None
    seconds: float = 600.0


class Service:
    """What the interface's completions are made with.

    Args:
        name: of the model.
        model: its tokenizer and options are used; its network belongs to the engine.
        engine: runs the prompts.
        limits: of a request.
        power: of the machine, where it is measured.
        log_prompts: also log what is asked and answered; otherwise only how much.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        engine: Engine,
        limits: Limits,
        power: Power | None = None,
        *,
        log_prompts: bool = False,
    ) -> None:
        self.name, self.model, self.engine, self.limits, self.power = name, model, engine, limits, power
        self.log_prompts = log_prompts
        self.created = int(time.time())
        chosen = read_json(model.bundle.folder / GENERATION_CONFIG)
        self._defaults = {option: value for option, value in _DEFAULTS.items() if chosen.get(option) is None}

    def prepare(self, body: CompletionRequest, ring: Callable[["Call"], None]) -> "Call":
        """Checks a request, and makes of it what can be submitted. Takes long for long prompts, so has a thread of its own.

        Raises:
            ApiError: the request can't be carried out.
        """
        if body.model is not None and body.model != self.name:
            raise ApiError(
                404, f"the model {body.model!r} isn't served, only {self.name!r}", "model", "model_not_found"
            )
        wanted = body.n or 1
        made = body.best_of or wanted
        if made < wanted:
            raise ApiError(400, f"best_of {made} is less than n {wanted}", "best_of")
        if body.stream and made > wanted:
            raise ApiError(400, "best_of above n can't be streamed", "best_of")
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options go with stream", "stream_options")
        try:
            options = self._options(body, made)
            prompts = [self._prompt(prompt, options) for prompt in _prompts(body)]
            self.model.check_options(options, len(prompts[0].ids))
        except (OptionError, PromptError) as error:
            raise _bad_request(error) from error
        rows = options.num_beams if options.num_beams > 1 else options.num_return_sequences
        if rows > self.engine.max_batch:
            param = "num_beams" if options.num_beams > 1 else "n"
            raise ApiError(400, f"{rows} sequences at a time are more than the {self.engine.max_batch} allowed", param)
        if len(prompts) > self.engine.max_queue:
            raise ApiError(400, f"{len(prompts)} prompts are more than the {self.engine.max_queue} allowed", "prompt")
        for prompt in prompts:
            self._check_length(len(prompt.ids), options.max_new_tokens or 0)
        return Call(self, body, prompts, options, rows, ring)

    def _options(self, body: CompletionRequest, made: int) -> GenerationConfig:
        given = {name: value for name in _OPTIONS if (value := getattr(body, name)) is not None}
        beams = body.num_beams is not None and body.num_beams > 1
        options = dict(self._defaults)
        if body.do_sample is not None:
            options["do_sample"] = body.do_sample
        elif body.temperature == 0 or beams:
            options["do_sample"] = False
        elif given.keys() & set(SAMPLING_OPTIONS) or body.seed is not None:
            options["do_sample"] = True
        if body.temperature == 0:
            del given["temperature"]
            if options["do_sample"]:
                raise OptionError("temperature 0 is greedy decoding: not with do_sample")
        if body.seed is not None:
            given["seed"] = body.seed % 2**32
        options |= given
        max_tokens = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        options["max_new_tokens"] = max(1, max_tokens)
        config = self.model.generation_config.merged(options)
        if config.num_beams > 1 and made > (body.n or 1):
            raise OptionError("best_of goes with sampling, not with num_beams")
        if config.num_beams > 1 and made > config.num_beams:
            raise OptionError(f"n {made} is more than num_beams {config.num_beams} gives")
        # Greedy decoding has one result, however many are wanted.
        several = made if config.do_sample or config.num_beams > 1 else 1
        if made > (body.n or 1) and config.logprobs is None:
            config = replace(config, logprobs=0)
        return replace(config, num_return_sequences=several)

    def _prompt(self, prompt: str | list[int], options: GenerationConfig) -> Prompt:
        ends = self._ends(options)
        if not prompt and not ends:
            raise PromptError("the prompt is empty, and the model has no end-of-text token to begin with")
        ids = self.model.prompt_ids(prompt or ends[:1]).tolist()
        if isinstance(prompt, list):
            return Prompt(self.model.tokenizer.decode(ids), ids)
        return Prompt(prompt, ids)

    def _ends(self, options: GenerationConfig) -> list[int]:
        return [token for token in options.eos_token_ids if token >= 0] or [
            token for token in self.model.generation_config.eos_token_ids if token >= 0
        ]

    def _check_length(self, prompt: int, new: int) -> None:
        context, limits = self.model.config.n_positions, self.limits
        # The last token needs no place of its own.
        if prompt + new > context + 1:
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens and max_tokens asks for {new} more, but the model's context window has"
                f" {context}: shorten the prompt or lower max_tokens",
                "prompt" if prompt > context else "max_tokens",
                "context_length_exceeded",
            )
        if limits.prompt_tokens is not None and prompt > limits.prompt_tokens:
            raise ApiError(400, f"the prompt has {prompt} tokens, of {limits.prompt_tokens} allowed", "prompt")
        if limits.max_tokens is not None and new > limits.max_tokens:
            raise ApiError(400, f"max_tokens {new} is more than the {limits.max_tokens} allowed", "max_tokens")


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts, however many; a list of numbers is one."""
    prompt = body.prompt
    if prompt is None:
        return [""]
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [one for one in prompt if not isinstance(one, int)]


def _bad_request(error: Gpt2OnnxError) -> ApiError:
    """An option or prompt that is refused; the message begins with the option's name."""
    message = str(error)
    if isinstance(error, PromptError):
        code = "context_length_exceeded" if "context window" in message else None
        return ApiError(400, message, "prompt", code)
    first = message.split(" ", 1)[0]
    return ApiError(400, message, first if first in CompletionRequest.model_fields else None)
