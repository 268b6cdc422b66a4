"""The thread that owns the model: prompts that wait join its one running batch, and leave it when they are done.

Knows neither HTTP nor the event loop: whoever waits for news of a prompt gives a function that is called when there are some.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gpt2onnx.errors import BackendError, Gpt2OnnxError

from ..runtime.decoding.strategy import TokenLogprobs
from ..runtime.engine.generation import Generation
from ..runtime.model import Model
from ..runtime.requests import Request
from .metrics import Metrics
from .power import Power

_log = logging.getLogger(__name__)
# So many tokens of prompts are read at most between two steps of those that run; see docs/serve.md for what it does.
PREFILL_CHUNK = 64
_LONGEST_RETRY = 60  # seconds
_MOST_FAILURES = 3  # of the batch in a row, before the engine gives up


class QueueFullError(Exception):
    """As many prompts wait as may.

    Attributes:
        seconds: after which it is worth to try again.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__("too many requests are waiting: try again later")
        self.seconds = seconds


class UnavailableError(Exception):
    """No prompt can be taken: the engine is stopping, or has failed."""


@dataclass(frozen=True)
class Piece:
    """What one continuation of a prompt has grown by.

    Attributes:
        index: of the continuation.
        tokens: the new tokens.
        logprobs: of each of them, where they were asked for.
        finish_reason: as in `GeneratedSequence`; None while it goes on.
    """

    index: int
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None


@dataclass(eq=False)
class Job:
    """One prompt on its way through the batch, as its client sees it.

    Attributes:
        wake: called, in the engine's thread, whenever there is something new in here.
        rows: sequences that it has in the batch.
        streamed: whether pieces are news.
        pieces: those that nobody has taken yet.
        prompt_logprobs: of each token of the prompt but the first, where they were asked for.
        error: why it has no result, where it has none.
        joules: its share of what the machine has taken, where that is measured.
        submitted, joined, first, ended: when it was, in seconds of `time.perf_counter`.
    """

    wake: Callable[[], None]
    rows: int
    streamed: bool
    pieces: deque[Piece] = field(default_factory=deque)
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: Gpt2OnnxError | None = None
    joules: float = 0.0
    submitted: float = field(default_factory=time.perf_counter)
    joined: float | None = None
    first: float | None = None
    ended: float | None = None
    cancelled: bool = False
    # Of each continuation, how many tokens were seen.
    seen: list[int] = field(default_factory=list)
    last: float = 0.0
    joules_per_row: float = 0.0

    @property
    def done(self) -> bool:
        return self.ended is not None

    @property
    def tokens(self) -> int:
        """Tokens generated so far, by all continuations."""
        return sum(self.seen)


