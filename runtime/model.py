"""Text in, text out: the model that users hold.

Prompts are encoded and checked, decoded together by the loop, and their tokens turned back into text.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from gpt2onnx.errors import Gpt2OnnxError, OptionError, PromptError

from ..models.bundle import GENERATION_CONFIG, TOKENIZER, Bundle
from ..models.config import read_json
from ..models.messages import shown
from .decoding.processors import Tokens
from .decoding.sampling import log_softmax
from .decoding.strategy import Search, Stop, start
from .engine import head, second_graph
from .engine.generation import Generation, PromptLogprobs
from .engine.runner import Session
from .engine.scheduler import Decoder
from .observer import OBSERVER, Observer
from .options import SAMPLING_OPTIONS, GenerationConfig
from .requests import Outcome, Prompt, Request, Result, Score
from .tokenizer import Tokenizer, find_stop

_LETTERS_PER_TOKEN = 1000  # the longest of GPT-2's has 128
_SCORED_AT_ONCE = 128  # positions whose logits are in memory together


class Model:
    """A bundle, ready to generate. One thread at a time may use it.

    Args:
        folder: the bundle.
        device: "cpu", "cuda", the name of another execution provider, or "auto": CUDA where it works, else the CPU.
        threads: of one operator; by default as many as this process may use, fewer for very small models.
        wide_after: tokens in prompts and batches after which these go through the bundle's second graph, if it has one
            for this device; 0 opens it right away, None never.
        screen_after: in fp32, passes of greedy search or sampling with top-k after which few logits are computed in
            full; None never.
        screens: whether they may do so; None: where the processor adds up products of bytes exactly.

    Raises:
        BundleError: the bundle can't be used.
        OptionError: an argument, or the bundle's generation_config.json, is out of range.
        BackendError: ONNX Runtime can't load the graph.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        wide_after: int | None = second_graph.WORTH,
        screen_after: int | None = head.WORTH,
        screens: bool | None = None,
    ) -> None:
        self.bundle = Bundle.open(folder)
        self.config = self.bundle.config
        self.tokenizer = Tokenizer(folder / TOKENIZER)
        self.tokenizer.check(self.config.vocab_size)
        self.generation_config = GenerationConfig.from_file_content(read_json(folder / GENERATION_CONFIG))
        self.session = Session(
            self.bundle,
            device=device,
            threads=threads,
            wide_after=wide_after,
            screen_after=screen_after,
            screens=screens,
        )
        self._decoder = Decoder(self.session)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        batch_size: int = 8,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        max_length: int | None = None,
        min_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_h: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        epsilon_cutoff: float | None = None,
        eta_cutoff: float | None = None,
        renormalize_logits: bool | None = None,
        repetition_penalty: float | None = None,
        encoder_repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        encoder_no_repeat_ngram_size: int | None = None,
        sequence_bias: Sequence[tuple[Sequence[int], float]] | None = None,
        bad_words_ids: Sequence[Sequence[int]] | None = None,
        suppress_tokens: Sequence[int] | None = None,
        begin_suppress_tokens: Sequence[int] | None = None,
        forced_bos_token_id: int | None = None,
        forced_eos_token_id: int | Sequence[int] | None = None,
        exponential_decay_length_penalty: tuple[int, float] | None = None,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | Literal["never"] | None = None,
        num_return_sequences: int | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        prompt_lookup: int | None = None,
    ) -> Any:  # a Result or a list of them: no signature can tell a text from a sequence of texts
        """Continues a prompt, or a list of prompts in batches.

        Options are those of `GenerationConfig`; one that isn't given is the bundle's own. Giving one that
        only matters to sampling, without `do_sample`, turns sampling on.

        Args:
            prompts: a text or token ids, or a list of such.
            batch_size: prompts that are decoded together. In fp32 no result depends on it; kernels of lower precisions round
                one row in another way than several, which may decide a near tie.

        Returns:
            The result of the prompt, or the list of results of the list, in its order.

        Raises:
            PromptError: a prompt is empty, too long, or not in the vocabulary.
            OptionError: an option is out of range, or options contradict each other.
            BackendError: ONNX Runtime failed.
        """
        options = self.options(locals())
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer)):
            return self.answer([cast("Prompt", prompts)], options)[0]
        return self.answer(cast("Sequence[Prompt]", prompts), options, batch_size)

    def answer(self, prompts: Sequence[Prompt], options: GenerationConfig, batch_size: int = 1) -> list[Result]:
        """Continues prompts, all with the same options; otherwise as `generate`."""
        observer = OBSERVER.get()
        if observer is None:
            return self._all(prompts, options, batch_size)
        options = observer.repeatable(options)
        with observer.begin(self, options) as run:
            results = self._all(prompts, options, batch_size)
            return run.end(results, again=lambda: self._all(prompts, options, batch_size))

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        max_length: int | None = None,
        min_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_h: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        epsilon_cutoff: float | None = None,
        eta_cutoff: float | None = None,
        renormalize_logits: bool | None = None,
        repetition_penalty: float | None = None,
        encoder_repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        encoder_no_repeat_ngram_size: int | None = None,
        sequence_bias: Sequence[tuple[Sequence[int], float]] | None = None,
        bad_words_ids: Sequence[Sequence[int]] | None = None,
        suppress_tokens: Sequence[int] | None = None,
        begin_suppress_tokens: Sequence[int] | None = None,
        forced_bos_token_id: int | None = None,
        forced_eos_token_id: int | Sequence[int] | None = None,
        exponential_decay_length_penalty: tuple[int, float] | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        prompt_lookup: int | None = None,
    ) -> "Stream":
        """Continues a prompt and gives its text as it grows: an iterator of pieces, with the result at its end.

        Options and errors are those of `generate`; beams and several sequences can't be streamed.
        """
        return self.open_stream(Request(prompt, self.options(locals())))

    def open_stream(self, request: Request) -> "Stream":
        """The same for a request.

        Raises:
            PromptError: the prompt is empty, too long, or not in the vocabulary.
            OptionError: the options ask for beams, for several sequences, or don't suit the prompt.
        """
        if request.options.num_beams > 1 or request.options.num_return_sequences > 1:
            raise OptionError(
                "only a single sequence can be streamed: not with num_beams or num_return_sequences above 1"
            )
        observer = OBSERVER.get()
        if observer is not None:
            request = replace(request, options=observer.repeatable(request.options))
        generation = self._begin(request)
        text_stream = self.tokenizer.stream(request.options.stop_strings)
        return Stream(self, generation, text_stream, observer)

    def complete(self, requests: Iterable[Request], batch_size: int = 1) -> Iterator[tuple[Request, Outcome]]:
        """Decodes requests, so many at a time, and yields each one with its result as soon as it is done.

        Requests are taken from the iterable when there is room for them, so it may be endless. One that
        can't be carried out yields its error and disturbs no other.

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
        self, requests: Iterable[Request | None], batch_size: int = 1, chunk: int | None = None
    ) -> Iterator[tuple[Request, Generation | Gpt2OnnxError]]:
        """As `complete`, but yields each request whenever it has got further, and it can be cancelled meanwhile.

        Args:
            requests: a None among them says that nothing waits just now, so that what runs goes on at once.
            batch_size: requests that are decoded together.
            chunk: while others run, about so many tokens of prompts at most are read between two steps of theirs, so
                that a long prompt doesn't keep them waiting; None for no limit.
        """
        if batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, not {batch_size}")
        running: dict[int, Generation] = {}
        refused: list[tuple[Request, Gpt2OnnxError]] = []

        def searches() -> Iterator[Search | None]:
            for request in requests:
                for key in [key for key, one in running.items() if one.done]:  # cancelled ones aren't seen again
                    del running[key]
                if request is None:
                    yield None
                    continue
                try:
                    generation = self._begin(request)
                except (PromptError, OptionError) as error:
                    refused.append((request, error))
                    yield None
                else:
                    running[id(generation.search)] = generation
                    yield generation.search

        for search in self._decoder.run(searches(), batch_size, chunk):
            if search is None:
                yield from refused
                refused.clear()
            else:
                generation = running.pop(id(search)) if search.done else running[id(search)]
                yield generation.request, generation

    def options(self, given: Mapping[str, Any]) -> GenerationConfig:
        """The bundle's generation options with the given ones on top; None, and names that are no options, don't count.

        Raises:
            OptionError: an option is out of range, or options contradict each other.
        """
        known = {name: given[name] for name in GenerationConfig.__dataclass_fields__ if given.get(name) is not None}
        if "do_sample" not in known and known.keys() & set(SAMPLING_OPTIONS):
            known["do_sample"] = True
        return self.generation_config.merged(known)

    def score(self, text: Prompt, *, prompt: Prompt | None = None) -> Score:
        """The log probability of each token of a text, given those before it.

        Args:
            text: what is scored; without a prompt, its first token isn't.
            prompt: what stands before the text.

        Raises:
            PromptError: there is no token to score, there are more than the context window holds, or others than the
                vocabulary's.
            BackendError: ONNX Runtime failed.
        """
        ids = scored = self.prompt_ids(text)
        if prompt is not None:
            ids = np.concatenate([self.prompt_ids(prompt), scored])
        elif len(ids) < 2:
            raise PromptError("a text of one token has nothing to score: at least two are needed")
        context = self.config.n_positions
        # The last token is only predicted: it needs no position of its own.
        if len(ids) > context + 1:
            raise PromptError(
                f"prompt and text have {len(ids)} tokens, the context window {context}: shorten one of them"
            )
        cache = self.session.new_cache(1, len(ids))
        logprobs: list[float] = []
        for begin in range(0, len(ids) - 1, _SCORED_AT_ONCE):
            end = min(begin + _SCORED_AT_ONCE, len(ids) - 1)
            logits = self.session.forward(cache, slice(0, 1), ids[None, begin:end], keep=end - begin)[0]
            following = ids[begin + 1 : end + 1]
            logprobs += log_softmax(logits)[np.arange(end - begin), following].tolist()
        return Score(scored.tolist(), logprobs if prompt is None else logprobs[-len(scored) :])

    def forget(self) -> None:
        """Lets later prompts share nothing with the key-value cache of earlier ones, so that each costs what it costs alone."""
        self._decoder.forget()

    def _all(self, prompts: Sequence[Prompt], options: GenerationConfig, batch_size: int) -> list[Result]:
        requests = [Request(prompt, options) for prompt in prompts]
        results: dict[int, Result] = {}
        for request, outcome in self.complete(requests, batch_size):
            if isinstance(outcome, Gpt2OnnxError):
                raise outcome
            results[id(request)] = outcome
        return [results[id(request)] for request in requests]

    def _begin(self, request: Request) -> "Generation":
        if request.error is not None:
            raise request.error
        ids = self.prompt_ids(request.prompt)
        options = request.options
        self.check_options(options, len(ids))
        search = start(ids, options, self.config.n_positions, self._stop(options.stop_strings, len(ids)))
        self.session.check_room(search.rows, search.positions, self._decoder.held_bytes)
        if request.prompt_logprobs is not None:
            search.reader = PromptLogprobs(ids, request.prompt_logprobs)
        return Generation(request, search, self.tokenizer)

    def check_options(self, options: GenerationConfig, prompt_length: int) -> None:
        """Raises OptionError where the options don't suit this model, or a prompt of so many tokens."""
        if options.new_tokens(prompt_length) < 1:
            raise OptionError(
                f"max_length {options.max_length} leaves no room after a prompt of {prompt_length} tokens"
            )
        in_vocabulary: dict[str, Iterable[Sequence[int]]] = {
            "bad_words_ids": options.bad_words_ids or (),
            "sequence_bias": (ids for ids, _ in options.sequence_bias or ()),
            "forced_bos_token_id": [options.forced_bos_token_ids] if prompt_length == 1 else (),
            "forced_eos_token_id": [options.forced_eos_token_ids],
        }
        for name, sequences in in_vocabulary.items():
            worst = max((token for ids in sequences for token in ids), default=0)
            if worst >= self.config.vocab_size:
                raise OptionError(
                    f"{name} holds {worst}, but the vocabulary ends at {self.config.vocab_size - 1}", name
                )

    def prompt_ids(self, prompt: Prompt) -> Tokens:
        """The tokens of a prompt, int64 [length]; raises PromptError where it is empty, too long, or not in the vocabulary."""
        context, vocabulary = self.config.n_positions, self.config.vocab_size
        if not isinstance(prompt, Sequence | np.ndarray):
            raise PromptError(f"a prompt is a text or a list of token ids, not {shown(prompt)}")
        if len(prompt) > _LETTERS_PER_TOKEN * context:  # to encode megabytes takes seconds
            raise PromptError(
                f"the prompt has {len(prompt):,} letters, the context window {context} tokens: shorten it",
                too_long=True,
            )
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise PromptError("the prompt is empty: give at least one token")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < vocabulary:
                raise PromptError(f"{shown(token)} is no token id: they are whole numbers from 0 to {vocabulary - 1}")
        if len(ids) > context:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, the context window {context}: shorten the prompt", too_long=True
            )
        return np.array(ids, np.int64)

    def _stop(self, strings: Sequence[str], prompt_length: int) -> Stop | None:
        if not strings:
            return None
        # A token is at least one byte, so no stop string can begin further back.
        reach = max(len(string.encode("utf-8", "replace")) for string in strings)

        def stop(tokens: Tokens) -> bool:
            tail = tokens[max(prompt_length, len(tokens) - reach) :].tolist()
            # A special token may be the stop string, or stand in the middle of one.
            texts = (self.tokenizer.decode(tail, skip_special_tokens=skip) for skip in (True, False))
            return any(find_stop(text, strings) is not None for text in texts)

        return stop


