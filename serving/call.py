"""Call: a request for completions on its way, from the engine's jobs to the choices of the response."""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

from gpt2onnx.errors import OptionError

from ..runtime.decoding.logprobs import TokenLogprobs
from ..runtime.options import GenerationConfig
from ..runtime.requests import Request
from ..runtime.text.stop_strings import StopStrings
from .answer import Answer, Record, prompt_record
from .engine import Job, Piece, UnavailableError
from .protocol import CompletionRequest
from .responses import ApiError
from .service import Service

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as token ids."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Part:
    """Continuations of a prompt that run together.

    Attributes:
        rows: sequences in the batch.
    """

    options: GenerationConfig
    rows: int


class Call:
    """A request for completions on its way.

    Args:
        options: of all continuations of a prompt.
        parts: in which these run.

    Attributes:
        news: set when there are new tokens, or the end.
        deadline: of `time.monotonic`, when it has to be done.
    """

    KIND = "text_completion"
    ID = "cmpl"

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        prompts: Sequence[Prompt],
        options: GenerationConfig,
        parts: Sequence[Part],
    ) -> None:
        self.body, self.news = body, asyncio.Event()
        self.deadline = time.monotonic() + service.limits.seconds
        self._service, self._prompts, self._options, self._parts = service, prompts, options, parts
        self._id, self._created = f"{self.ID}-{secrets.token_hex(12)}", int(time.time())
        self._choices = body.n or 1  # of each prompt
        sizes = [part.options.num_return_sequences for part in parts]
        begins = list(accumulate(sizes[:-1], initial=0))
        self._jobs = [  # of each prompt
            [
                Job(lambda: service.notifier.set(self.news), part.rows, streamed=bool(body.stream), begin=begin)
                for part, begin in zip(parts, begins, strict=True)
            ]
            for _ in prompts
        ]
        self._all_jobs = list(chain.from_iterable(self._jobs))
        self._answers = [
            [self._answer(prompt, number * self._choices + index) for index in range(self._choices)]
            for number, prompt in enumerate(prompts)
        ]

    def submit(self, client: str) -> None:
        """Queues the prompts of a client.

        Raises:
            QueueFullError: the queue has no room for all.
            UnavailableError: the engine takes no requests.
        """
        for job in self._all_jobs:
            job.client = client
        counts = [self.body.prompt_logprobs, self._options.logprobs if self._echoes_logprobs else None]
        scored = max((count for count in counts if count is not None), default=None)
        self._service.engine.submit(
            [
                Request(prompt.ids, part.options, id=job, prompt_logprobs=scored)
                for prompt, jobs in zip(self._prompts, self._jobs, strict=True)
                for part, job in zip(self._parts, jobs, strict=True)
            ]
        )

    def close(self) -> None:
        """Cancels what isn't done, and logs the counts."""
        state = "done" if self.done else "given up"
        for job in self._all_jobs:
            if not job.done:
                self._service.engine.cancel(job)
        usage = self.usage
        seconds = time.perf_counter() - self._all_jobs[0].submitted
        counts = usage["prompt_tokens"], usage["completion_tokens"]
        _log.info("%s %s: %d prompt tokens, %d new tokens, %.3f s", self._id, state, *counts, seconds)
        if self._service.log_prompts:
            for prompt, answers in zip(self._prompts, self._answers, strict=True):
                _log.info("%s prompt %r, texts %r", self._id, prompt.text, [answer.text for answer in answers])

    @property
    def done(self) -> bool:
        """Whether all prompts have ended."""
        return all(job.done for job in self._all_jobs)

    @property
    def usage(self) -> Record:
        """Numbers of tokens so far."""
        prompt_tokens = sum(len(prompt.ids) for prompt in self._prompts)
        completion_tokens = 0 if self.body.longest == 0 else sum(job.tokens for job in self._all_jobs)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def failure(self) -> ApiError | None:
        """The error of the first prompt that failed."""
        error = next((job.error for job in self._all_jobs if job.error is not None), None)
        if error is None:
            return None
        if isinstance(error, OptionError) and error.option is not None:
            return ApiError(400, str(error), error.option)
        # OptionError: no memory for the cache. Both may work later, or on another server.
        if isinstance(error, OptionError | UnavailableError):
            return ApiError(503, str(error), headers={"retry-after": "5"})
        return ApiError(500, str(error))

    def timeout(self) -> ApiError:
        """The error for a deadline that has passed."""
        return ApiError(504, f"not done after {self._service.limits.seconds:g} seconds: lower max_tokens")

    def record(self, choices: Sequence[Record], usage: Record | None) -> Record:
        """The response's body, or a stream event's."""
        return {
            "id": self._id,
            "object": self.KIND,
            "created": self._created,
            "model": self._service.name,
            "choices": list(choices),
            "usage": usage,
        }

    def take(self) -> Iterator[Record]:
        """The choices that have grown since the last call, each with its new text."""
        copies = self._options.num_return_sequences == 1  # of greedy decoding's one result
        for prompt, jobs, answers in zip(self._prompts, self._jobs, self._answers, strict=True):
            pieces, told = [], {}
            for job, part in zip(jobs, self._parts, strict=True):
                new = job.take()
                pieces += new
                if new and job.prompt_logprobs is not None:
                    told = self._tell(job.prompt_logprobs)
                    if self._echoes_logprobs:
                        end = None if copies else job.begin + part.options.num_return_sequences
                        for answer in answers[job.begin : end]:
                            answer.read_prompt(prompt.ids, job.prompt_logprobs, self._options.logprobs or 0)
                    job.prompt_logprobs = None
            if not pieces:
                continue
            if self._options.num_return_sequences > self._choices:  # best_of isn't streamed, so these are all pieces
                pieces = _best(pieces, self._choices)
            for index, answer in enumerate(answers):
                for piece in pieces:
                    if copies or piece.index == index:
                        if self.body.longest == 0:
                            answer.finish("length")  # without the one token that the runtime makes
                        else:
                            answer.push(piece)
                if (choice := answer.take()) is not None:
                    yield choice | told

    @property
    def _echoes_logprobs(self) -> bool:
        return bool(self.body.echo) and self.body.logprobs is not None

    def _tell(self, logprobs: Sequence[TokenLogprobs]) -> Record:
        """A prompt's log probabilities as each of its choices has them, if they were asked for; not in streams."""
        if self.body.prompt_logprobs is None:
            return {}
        tokenizer = self._service.model.tokenizer
        return {"prompt_logprobs": prompt_record(tokenizer, logprobs, self.body.prompt_logprobs)}

    def _answer(self, prompt: Prompt, index: int) -> Answer:
        return Answer(
            self._service.model.tokenizer,
            index,
            StopStrings(self._options.stop_strings, prompt.text, included=bool(self.body.include_stop_str_in_output)),
            self._options.eos_token_ids,
            skip_special_tokens=self._options.skip_special_tokens,
            logprobs=self.body.logprobs is not None,
            as_ids=bool(self.body.return_tokens_as_token_ids),
            prompt=prompt.text if self.body.echo else "",
        )


def _best(pieces: Sequence[Piece], count: int) -> list[Piece]:
    """The `count` continuations of highest mean log probability, best first and with new indices."""

    def mean(piece: Piece) -> float:
        return math.fsum(each.logprob for each in piece.logprobs) / max(1, len(piece.logprobs))

    whole: dict[int, Piece] = {}
    for piece in pieces:
        before = whole.get(piece.index)
        if before is not None:
            piece = replace(piece, tokens=before.tokens + piece.tokens, logprobs=before.logprobs + piece.logprobs)
        whole[piece.index] = piece
    ranked = sorted(whole.values(), key=mean, reverse=True)
    return [replace(piece, index=index) for index, piece in enumerate(ranked[:count])]