class Engine:
    """Runs prompts in one batch.

    Args:
        model: used by the engine's thread alone from now on; its tokenizer, which has no state, by all.
        max_batch: sequences in the batch.
        max_queue: prompts that wait for room in it.
        metrics: told what happens.
        power: of the machine, where it is measured.

    Attributes:
        failure: what has ended the thread, or None.
    """

    def __init__(
        self, model: Model, *, max_batch: int, max_queue: int, metrics: Metrics, power: Power | None = None
    ) -> None:
        self.max_batch, self.max_queue = max_batch, max_queue
        self.failure: Exception | None = None
        self._model, self._metrics, self._power = model, metrics, power
        self._news = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._active: set[Job] = set()
        self._rows = 0  # of the active ones
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="gpt2onnx-engine", daemon=True)
        # Of the step under way: when the last one ended, and who has already advanced in it.
        self._last = time.perf_counter()
        self._advanced: set[Job] = set()
        # What one row that was always in the batch would have taken.
        self._joules_per_row = 0.0
        # Whose prompts were read since the last step, how many tokens those have, and what that has taken.
        self._read: dict[Job, int] = {}
        self._joules_read = 0.0
        self._mean_seconds = 1.0
        self._failures = 0

    @property
    def running(self) -> int:
        """Prompts in the batch."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Prompts that wait for room in the batch."""
        return len(self._waiting)

    @property
    def stopping(self) -> bool:
        return self._stopping

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, requests: list[Request]) -> None:
        """Lets requests, each with a Job as its id, wait for room: all or none.

        Raises:
            QueueFullError: there are too many already.
            UnavailableError: the engine takes no more.
        """
        with self._news:
            if self.failure is not None:
                raise UnavailableError("the model's thread has failed: the server has to be started again")
            if self._stopping:
                raise UnavailableError("the server is shutting down")
            if len(self._waiting) + len(requests) > self.max_queue:
                raise QueueFullError(self._retry_after())
            self._waiting.extend(requests)
            self._news.notify()

    def cancel(self, job: Job) -> None:
        """Ends a job where it is: at once where it waits, with the next step where it runs."""
        with self._news:
            job.cancelled = True
            self._waiting = deque(request for request in self._waiting if request.id is not job)

    def close(self) -> None:
        """Takes no more, and ends when all there is has been finished."""
        with self._news:
            self._stopping = True
            self._news.notify()

    def abandon(self) -> None:
        """Gives up what isn't finished."""
        self._give_up(UnavailableError("the server is shutting down"), also_waiting=True)

    def join(self, seconds: float) -> None:
        """Waits for the end, for so long at most."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while not (self._stopping and not self._waiting):
                try:
                    for request, state in self._model.follow(self._arrivals(), self.max_batch, PREFILL_CHUNK):
                        self._advance(request.id, state)
                except Gpt2OnnxError as error:
                    # Such as a network that gives no numbers for one of the prompts; the others can't be told from it.
                    _log.error("the batch has failed: %s", error)
                    self._settle()
                    self._give_up(error)
                    self._failures += isinstance(error, BackendError)
                    if self._failures == _MOST_FAILURES:
                        raise
        except Exception as error:  # noqa: BLE001  whatever it is, clients must not wait for ever
            self.failure = error
            _log.exception("the model's thread has failed")
            self._give_up(BackendError("the model's thread has failed"), also_waiting=True)

    def _arrivals(self) -> Iterator[Request | None]:
        """Requests that are to join now; waits for one where nothing runs."""
        while True:
            with self._news:
                while not (self._waiting or self._active or self._stopping):
                    self._news.wait()
                    self._last = time.perf_counter()
                if self._stopping and not self._waiting:
                    return
                request = self._waiting.popleft() if self._waiting and self._fits(self._waiting[0].id) else None
                if request is not None:
                    self._enter(request.id)
            yield request

    def _fits(self, job: Job) -> bool:
        return not self._active or self._rows + job.rows <= self.max_batch

    def _enter(self, job: Job) -> None:
        job.joined = job.last = time.perf_counter()
        job.joules_per_row = self._joules_per_row
        self._active.add(job)
        self._rows += job.rows
        self._metrics.queue_seconds.observe(job.joined - job.submitted)

    def _advance(self, job: Job, state: Generation | Gpt2OnnxError) -> None:
        """Takes in what has become of a job."""
        if isinstance(state, Gpt2OnnxError):
            job.error = state
            self._leave(job)
            return
        self._account(job, len(state.search.prompt))
        self._look(job, state)
        if job.cancelled:
            state.cancel()
        if state.done:
            self._leave(job)
        elif job.streamed and job.pieces:
            job.wake()

    def _look(self, job: Job, state: Generation) -> None:
        """Keeps a job's new tokens, and counts them."""
        now = time.perf_counter()
        ranked = state.request.options.num_beams > 1  # what is best so far isn't yet the answer
        continuations = state.continuations()
        prompt = len(state.search.prompt)
        new = 0
        job.seen = job.seen or [0] * len(continuations)
        for index, one in enumerate(continuations):
            begin, end = job.seen[index], len(one.tokens) - prompt
            if begin < end and (not ranked or state.done):
                job.seen[index] = end
                new += end - begin
                tokens = one.tokens[prompt + begin :].tolist()
                job.pieces.append(Piece(index, tokens, one.logprobs[begin:end], one.finish_reason))
        if job.first is None:
            job.first = now
            job.prompt_logprobs = state.prompt_logprobs
            self._metrics.prompt_tokens.inc(prompt)
            self._metrics.first_token_seconds.observe(now - job.submitted)
        else:
            self._metrics.token_gap_seconds.observe(now - job.last)
        job.last = now
        self._metrics.completion_tokens.inc(new)

    def _account(self, job: Job, prompt: int) -> None:
        """Shares the time since the last news out: reading is of the prompts by their tokens, a step is of all rows alike."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if job in self._advanced:  # the next step has begun
            self._advanced.clear()
            self._metrics.batch_rows.observe(self._rows)
        self._advanced.add(job)
        watts = None if self._power is None else self._power.watts
        if watts is not None:
            self._metrics.joules.inc(seconds * watts)
            if job.first is None:
                # Several may have been read in one pass, of which the first one has the news.
                self._read[job] = prompt
                self._joules_read += seconds * watts
            else:
                self._settle()
                self._joules_per_row += seconds * watts / max(1, self._rows)

    def _settle(self) -> None:
        """Gives those whose prompts were read their shares."""
        tokens = sum(self._read.values())
        for job, prompt in self._read.items():
            job.joules += self._joules_read * prompt / tokens
        self._read.clear()
        self._joules_read = 0.0

    def _leave(self, job: Job) -> None:
        self._settle()
        job.joules += (self._joules_per_row - job.joules_per_row) * job.rows
        job.ended = time.perf_counter()
        with self._news:
            if job in self._active:  # otherwise it was given up before
                self._active.remove(job)
                self._rows -= job.rows
            self._advanced.discard(job)
        if job.joined is not None:
            self._mean_seconds += 0.1 * (job.ended - job.joined - self._mean_seconds)
        if not job.cancelled:
            self._failures = 0
            self._metrics.request_seconds.observe(job.ended - job.submitted)
        job.wake()

    def _give_up(self, error: Exception, *, also_waiting: bool = False) -> None:
        """Ends all jobs with an error."""
        with self._news:
            jobs = list(self._active)
            self._active.clear()
            self._rows = 0
            if also_waiting:
                jobs += [request.id for request in self._waiting]
                self._waiting.clear()
        for job in jobs:
            job.cancelled = True
            job.error = error if isinstance(error, Gpt2OnnxError) else BackendError(str(error))
            job.ended = time.perf_counter()
            job.wake()

    def _retry_after(self) -> int:
        """In how many seconds there may be room, as far as those before have shown."""
        rounds = 1 + len(self._waiting) / max(1, self.max_batch)
        return max(1, min(_LONGEST_RETRY, round(self._mean_seconds * rounds)))
