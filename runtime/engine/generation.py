"""A request under way: its search, and the result as far as that has come."""

import time

from ..decoding.processors import Tokens
from ..decoding.sampling import Logits
from ..decoding.strategy import Continuation, Search, TokenLogprobs, token_logprobs
from ..requests import GeneratedSequence, Request, Result
from ..tokenizer import Tokenizer, find_stop


class Generation:
    """A request under way; made by `Model.follow`.

    Attributes:
        request: what is carried out.
        search: how far it has come.
    """

    def __init__(self, request: Request, search: Search, tokenizer: Tokenizer) -> None:
        self.request, self.search = request, search
        self._tokenizer = tokenizer
        self._started = time.perf_counter()

    @property
    def done(self) -> bool:
        return self.search.done

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """Of each token of the prompt but the first, where they were asked for."""
        reader = self.search.reader
        return reader.logprobs if isinstance(reader, PromptLogprobs) else None

    def cancel(self) -> None:
        """Ends it where it is, and frees its rows of the batch."""
        self.search.cancel()

    def continuations(self) -> list[Continuation]:
        """What there is so far, prompt included, best first where they are ranked."""
        return self.search.continuations()

    def result(self) -> Result:
        """The result as far as decoding has come."""
        prompt, ids = self.request.prompt, self.search.prompt.tolist()
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(ids)
        seconds = time.perf_counter() - self._started
        sequences = [self._sequence(continuation) for continuation in self.continuations()]
        return Result(text, ids, sequences, seconds, prompt_logprobs=self.prompt_logprobs)

    def _sequence(self, continuation: Continuation) -> GeneratedSequence:
        options = self.request.options
        new = continuation.tokens[len(self.search.prompt) :].tolist()
        text = self._tokenizer.decode(new)
        logprobs = None if options.logprobs is None else continuation.logprobs
        return GeneratedSequence(
            text[: find_stop(text, options.stop_strings)], new, continuation.finish_reason, logprobs
        )


class PromptLogprobs:
    """Reads the log probabilities of a prompt's tokens, and of so many likeliest ones in their places."""

    def __init__(self, prompt: Tokens, count: int) -> None:
        self._prompt, self._count = prompt, count
        self.logprobs: list[TokenLogprobs] = []

    def __call__(self, logits: Logits) -> None:
        following = self._prompt[len(self.logprobs) + 1 :]  # nothing follows the last token
        for token, scores in zip(following.tolist(), logits, strict=False):
            self.logprobs.append(token_logprobs(token, scores, scores, self._count))
