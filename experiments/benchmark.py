"""Benchmark: decoding speed of a loaded model, token by token, beside the machine's read bandwidth.

Prompts are random tokens from a fixed seed, all of one length: speed depends neither on the tokens nor, since sequences
of unequal length are never padded, on a mix of lengths. Decoding is greedy without an end token, so every run writes
exactly `new_tokens` tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from platform import machine as architecture
from typing import Any

import numpy as np

from gpt2onnx.errors import Gpt2OnnxError, OptionError

from ..models import limits
from ..models.bundle import WEIGHTS, Bundle
from ..models.precision import memory
from ..runtime.host.progress import Progress
from ..runtime.model import Model
from ..runtime.options import GenerationConfig
from ..runtime.ort import devices
from ..runtime.requests import Prompt, Request
from . import machine

Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest value over the runs."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(float(np.median(values)), min(values), max(values))


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of the seconds from one token of a sequence to its next, over all runs."""

    p50: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        # Measured values, not interpolated ones: p99 of few tokens is the slowest of them.
        p50, p90, p99 = np.percentile(values, (50, 90, 99), method="higher").tolist()
        return cls(p50, p90, p99, max(values))


@dataclass(frozen=True)
class Run:
    """Times of one run, in seconds: a batch of prompts, continued together.

    Attributes:
        prefill_seconds: until every prompt has its first new token.
        first_token_seconds: until its first new token, for each prompt.
        decode_seconds: from the end of prefill to the last token.
        token_seconds: for each token of that time, since the token before it in its sequence.
    """

    prefill_seconds: float
    first_token_seconds: list[float]
    decode_seconds: float
    token_seconds: list[float]


@dataclass(frozen=True)
class Bandwidth:
    """Read bandwidth of the machine, and decoding's share of it.

    Attributes:
        bytes_per_second: read from memory by as many threads as the model has; the best measured between the runs.
        weights: bytes of weights that each step reads.
        cache: bytes of keys and values that a step reads, on average.
        weights_share: share of the bandwidth that reading the weights once a token takes at the median speed. Above 1 with
            drafts, or if they fit into the processor's caches.
    """

    bytes_per_second: float
    weights: int
    cache: int
    weights_share: float


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Figures of a benchmark. Speeds are of the whole batch, in tokens a second.

    Attributes:
        prompt_tokens, new_tokens, batch_size, repetitions: as given.
        prefill: prompt tokens a second.
        time_to_first_token: seconds; in a batch a prompt also waits for those before it.
        decode: new tokens a second without the first ones; None if there are no others.
        seconds_per_token: from token to token of one sequence; None likewise.
        memory: of the process after a first run.
        cache_bytes: keys and values of the batch at its longest, part of that memory.
        bandwidth: None off the CPU, and if nothing was decoded.
    """

    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repetitions: int
    prefill: Spread
    time_to_first_token: Spread
    decode: Spread | None
    seconds_per_token: Percentiles | None
    memory: machine.ProcessMemory
    cache_bytes: int
    bandwidth: Bandwidth | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def benchmark(
    model: Model,
    *,
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    batch_size: int = 1,
    repetitions: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Benchmark:
    """Times a model, after one run to warm up.

    Args:
        batch_size: prompts that are continued together.
        repetitions: runs that count.

    Raises:
        OptionError: a number is below 1, the tokens don't fit into the context window, or the batch not into memory.
        BackendError: ONNX Runtime failed.
    """
    given = {
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size, "repetitions": repetitions,
    }  # fmt: skip
    limits.check_at_least(1, **given)
    config, runner = model.config, model.runner
    positions = prompt_tokens + new_tokens - 1  # the last token never passes through the network
    if positions > config.n_positions:
        raise OptionError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones take {positions} positions,"
            f" the context window has {config.n_positions}: lower one of them"
        )
    prompts = np.random.default_rng(seed).integers(config.vocab_size, size=(batch_size, prompt_tokens)).tolist()
    runner.check_memory(batch_size, positions)
    time_run(model, prompts, new_tokens)
    used = machine.process_memory()
    on_cpu = runner.device == devices.device_name(devices.CPU)
    reader = machine.MemoryReader(runner.threads) if on_cpu else None
    runs: list[Run] = []
    for done in range(repetitions):
        if reader is not None:
            reader.read()
        runs.append(time_run(model, prompts, new_tokens))
        if progress is not None:
            progress(done + 1, repetitions)
    decode = seconds_per_token = bandwidth = None
    per_position = memory(config, model.bundle.manifest.dtype, model.bundle.cache_dtype).cache_per_token
    if new_tokens > 1:
        decode = Spread.of([len(each.token_seconds) / each.decode_seconds for each in runs])
        seconds_per_token = Percentiles.of([seconds for each in runs for seconds in each.token_seconds])
        if reader is not None:
            weights = weights_read(model.bundle)
            cache = int(batch_size * per_position * (prompt_tokens + positions) / 2)  # the mean over the steps
            bandwidth = Bandwidth(reader.best, weights, cache, weights * decode.median / batch_size / reader.best)
    return Benchmark(
        **given,
        prefill=Spread.of([batch_size * prompt_tokens / each.prefill_seconds for each in runs]),
        time_to_first_token=Spread.of([seconds for each in runs for seconds in each.first_token_seconds]),
        decode=decode,
        seconds_per_token=seconds_per_token,
        memory=used,
        cache_bytes=batch_size * positions * per_position,
        bandwidth=bandwidth,
    )


def time_run(model: Model, prompts: Sequence[Prompt], new_tokens: int, clock: Clock = time.perf_counter) -> Run:
    """Continues prompts together, each by `new_tokens` tokens, and times it. No earlier run's cache is reused.

    Raises:
        OptionError: the batch doesn't fit into memory.
        BackendError: ONNX Runtime failed.
    """
    options = GenerationConfig(max_new_tokens=new_tokens)
    requests = [Request(prompt, options, id=row) for row, prompt in enumerate(prompts)]
    times: list[list[float]] = [[] for _ in prompts]
    model.reset()
    begun = clock()
    for request, outcome in model.follow(requests, len(requests)):
        if isinstance(outcome, Gpt2OnnxError):
            raise outcome
        now, own = clock(), times[request.id]
        new = len(outcome.continuations()[0].tokens) - len(outcome.strategy.prompt) - len(own)
        # A step begins once all prompts are computed. Its tokens, several with drafts, share its time.
        began = max(own[-1], *(each[0] for each in times if each)) if own else now
        own += [began + (now - began) * (index + 1) / new for index in range(new)]
    prefilled, ended = max(each[0] for each in times), max(each[-1] for each in times)
    # A prompt with an early first token waits for the others' prefill, which doesn't count as decoding.
    gaps = [now - max(before, prefilled) for each in times for before, now in pairwise(each) if now > prefilled]
    return Run(prefilled - begun, [each[0] - begun for each in times], ended - prefilled, gaps)


def weights_read(bundle: Bundle) -> int:
    """Bytes of weights that a step of greedy search on the CPU reads: all but lookup tables."""
    config, dtype = bundle.config, bundle.manifest.dtype
    tables = config.n_positions * config.n_embd * (4 if dtype == "fp32" else 2)
    if not config.tie_word_embeddings:
        tied = replace(config, tie_word_embeddings=True)
        tables += memory(config, dtype).weights - memory(tied, dtype).weights
    # ONNX Runtime has no float16 kernels on x86: it keeps these weights in float32.
    factor = 2 if dtype == "fp16" and architecture() in ("x86_64", "AMD64") else 1
    return factor * (bundle.manifest.files[WEIGHTS].size - tables)