class Stream(Iterator[str]):
    """Pieces of a text that is being generated; made by `Model.stream`.

    Decoding goes on only while pieces are asked for. Left early, it keeps what there is.
    """

    def __init__(self, model: Model, generation: Generation, text: Any, observer: Observer | None = None) -> None:
        self._model, self._generation, self._text = model, generation, text
        self._pieces = self._run() if observer is None else self._run_observed(observer)
        self._result: Result | None = None

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends it where it is."""
        self._pieces.close()

    @property
    def result(self) -> Result:
        """The result as far as decoding has come."""
        return self._result or self._generation.result()

    def _run(self) -> Generator[str]:
        search = self._generation.search
        sent = len(search.prompt)
        for _ in self._model._decoder.run([search]):
            tokens = search.continuations()[0].tokens
            for token in tokens[sent:].tolist():
                if piece := self._text.push(token):
                    yield piece
            sent = len(tokens)
        if piece := self._text.finish():
            yield piece
        self._result = self.result

    def _run_observed(self, observer: Observer) -> Generator[str]:
        request = self._generation.request
        with observer.begin(self._model, request.options, close=self.close) as run:
            try:
                yield from self._run()
            except (GeneratorExit, KeyboardInterrupt):
                (self._result,) = run.end([self.result])
                raise
            again = [request.prompt], request.options, 1
            (self._result,) = run.end([self.result], again=lambda: self._model._all(*again))
