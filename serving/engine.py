"""Engine: the one thread that runs the model; prompts join its batch and leave it between steps (continuous batching).

Knows neither HTTP nor the event loop: each job brings a function that the engine calls when there is news.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gpt2onnx.errors import BackendError, Gpt2OnnxError

from ..models import limits
from ..runtime.decoding.logprobs import TokenLogprobs
from ..runtime.generation import Generation
from ..runtime.model import Model
from ..runtime.requests import Request
from .metrics import ModelMetrics

_log = logging.getLogger(__name__)
# Most prompt tokens computed between two decoding steps; docs/serve.md compares 32, 64 and no limit.
_PREFILL_CHUNK = 64
_SHARE_OF_SMALL_JOBS = 4  # max_batch / 4 rows are added for jobs of at most that many rows
_SHARE_OF_OTHERS = 4  # the last quarter of the queue is for other clients
_MAX_RETRY_SECONDS = 60
_MAX_FAILURES = 3  # of the batch in a row: by then ONNX Runtime won't recover


class QueueFullError(Exception):
    """The queue has no room for a request.

    Attributes:
        seconds: after which it is worth to try again.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__("too many requests are waiting: try again later")
        self.seconds = seconds


class UnavailableError(Exception):
    """The engine takes no requests: it is stopping, or has failed."""


@dataclass(frozen=True)
class Piece:
    """New tokens of one continuation of a prompt.

    Attributes:
        index: of the continuation among those of the prompt.
        logprobs: of each of them, if the request asks for log probabilities; else empty.
        finish_reason: as in `GeneratedSequence`; None while it goes on.
    """

    index: int
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None


@dataclass(eq=False)
class Job:
    """A prompt on its way through the queue and the batch.

    Attributes:
        wake: called in the engine's thread when there is news.
        rows: sequences in the batch.
        client: address of the client that asked for it.
        turn: how many jobs of the same client come before it.
        streamed: whether new tokens are news, or only the end.
        begin: index of its first continuation among those of the prompt.
        pieces: new tokens that `take` hasn't returned yet.
        prompt_logprobs: of each token of the prompt but the first, if the request asks for them.
        error: why there is no result.
        submitted, joined, first, last, ended: `time.perf_counter` at the queue, the batch, the first and latest token, the end.
        seen: number of new tokens of each continuation.
    """

    wake: Callable[[], None]
    rows: int
    streamed: bool
    begin: int = 0
    pieces: deque[Piece] = field(default_factory=deque)
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: Exception | None = None
    submitted: float = field(default_factory=time.perf_counter)
    joined: float = 0.0
    first: float | None = None
    last: float = 0.0
    ended: float | None = None
    cancelled: bool = False
    seen: list[int] = field(default_factory=list)
    client: str = ""
    turn: int = 0

    @property
    def done(self) -> bool:
        return self.ended is not None

    @property
    def tokens(self) -> int:
        """Number of new tokens of all continuations."""
        return sum(self.seen)

    def take(self) -> list[Piece]:
        """The pieces since the last call."""
        return [self.pieces.popleft() for _ in range(len(self.pieces))]


