"""A request under way: its strategy, and its result so far."""

from collections.abc import Sequence

from gpt2onnx.errors import OptionError

from .decoding.logprobs import PromptLogprobs, TokenLogprobs
from .decoding.strategy import Continuation, Strategy
from .requests import GeneratedSequence, Request, Result
from .text.tokenizer import Tokenizer


class Generation:
    """A request under way; made by `Model.follow`.

    Attributes:
        strategy: how far it has come.
        stop: its stop strings.
    """

    def __init__(self, request: Request, strategy: Strategy, tokenizer: Tokenizer, model: str) -> None:
        self.request, self.strategy = request, strategy
        options, ids = request.options, strategy.prompt.tolist()
        self.stop = tokenizer.stop_strings(options.stop_strings, ids, skip_special_tokens=options.skip_special_tokens)
        self._tokenizer, self._model = tokenizer, model

    @property
    def done(self) -> bool:
        return self.strategy.done

    @property
    def error(self) -> OptionError | None:
        """Why it can't go on; None: it can, or has ended."""
        return self.strategy.error

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """Of each token of the prompt but the first, if they were asked for."""
        reader = self.strategy.reader
        return reader.logprobs if isinstance(reader, PromptLogprobs) else None

    def cancel(self) -> None:
        """Ends it where it is, and frees its rows of the batch."""
        self.strategy.cancel()

    def continuations(self) -> list[Continuation]:
        """The continuations so far, prompt included, best first if they are ranked."""
        return self.strategy.continuations()

    def result(self) -> Result:
        """The result so far."""
        prompt, ids = self.request.prompt, self.strategy.prompt.tolist()
        text = prompt if isinstance(prompt, str) else self._decode(list(prompt))
        sequences = [self._sequence(continuation) for continuation in self.continuations()]
        return Result(
            text,
            ids,
            sequences,
            self.strategy.seconds,
            seed=self.strategy.seed,
            request_hash=self.request.sha256(self._model),
            prompt_logprobs=self.prompt_logprobs,
        )

    def _sequence(self, continuation: Continuation) -> GeneratedSequence:
        new = continuation.tokens[len(self.strategy.prompt) :].tolist()
        text = self._decode(new)
        asked = self.request.options.logprobs is not None
        logprobs, pieces = (continuation.logprobs, self._pieces(new)) if asked else (None, None)
        end = self.stop.find(text)
        return GeneratedSequence(text[:end], new, continuation.finish_reason, logprobs, continuation.score, pieces)

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to their text."""
        stream = self._tokenizer.stream(skip_special_tokens=self.request.options.skip_special_tokens)
        pieces = [stream.push(token) for token in tokens]
        rest = stream.finish()
        return [*pieces[:-1], pieces[-1] + rest] if pieces else []

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self.request.options.skip_special_tokens)
