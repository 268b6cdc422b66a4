"""A request for completions under way: what its prompts in the batch have come to, and what is to be said of it."""

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gpt2onnx.errors import OptionError

from ..runtime.options import GenerationConfig
from ..runtime.requests import Request
from .answer import Answer, Record
from .api_error import ApiError
from .engine import Job, Piece
from .protocol import CompletionRequest

if TYPE_CHECKING:
    from .completions import Service

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens."""

    text: str
    ids: list[int]


class Bell:
    """Rings in the event loop for news from another thread: once for all that came since it last did."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: deque[Call] = deque()
        self._pending = False

    def ring(self, call: "Call") -> None:
        """There is news of a call; may be called in any thread."""
        self._news.append(call)
        if not self._pending:
            self._pending = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._pending = False
        while self._news:
            self._news.popleft().news.set()


class Call:
    """A request for completions under way.

    Attributes:
        id: in its answer.
        news: set when there is something new.
    """

    def __init__(
        self,
        service: "Service",
        body: CompletionRequest,
        prompts: Sequence[Prompt],
        options: GenerationConfig,
        rows: int,
        ring: Callable[["Call"], None],
    ) -> None:
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.news = asyncio.Event()
        self.body = body
        self._service, self._prompts, self._options = service, prompts, options
        self._created = int(time.time())
        self._wanted = body.n or 1
        prompt_logprobs = options.logprobs if body.echo and body.logprobs is not None else None
        self.jobs = [Job(lambda: ring(self), rows, streamed=bool(body.stream)) for _ in prompts]
        self._requests = [
            Request(prompt.ids, options, id=job, prompt_logprobs=prompt_logprobs)
            for prompt, job in zip(prompts, self.jobs, strict=True)
        ]
        self._read = [False] * len(prompts)
        self._answers = [
            [self._answer(prompt, number * self._wanted + index) for index in range(self._wanted)]
            for number, prompt in enumerate(prompts)
        ]

    def submit(self) -> None:
        """Lets the prompts wait for room in the batch; errors are those of `Engine.submit`."""
        self._service.engine.submit(self._requests)

    def close(self) -> None:
        """Ends what isn't done, and logs what there was."""
        state = "done" if self.done else "given up"
        for job in self.jobs:
            if not job.done:
                self._service.engine.cancel(job)
        usage = self.usage
        seconds = time.perf_counter() - self.jobs[0].submitted
        counts = usage["prompt_tokens"], usage["completion_tokens"]
        _log.info("%s %s: %d tokens of prompts, %d new ones, %.3f s", self.id, state, *counts, seconds)
        if self._service.log_prompts:
            for prompt, answers in zip(self._prompts, self._answers, strict=True):
                _log.info("%s prompt %r, texts %r", self.id, prompt.text, [answer.text for answer in answers])

    @property
    def done(self) -> bool:
        return all(job.done for job in self.jobs)

    def failure(self) -> ApiError | None:
        """Why there is no answer, where one of the prompts could not be continued."""
        error = next((job.error for job in self.jobs if job.error is not None), None)
        if error is None:
            return None
        # There is no memory for it, or no server any more: another time, or another server, may do.
        elsewhere = isinstance(error, OptionError) or self._service.engine.stopping
        return ApiError(503, str(error), headers={"retry-after": "5"}) if elsewhere else ApiError(500, str(error))

    def too_late(self) -> ApiError:
        """That it wasn't done in time."""
        return ApiError(504, f"it wasn't done after {self._service.limits.seconds:g} seconds: lower max_tokens")

    @property
    def usage(self) -> Record:
        prompt_tokens = sum(len(prompt.ids) for prompt in self._prompts)
        completion_tokens = 0 if self.body.max_tokens == 0 else sum(job.tokens for job in self.jobs)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "energy": self._energy(completion_tokens),
        }

    def record(self, choices: Sequence[Record], usage: Record | None) -> Record:
        """The answer, or a part of it."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.name,
            "choices": list(choices),
            "usage": usage,
        }

    def take(self) -> Iterator[Record]:
        """The choices, as far as they have grown since they were last taken."""
        for number, (job, answers) in enumerate(zip(self.jobs, self._answers, strict=True)):
            if not job.pieces:
                continue
            pieces = [job.pieces.popleft() for _ in range(len(job.pieces))]
            if not self._read[number]:
                self._read[number] = True
                for answer in answers if job.prompt_logprobs is not None else ():
                    answer.read_prompt(self._prompts[number].ids, job.prompt_logprobs or [])
            if self._options.num_return_sequences > self._wanted:  # best_of, which isn't streamed: these are all pieces
                pieces = _best(pieces, self._wanted)
            for index, answer in enumerate(answers):
                self._push(
                    answer,
                    [piece for piece in pieces if self._options.num_return_sequences == 1 or piece.index == index],
                )
                choice = answer.take()
                if choice is not None:
                    yield choice

    def _push(self, answer: Answer, pieces: Sequence[Piece]) -> None:
        if self.body.max_tokens == 0:
            answer.finish("length")  # one token was made, as there has to be one
            return
        for piece in pieces:
            answer.push(piece)

    def _answer(self, prompt: Prompt, index: int) -> Answer:
        options = self._options
        return Answer(
            self._service.model.tokenizer,
            index,
            options.stop_strings,
            options.eos_token_ids,
            logprobs=self.body.logprobs is not None,
            prompt=prompt.text if self.body.echo else "",
        )

    def _energy(self, tokens: int) -> Record | None:
        power = self._service.power
        if power is None or power.watts is None:
            return None
        joules = sum(job.joules for job in self.jobs)
        seconds = max((job.ended or 0.0) - (job.joined or 0.0) for job in self.jobs)
        return {
            "joules": joules,
            "joules_per_token": joules / tokens if tokens else None,
            "watts": power.watts,
            "method": power.method,
            "reliable": seconds >= power.seconds,
        }


def _best(pieces: Sequence[Piece], count: int) -> list[Piece]:
    """The likeliest of whole continuations, by their tokens' mean log probability, numbered anew."""

    def mean(piece: Piece) -> float:
        return math.fsum(one.logprob for one in piece.logprobs) / max(1, len(piece.logprobs))

    whole: dict[int, Piece] = {}
    for piece in pieces:
        before = whole.get(piece.index)
        if before is not None:
            piece = replace(piece, tokens=before.tokens + piece.tokens, logprobs=before.logprobs + piece.logprobs)
        whole[piece.index] = piece
    ranked = sorted(whole.values(), key=mean, reverse=True)
    return [replace(piece, index=index) for index, piece in enumerate(ranked[:count])]