class Engine:
    """Runs prompts in one batch.

    Args:
        model: for the engine's thread alone, except for its stateless tokenizer.
        max_batch: most sequences in the batch. Jobs of up to a quarter of it may use a quarter more.
        max_queue: most prompts in the queue.

    Attributes:
        failure: the exception that ended the thread, or its use.
        stopping: whether no more requests are taken.
    """

    def __init__(self, model: Model, *, max_batch: int, max_queue: int, metrics: ModelMetrics) -> None:
        self.max_batch, self.max_queue = max_batch, max_queue
        self.failure: Exception | None = None
        self.stopping = False
        self._stepped = time.monotonic()
        self._model, self._metrics = model, metrics
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._active: set[Job] = set()
        self._rows = 0  # of the active ones
        # Beside the batch, for small jobs: so a prompt with many continuations doesn't hold up those with few.
        self._reserved = max_batch // _SHARE_OF_SMALL_JOBS
        self._thread = threading.Thread(target=self._run, name="gpt2onnx-engine", daemon=True)
        self._advanced: set[Job] = set()  # in the step under way
        self._mean_seconds = 1.0  # of a job in the batch
        self._failures = 0

    @property
    def running(self) -> int:
        """Number of prompts in the batch."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Number of prompts in the queue."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether it has no prompts."""
        with self._changed:
            return not (self._active or self._waiting)

    @property
    def cache_use(self) -> float:
        """Share of the KV cache's rows in use, from 0 to 1."""
        return self._rows / (self.max_batch + self._reserved)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, requests: list[Request]) -> None:
        """Queues requests of one client, each with a Job as its id: all or none.

        Raises:
            QueueFullError: the queue has no room for all, or only for those of other clients.
            UnavailableError: the engine takes no requests.
        """
        with self._changed:
            if self.failure is not None:
                raise UnavailableError("the model's thread has failed: restart the server")
            if self.stopping:
                raise UnavailableError("the server is shutting down")
            self._queue(requests)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Ends a job: at once in the queue, with the next step in the batch."""
        with self._changed:
            job.cancelled = True
            self._waiting = deque(request for request in self._waiting if request.id is not job)

    def close(self) -> None:
        """Takes no more requests, and ends the thread after the last one."""
        with self._changed:
            self.stopping = True
            self._changed.notify()

    def abandon(self) -> None:
        """Ends all jobs with an error."""
        self._give_up(UnavailableError("the server is shutting down"), also_waiting=True)

    def join(self, seconds: float) -> None:
        """Waits for the thread's end, `seconds` at most."""
        self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def fail_if_stuck(self) -> bool:
        """Whether a forward pass takes too long. Then all jobs have failed, and no more are taken."""
        if not self._active or time.monotonic() < self._stepped + limits.PASS_SECONDS:
            return False
        self.failure = BackendError(f"a forward pass hasn't ended after {limits.PASS_SECONDS:g} seconds")
        _log.error("%s: the server ends", self.failure)
        self._give_up(self.failure, also_waiting=True)
        return True

    def _run(self) -> None:
        try:
            while not (self.stopping and not self._waiting):
                try:
                    for request, state in self._model.follow(
                        self._arrivals(), self.max_batch + self._reserved, _PREFILL_CHUNK
                    ):
                        self._advance(request.id, state)
                except Gpt2OnnxError as error:
                    # One prompt's logits may be NaN, for example: nothing tells which prompt.
                    _log.error("the batch has failed: %s", error)
                    self._give_up(error)
                    self._failures += isinstance(error, BackendError)
                    if self._failures == _MAX_FAILURES:
                        raise
        except Exception as error:  # noqa: BLE001  clients must not wait for ever
            self.failure = error
            _log.exception("the model's thread has failed")
            self._give_up(BackendError("the model's thread has failed"), also_waiting=True)

    def _arrivals(self) -> Iterator[Request | None]:
        """The requests that join the batch now, None when there are none; waits while nothing runs."""
        while True:
            with self._changed:
                while not (self._waiting or self._active or self.stopping):
                    self._changed.wait()
                if self.stopping and not self._waiting:
                    return
                request = self._next()
                self._stepped = time.monotonic()
            yield request

    def _queue(self, requests: list[Request]) -> None:
        """Queues requests of one client in turns: one of each client, a second of each, and so on."""
        client = requests[0].id.client
        own = [request.id.turn for request in self._waiting if request.id.client == client]
        full = len(self._waiting) + len(requests) > self.max_queue
        if full or (own and len(own) + len(requests) > self.max_queue - self.max_queue // _SHARE_OF_OTHERS):
            raise QueueFullError(self._retry_after())
        turn = max(own, default=sum(job.client == client for job in self._active) - 1)
        for request in requests:
            request.id.turn = turn = turn + 1
            later = (index for index, other in enumerate(self._waiting) if other.id.turn > turn)
            self._waiting.insert(next(later, len(self._waiting)), request)

    def _next(self) -> Request | None:
        """Takes the first job of the queue that may join the batch: in its turn, or a small one in the rows kept for those."""
        small = sum(job.rows for job in self._active if job.rows <= self._reserved)
        large = self._rows - min(small, self._reserved)
        for index, request in enumerate(self._waiting):
            rows = request.id.rows
            if rows > self._reserved:
                fits = index == 0 and large + rows <= self.max_batch
            elif index == 0:
                client = request.id.client
                own = sum(job.rows for job in self._active if job.rows <= self._reserved and job.client == client)
                # The rows that are kept for small jobs are also kept for other clients.
                fits = own + rows <= self.max_batch and self._rows + rows <= self.max_batch + self._reserved
            else:
                fits = small + rows <= self._reserved
            if fits:
                del self._waiting[index]
                self._enter(request.id)
                return request
        return None

    def _enter(self, job: Job) -> None:
        job.joined = job.last = time.perf_counter()
        self._active.add(job)
        self._rows += job.rows
        self._metrics.queue_seconds.observe(job.joined - job.submitted)

    def _advance(self, job: Job, state: Generation | Gpt2OnnxError) -> None:
        """Records a job's step, or its refusal."""
        if isinstance(state, Gpt2OnnxError):
            job.error = state
            self._leave(job)
            return
        self._count_step(job)
        self._record_tokens(job, state)
        if job.cancelled:
            state.cancel()
        if state.done:
            self._leave(job)
        elif job.streamed and job.pieces:
            job.wake()

    def _count_step(self, job: Job) -> None:
        if job in self._advanced:  # a second time: the next step has begun
            self._advanced.clear()
            self._metrics.batch_rows.observe(self._rows)
        self._advanced.add(job)

    def _record_tokens(self, job: Job, state: Generation) -> None:
        now = time.perf_counter()
        ranked = state.request.options.num_beams > 1  # the best beam may change until the end
        continuations = state.continuations()
        prompt = len(state.strategy.prompt)
        new = 0
        if job.first is None:
            job.prompt_logprobs = state.prompt_logprobs  # before the pieces, which another thread may take at once
        job.seen = job.seen or [0] * len(continuations)
        for index, one in enumerate(continuations):
            begin, end = job.seen[index], len(one.tokens) - prompt
            if (ranked and state.done) or (begin < end and not ranked):
                job.seen[index] = end
                new += end - begin
                tokens = one.tokens[prompt + begin :].tolist()
                job.pieces.append(Piece(job.begin + index, tokens, one.logprobs[begin:end], one.finish_reason))
        if job.first is None:
            job.first = now
            self._metrics.prompt_tokens.inc(prompt)
            self._metrics.first_token_seconds.observe(now - job.submitted)
        else:
            self._metrics.token_gap_seconds.observe(now - job.last)
        job.last = now
        self._metrics.completion_tokens.inc(new)

    def _leave(self, job: Job) -> None:
        job.ended = time.perf_counter()
        with self._changed:
            if job in self._active:  # not given up before
                self._active.remove(job)
                self._rows -= job.rows
            self._advanced.discard(job)
        if not job.cancelled:
            self._failures = 0
            self._mean_seconds += 0.1 * (job.ended - job.joined - self._mean_seconds)
            self._metrics.request_seconds.observe(job.ended - job.submitted)
        job.wake()

    def _give_up(self, error: Exception, *, also_waiting: bool = False) -> None:
        """Ends the jobs of the batch, and of the queue if asked, with an error."""
        with self._changed:
            jobs = list(self._active)
            self._active.clear()
            self._rows = 0
            if also_waiting:
                jobs += [request.id for request in self._waiting]
                self._waiting.clear()
        for job in jobs:
            job.cancelled = True
            job.error = error
            job.ended = time.perf_counter()
            job.wake()

    def _retry_after(self) -> int:
        """Seconds until there may be room: rounds of the batch times the mean time of a job."""
        rounds = 1 + len(self._waiting) / self.max_batch
        return max(1, min(_MAX_RETRY_SECONDS, round(self._mean_seconds * rounds)))
