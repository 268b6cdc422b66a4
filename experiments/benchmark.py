"""How fast a loaded model decodes: the product's own loop, timed token by token, beside what the machine can read.

Prompts are random tokens from a fixed seed, all of one length: speed depends neither on which tokens they are nor,
since sequences of unequal length are never padded, on how lengths are mixed. Decoding is greedy and no token ends it,
so every run writes exactly the tokens that were asked for.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from platform import machine as architecture
from typing import Any

import numpy as np

from gpt2onnx.errors import OptionError

from ..models.bundle import Bundle
from ..models.precision import memory
from ..runtime.decoding.processors import Tokens
from ..runtime.decoding.strategy import start
from ..runtime.engine import head
from ..runtime.engine.scheduler import Decoder
from ..runtime.model import Model
from ..runtime.options import GenerationConfig
from ..runtime.ort import devices
from . import machine

# Called with the runs made so far and in all.
Progress = Callable[[int, int], None]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """A figure over the runs."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(float(np.median(values)), min(values), max(values))


@dataclass(frozen=True)
class Percentiles:
    """Seconds from one token of a sequence to its next, over all runs: so many percent took no longer."""

    p50: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        # Of measured values, none in between: p99 of few tokens is the slowest of them.
        p50, p90, p99 = np.percentile(values, (50, 90, 99), method="higher").tolist()
        return cls(p50, p90, p99, max(values))


@dataclass(frozen=True)
class Run:
    """One run: a batch of prompts, continued together.

    Attributes:
        prefill_seconds: until every prompt had passed through the network, and its first new token was chosen.
        first_token_seconds: until a prompt's first new token, for each.
        decode_seconds: from there to the last token.
        token_seconds: for each token chosen in that time, since the one before it in its sequence.
    """

    prefill_seconds: float
    first_token_seconds: list[float]
    decode_seconds: float
    token_seconds: list[float]


