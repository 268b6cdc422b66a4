"""Model: text in, text out.

Encodes and checks prompts, lets the scheduler decode them together, and turns tokens back into text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Unpack, cast, overload

import numpy as np

from gpt2onnx.errors import Gpt2OnnxError, OptionError, PromptError

from ..models import limits
from ..models.bundle import GENERATION_CONFIG, TOKENIZER, Bundle
from ..models.config import read_json
from ..models.messages import shown
from .arrays import Tokens
from .decoding.logprobs import PromptLogprobs
from .decoding.start import check_vocabulary, start
from .decoding.strategy import Strategy
from .decoding.torch_random import log_softmax
from .engine import second_graph
from .engine.drafting import Drafting
from .engine.runner import Runner
from .engine.scheduler import MAX_SCORED, Scheduler
from .extensions import Extensions
from .generation import Generation
from .options import GenerationConfig
from .requests import GenerateOptions, Outcome, Prompt, Request, Result, Score, StreamOptions, split_given, split_seeds
from .stream import Stream
from .text.batch_encoding import listed_prompts
from .text.structured import Constraint, Grammars
from .text.tokenizer import Tokenizer

BATCH_SIZE = 8
_LONG = 16  # letters a position; of longer prompts, the bytes are compared with the longest token's
_HEAD_START = 0.03  # seconds that opening the graph gets before the tokenizer is read


class Model:
    """A bundle, ready to generate. One thread at a time may use it.

    Args:
        folder: the bundle.
        tokenizer: folder of a tokenizer.json that takes the place of the bundle's.
        device: "cpu", "cuda", the name of another execution provider, or "auto": CUDA where it works, else the CPU.
        threads: of one operator; by default the cores that this process may use, fewer for very small models.
        wide_after: tokens after which the bundle's second graph is opened, if it has one for this device; those in prompts
            and batches count. 0: at once. None: never.
        draft, draft_model, draft_length: see `engine.drafting.Drafting`.
        cache_dtype: of the KV cache; "int8" takes a quarter of the memory of "fp32".

    Raises:
        BundleError: the bundle can't be used.
        OptionError: an argument, or the bundle's generation_config.json, is out of range.
        BackendError: ONNX Runtime can't load the graph.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer: Path | None = None,
        device: str = "cpu",
        threads: int | None = None,
        wide_after: int | None = second_graph.OPEN_AFTER,
        draft: str = "auto",
        draft_model: Path | None = None,
        draft_length: int | None = None,
        cache_dtype: str = "fp32",
    ) -> None:
        self.bundle = Bundle.open(folder).with_cache(cache_dtype)
        self.config = self.bundle.config
        self._drafting = Drafting(draft, draft_model, draft_length)
        alone = not self._drafting.needs_network(self.bundle)
        with ThreadPoolExecutor(1) as background:
            opened = background.submit(
                Runner, self.bundle, device=device, threads=threads, wide_after=wide_after, alone=alone
            )
            # Both take some 0.2 s. ONNX Runtime lets go of Python's lock soon, tokenizers doesn't: the other must be first.
            wait([opened], timeout=_HEAD_START)
            self.tokenizer = Tokenizer((tokenizer or folder) / TOKENIZER)
            self.tokenizer.check(self.config.vocab_size)
            if draft_model is not None:
                self.tokenizer.check_same(Tokenizer(draft_model / TOKENIZER))
            generation_config = read_json(folder / GENERATION_CONFIG)
            self.generation_config = GenerationConfig.from_file_content(generation_config)
            self.runner = opened.result()
        self._bos_token_id = generation_config.get("bos_token_id")
        self._grammars = Grammars(self.tokenizer)
        self.sha256 = self.bundle.sha256(tokenizer)
        self._scheduler = Scheduler(self.runner, self._drafting.drafter(self.bundle, self.runner))

    @overload
    def generate(self, prompts: Prompt, **options: Unpack[GenerateOptions]) -> Result: ...  # type: ignore[overload-overlap]

    @overload
    def generate(self, prompts: Sequence[Prompt], **options: Unpack[GenerateOptions]) -> list[Result]: ...

    @overload
    def generate(self, **options: Unpack[GenerateOptions]) -> Any: ...

    def generate(
        self, prompts: Prompt | Sequence[Prompt] | None = None, **options: Unpack[GenerateOptions]
    ) -> Result | list[Result]:
        """Continues a prompt, or a list of prompts in batches.

        Args:
            prompts: a text or token ids, or a list of such.
            options: those of `GenerationConfig`; one that isn't given is the bundle's own, None switches one off. A sampling
                option without `do_sample` turns sampling on.
            input_ids, attention_mask: what `tokenizer(...)` returns, in place of prompts: `generate(**tokenizer("Once"))`.
            generation_config: options in place of the bundle's; end tokens and stop strings that it leaves out stay the bundle's.
            logits_processor, stopping_criteria, prefix_allowed_tokens_fn: your own functions (docs/extend.md).
            seed: one for all prompts, or a list with one for each. In fp32 equal prompts with equal seeds give equal texts.
            batch_size: prompts that are decoded together, 8 by default. In fp32 no result depends on it; in lower precisions
                it may decide a near tie.

        Returns:
            The result of the prompt, or the list of results of the list, in its order.

        Raises:
            PromptError: a prompt is too long, or not in the vocabulary.
            OptionError: an option is out of range, or options contradict each other.
            BackendError: ONNX Runtime failed.
        """
        given = dict(options)
        batch_size = cast("int", given.pop("batch_size", BATCH_SIZE))
        listed, single = listed_prompts(prompts, given)
        seeds = split_seeds(given, len(listed))
        config, extensions = split_given(given, self.generation_config)
        results = self.answer(listed, config, batch_size, extensions, seeds)
        return results[0] if single else results

    def answer(
        self,
        prompts: Sequence[Prompt],
        options: GenerationConfig,
        batch_size: int = BATCH_SIZE,
        extensions: Extensions = Extensions(),  # noqa: B008  # frozen
        seeds: Sequence[int] | None = None,
    ) -> list[Result]:
        """Continues prompts, all with the same options, or each with its own seed; otherwise as `generate`."""

        def run(options: GenerationConfig) -> list[Result]:
            each = [options] * len(prompts) if seeds is None else [options.replaced(seed=seed) for seed in seeds]
            requests = [
                Request(prompt, own, id=index, extensions=replace(extensions, index=index))
                for index, (prompt, own) in enumerate(zip(prompts, each, strict=True))
            ]
            results: dict[int, Result] = {}
            for request, outcome in self.complete(requests, batch_size):
                if isinstance(outcome, Gpt2OnnxError):
                    raise outcome
                results[request.id] = outcome
            return [results[index] for index in range(len(prompts))]

        meter = METER.get()
        return run(options) if meter is None else meter.generate(self, options, run)

    def stream(self, prompt: Prompt, **options: Unpack[StreamOptions]) -> Stream:
        """Continues a prompt and gives its text as it grows: an iterator of pieces, with the result at its end.

        Options and errors are those of `generate`; beams and several sequences can't be streamed.
        """
        config, extensions = split_given(dict(options), self.generation_config)
        return self.open_stream(Request(prompt, config, extensions=extensions))

    def open_stream(self, request: Request) -> Stream:
        """The same for a request.

        Raises:
            PromptError: the prompt is too long, or not in the vocabulary.
            OptionError: the options ask for beams, for several sequences, or don't fit the prompt.
        """
        if request.options.num_beams > 1 or request.options.num_return_sequences > 1:
            raise OptionError("only a single sequence can be streamed: num_beams and num_return_sequences must be 1")
        generation = self.begin(request)
        steps = self._scheduler.run([generation.strategy])
        text = self.tokenizer.stream(generation.stop, skip_special_tokens=request.options.skip_special_tokens)
        stream = Stream(generation, steps, text)
        meter = METER.get()
        return stream if meter is None else meter.stream(self, stream)

    def complete(self, requests: Iterable[Request], batch_size: int = BATCH_SIZE) -> Iterator[tuple[Request, Outcome]]:
        """Decodes up to `batch_size` requests at once. Yields each one with its result as soon as it is done.

        Requests are taken from the iterable when there is room for them, so it may be endless. One that can't be carried out
        yields its error and disturbs no other.

        Raises:
            OptionError: batch_size is below 1.
            BackendError: ONNX Runtime failed.
        """
        for request, outcome in self.follow(requests, batch_size):
            if isinstance(outcome, Gpt2OnnxError):
                yield request, outcome
            elif outcome.done:
                yield request, outcome.result()

    def follow(
        self, requests: Iterable[Request | None], batch_size: int = BATCH_SIZE, chunk: int | None = None
    ) -> Iterator[tuple[Request, Generation | Gpt2OnnxError]]:
        """As `complete`, but yields each request after each of its steps; it can be cancelled meanwhile.

        Args:
            requests: None: the queue is empty; run the next step.
            batch_size: requests that are decoded together.
            chunk: most prompt tokens computed between two decoding steps (chunked prefill); None for no limit.
        """
        limits.check_at_least(1, batch_size=batch_size)
        running: dict[int, Generation] = {}
        refused: list[tuple[Request, Gpt2OnnxError]] = []

        def strategies() -> Iterator[Strategy | None]:
            for request in requests:
                for key in [key for key, one in running.items() if one.done]:  # cancelled ones aren't seen again
                    del running[key]
                if request is None:
                    yield None
                    continue
                try:
                    generation = self.begin(request)
                except Gpt2OnnxError as error:
                    refused.append((request, error))
                    yield None
                else:
                    running[id(generation.strategy)] = generation
                    yield generation.strategy

        for strategy in self._scheduler.run(strategies(), batch_size, chunk):
            if strategy is None:
                yield from refused
                refused.clear()
            else:
                generation = running.pop(id(strategy)) if strategy.done else running[id(strategy)]
                yield generation.request, generation.error or generation

    def score(self, text: Prompt, *, prompt: Prompt | None = None) -> Score:
        """The log probability of each token of a text, given those before it.

        Args:
            text: is scored; without a prompt, its first token isn't.
            prompt: stands before the text.

        Raises:
            PromptError: there is no token to score, there are more than the context window holds, or others than the
                vocabulary's.
            BackendError: ONNX Runtime failed.
        """
        try:
            ids = scored = self._ids(text, spare=1)  # the last token is only predicted and needs no position
        except PromptError as error:
            if not error.too_long:
                raise
            raise PromptError(f"{error}, or take model.evaluate, which goes through texts of any length") from error
        if prompt is not None:
            ids = np.concatenate([self.prompt_ids(prompt), scored])
        if len(ids) < 2 or not len(scored):
            raise PromptError("there is nothing to score: a text needs two tokens, behind a prompt one")
        if len(ids) > (context := self.config.n_positions) + 1:
            raise PromptError(f"prompt and text have {len(ids)} tokens, the context window {context}: shorten one")
        cache = self.runner.new_cache(1, len(ids))
        logprobs: list[float] = []
        for begin in range(0, len(ids) - 1, MAX_SCORED):
            end = min(begin + MAX_SCORED, len(ids) - 1)
            logits = self.runner.forward(cache, slice(0, 1), ids[None, begin:end], np.array([end - begin]), "all")
            following = ids[begin + 1 : end + 1]
            logprobs += log_softmax(logits)[np.arange(end - begin), following].tolist()
        return Score(scored.tolist(), logprobs if prompt is None else logprobs[-len(scored) :])

    def reset(self) -> None:
        """Drops cached prefixes, so that the next prompts cost as much as the first."""
        self._scheduler.reset()

    def begin(self, request: Request) -> Generation:
        """Checks a request and begins to carry it out.

        Raises:
            PromptError: the prompt is too long, or not in the vocabulary.
            OptionError, MissingExtraError: see `check_options`; or there isn't the memory.
        """
        if request.error is not None:
            raise request.error
        options = self._drafting.options(request.options)
        ids = self.prompt_ids(request.prompt, options)
        constraint, negative = self.check_options(options, len(ids))
        stop = self.tokenizer.stop(options.stop_strings, ids.tolist())
        extensions = replace(request.extensions, constraint=constraint)
        if constraint is not None and options.num_beam_groups == 1:  # diverse beams end by end tokens only
            stop = constraint.or_complete(stop)
        strategy = start(ids, options, self.config.n_positions, stop, extensions, negative)
        self.runner.check_memory(strategy.rows, strategy.positions, self._scheduler.reserved_bytes)
        if request.prompt_logprobs is not None:
            strategy.reader = PromptLogprobs(ids, request.prompt_logprobs)
        return Generation(request, strategy, self.tokenizer, self.sha256)

    def check_options(self, options: GenerationConfig, prompt_length: int) -> tuple[Constraint | None, Tokens | None]:
        """Checks options; returns the constraint and the negative prompt, int64 [length], that they ask for.

        Raises:
            OptionError: they don't fit this model or this prompt length.
            MissingExtraError: they ask for structured output, and llguidance isn't installed.
        """
        if options.new_tokens(prompt_length) < 1:
            raise OptionError(f"max_length {options.max_length} leaves no room behind {prompt_length} prompt tokens")
        negative, constraint = self._negative_ids(options), self._constraint(options, prompt_length)
        counts = {"logprobs": options.logprobs or 0}
        if options.strategy == "contrastive search":
            self.runner.check_hidden()
            counts["top_k"] = options.top_k
        vocabulary = self.config.vocab_size
        if above := next((name for name, count in counts.items() if count > vocabulary), None):
            raise OptionError(f"{above} {counts[above]} is above the vocabulary's {vocabulary}", above)
        check_vocabulary(options, vocabulary, prompt_length)
        return constraint, negative

    def prompt_ids(self, prompt: Prompt, options: GenerationConfig | None = None) -> Tokens:
        """The tokens of a prompt, int64 [length]; of an empty one the BOS token, as in transformers.

        Args:
            prompt: a text, or token ids.
            options: may ask for `truncate`.

        Raises:
            PromptError: it is too long or not in the vocabulary, or it is empty and the model has no BOS token.
            OptionError: `truncate` leaves nothing of it.
        """
        ids = self._ids(prompt, options)
        if len(ids):
            return ids
        if self._bos_token_id is None:
            raise PromptError(
                "the prompt is empty, and generation_config.json names no bos_token_id to begin with: give at least one token"
            )
        return self._ids([self._bos_token_id])

    def _constraint(self, options: GenerationConfig, prompt_length: int) -> Constraint | None:
        if options.structure is None:
            return None
        beams = options.num_beams > 1
        return self._grammars.constraint(*options.structure, options.eos_token_ids, prompt_length, beams=beams)

    def _negative_ids(self, options: GenerationConfig) -> Tokens | None:
        """The tokens of the negative prompt, int64 [length]; None: there is none."""
        if options.negative_prompt is None or options.guidance_scale == 1:
            return None
        try:
            return self.prompt_ids(options.negative_prompt)
        except PromptError as error:
            raise OptionError(f"negative_prompt: {error}", "negative_prompt") from error

    def _ids(self, prompt: Prompt, options: GenerationConfig | None = None, spare: int = 0) -> Tokens:
        """The tokens of a text, int64 [length], which may have none, and `spare` more than the context window at most."""
        context, vocabulary = self.config.n_positions, self.config.vocab_size
        if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes | bytearray):
            raise PromptError(f"a prompt is a text or a list of token ids, not {shown(prompt)}")
        most = limits.LETTERS_PER_TOKEN * context
        if isinstance(prompt, str) and len(prompt) > _LONG * context and (longest := self.tokenizer.longest_token):
            most = min(most, 2 * longest * context * len(prompt) // len(prompt.encode("utf-8", "replace")))
        if options is not None and options.truncate == "left":
            prompt = prompt[-most:]
        if len(prompt) > most:  # to encode megabytes takes seconds
            unit = "letters" if isinstance(prompt, str) else "tokens"
            raise PromptError(
                f"the prompt has {len(prompt):,} {unit}, the context window {context} tokens: shorten it",
                too_long=True,
            )
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if ids and options is not None:
            ids = ids[-options.kept_tokens(len(ids), context) :]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < vocabulary:
                raise PromptError(f"{shown(token)} is no token id: they are whole numbers from 0 to {vocabulary - 1}")
        if len(ids) > context + spare:
            words = f"the prompt has {len(ids)} tokens, the context window {context}: shorten the prompt"
            raise PromptError(words, too_long=True)
        return np.array(ids, np.int64)


class Meter(Protocol):
    """Measures the runs of models from outside: see `experiments.energy.tracker`."""

    def generate(
        self, model: Model, options: GenerationConfig, run: Callable[[GenerationConfig], list[Result]]
    ) -> list[Result]:
        """Makes a run, once or more often, and returns the results of the first one."""
        ...

    def stream(self, model: Model, stream: Stream) -> Stream:
        """A stream with the same pieces."""
        ...


# Measures all runs in the current context; None: nobody does.
METER: ContextVar[Meter | None] = ContextVar("METER", default=None)