@dataclass(frozen=True)
class Bandwidth:
    """What the machine reads, and what decoding reads of it.

    Attributes:
        bytes_per_second: that as many threads as the model has read from memory at best, between the runs.
        weights: bytes of weights that each step reads.
        cache: bytes of keys and values that a step reads, on average.
        weights_share: of the bandwidth, which reading the weights takes at the median speed. Above 1 where they fit
            into the processor's caches.
    """

    bytes_per_second: float
    weights: int
    cache: int
    weights_share: float


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured. Speeds are of the whole batch, tokens a second.

    Attributes:
        prompt_tokens, new_tokens, batch_size, repetitions: as asked for.
        prefill: prompt tokens a second.
        time_to_first_token: seconds; in a batch a prompt also waits for those before it.
        decode: new tokens a second, first ones aside; None where there are no others.
        seconds_per_token: from token to token of one sequence; None likewise.
        memory: of the process after a first run.
        cache_bytes: keys and values of the batch at its longest, which are part of that memory.
        bandwidth: None off the CPU, and where nothing was decoded.
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
        model: to be timed.
        prompt_tokens: of each prompt.
        new_tokens: of each continuation.
        batch_size: prompts that are continued together.
        repetitions: runs that count.
        seed: of the prompts.
        progress: called after each run.

    Raises:
        OptionError: a number is below 1, the tokens don't fit into the context window, or the batch not into memory.
        BackendError: ONNX Runtime failed.
    """
    given = {
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size, "repetitions": repetitions,
    }  # fmt: skip
    for name, value in given.items():
        if value < 1:
            raise OptionError(f"{name} must be at least 1, not {value}")
    config, session = model.config, model.session
    # The last token is chosen, but never passes through the network.
    positions = prompt_tokens + new_tokens - 1
    if positions > config.n_positions:
        raise OptionError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones take {positions} positions,"
            f" the context window has {config.n_positions}: lower one of them"
        )
    session.check_room(batch_size, positions)
    decoder = Decoder(session)
    prompts = np.random.default_rng(seed).integers(config.vocab_size, size=(batch_size, prompt_tokens))

    def run() -> Run:
        decoder.forget()
        return time_run(decoder, list(prompts), new_tokens, config.n_positions)

    run()
    used = machine.process_memory()
    reader = machine.MemoryReader(session.threads) if session.device == devices.device_name(devices.CPU) else None
    runs: list[Run] = []
    with reader or nullcontext():
        for done in range(repetitions):
            if reader is not None:
                reader.read()
            runs.append(run())
            if progress is not None:
                progress(done + 1, repetitions)
    decode = None
    if new_tokens > 1:
        decode = Spread.of([len(each.token_seconds) / each.decode_seconds for each in runs])
    per_position = 2 * config.n_layer * config.n_embd * session.dtype.itemsize
    bandwidth = None
    if decode is not None and reader is not None:
        weights = weights_read(model.bundle, batch_size)
        # Of the positions that a step finds, on average over the steps.
        cache = int(batch_size * per_position * (prompt_tokens + positions) / 2)
        share = weights * decode.median / batch_size / reader.best
        bandwidth = Bandwidth(reader.best, weights, cache, share)
    return Benchmark(
        **given,
        prefill=Spread.of([batch_size * prompt_tokens / each.prefill_seconds for each in runs]),
        time_to_first_token=Spread.of([seconds for each in runs for seconds in each.first_token_seconds]),
        decode=decode,
        seconds_per_token=Percentiles.of([s for each in runs for s in each.token_seconds]) if decode else None,
        memory=used,
        cache_bytes=batch_size * positions * per_position,
        bandwidth=bandwidth,
    )


def time_run(
    decoder: Decoder, prompts: Sequence[Tokens], new_tokens: int, context: int, clock: Clock = time.perf_counter
) -> Run:
    """Continues prompts together, each by exactly so many tokens, and times it.

    Args:
        decoder: the loop, which holds nothing of these prompts yet.
        prompts: int64 [length] each.
        new_tokens: of each.
        context: positions that the network has.
        clock: tells the time in seconds.
    """
    options = GenerationConfig(max_new_tokens=new_tokens)
    searches = [start(prompt, options, context) for prompt in prompts]
    times: dict[int, list[float]] = {id(search): [] for search in searches}
    begun = clock()
    for search in decoder.run(iter(searches), len(searches)):
        times[id(search)].append(clock())
    first = [each[0] - begun for each in times.values()]
    prefilled, ended = max(first) + begun, max(each[-1] for each in times.values())
    # A prompt that was early waits for the others, which none of its tokens is to blame for.
    gaps = [
        now - max(before, prefilled) for each in times.values() for before, now in pairwise(each) if now > prefilled
    ]
    return Run(prefilled - begun, first, ended - prefilled, gaps)


def weights_read(bundle: Bundle, rows: int = 1, screens: bool | None = None) -> int:
    """Bytes of weights that a step of greedy search on the CPU reads: all but tables, of which it looks up rows.

    Args:
        bundle: whose weights they are.
        rows: of the batch.
        screens: whether logits may be screened; None asks the processor.
    """
    config, dtype = bundle.config, bundle.manifest.dtype
    stored = sum(record.size for name, record in bundle.manifest.files.items() if name.startswith("onnx/"))
    tables = config.n_positions * config.n_embd * (4 if dtype == "fp32" else 2)
    if not config.tie_word_embeddings:
        tied = replace(config, tie_word_embeddings=True)
        tables += memory(config, dtype).weights - memory(tied, dtype).weights
    if head.usable(bundle, screens):
        tables += 4 * config.vocab_size * config.n_embd - head.bytes_read(bundle, rows)
    # There are no kernels for float16 on x86: ONNX Runtime keeps the weights in float32.
    factor = 2 if dtype == "fp16" and architecture() in ("x86_64", "AMD64") else 1
    return factor * (stored - tables)
